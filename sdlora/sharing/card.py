"""A model card: the README.md by which the Hugging Face Hub shows, finds and tries an adapter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.adapters.header_text import plain
from sdlora.errors import ConfigError, OutputError
from sdlora.families.sources import is_hub_id
from sdlora.sharing.bases import hub_base_of
from sdlora.sharing.card_text import body
from sdlora.sharing.facts import AdapterFacts
from sdlora.sharing.samples import Sample
from sdlora.storage import is_there, write_bytes, write_text

CARD = "README.md"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


@dataclass(frozen=True)
class CardWishes:
    """What only the author can say."""

    base_model: str = ""
    """Hub id; "" leaves it to what the header tells."""
    license: str = ""
    author: str = ""
    repository: str = ""
    """Hub id that the code in the card loads from; "" loads from the file."""


@dataclass(frozen=True)
class Card:
    """A model card and the pictures that it shows."""

    text: str
    samples: tuple[Sample, ...]
    base_model: str
    notes: tuple[str, ...]
    """What the author may want to add, in one sentence each."""


def model_card(facts: AdapterFacts, wishes: CardWishes, pictures: Sequence[Sample] = ()) -> Card:
    """Return the card of an adapter. Raises ConfigError for wishes that are no id."""
    for flag, hub_id in (("--base-model", wishes.base_model), ("--repo", wishes.repository)):
        if hub_id and not is_hub_id(hub_id):
            raise ConfigError(f"{flag} {hub_id}: is no Hugging Face id; expected owner/name")
    if wishes.license and not _LICENSE.fullmatch(wishes.license):
        raise ConfigError(
            f"--license {wishes.license}: is no licence id; expected one such as apache-2.0, creativeml-openrail-m or other"
        )
    base = wishes.base_model or hub_base_of(facts)
    text = body(facts, base, plain(wishes.author), wishes.repository, bool(pictures))
    return Card(
        _with_front_matter(text, facts, base, wishes, pictures), tuple(pictures), base, _notes(base, wishes, facts)
    )


def write_card(card: Card, target: Path, overwrite: bool) -> list[Path]:
    """The card lies at `target` and its pictures beside it; returns all paths. Raises OutputError, writing nothing,
    where something is there that may not be replaced. A model file never may.
    """
    if target.suffix.lower() == ".safetensors" or (is_there(target) and not target.is_file()):
        raise OutputError(f"{target}: a card is not written there; name a file such as README.md with --out")
    pictures = {target.parent / sample.place: sample.data for sample in card.samples}
    for place in (target, *pictures):
        if is_there(place) and not overwrite:
            raise OutputError(f"{place}: is there already; name another with --out, or say --overwrite")
    for place, data in pictures.items():  # before the card that shows them
        write_bytes(place, data)
    write_text(target, card.text)
    return [target, *pictures]


def _with_front_matter(
    text: str, facts: AdapterFacts, base: str, wishes: CardWishes, pictures: Sequence[Sample]
) -> str:
    from huggingface_hub import ModelCardData

    readable = not facts.unread_by_diffusers
    kind = "textual_inversion" if facts.is_embedding else "lora"
    family = "stable-diffusion-xl" if facts.report.family == "sdxl" else "stable-diffusion"
    entries: dict[str, Any] = {
        "base_model": base or None,
        "base_model_relation": "adapter" if base else None,
        "instance_prompt": ", ".join(facts.triggers) or None,
        "widget": [{"text": sample.prompt or "-", "output": {"url": sample.place}} for sample in pictures] or None,
        "tags": ["text-to-image", family, kind, *["diffusers"] * readable, *["template:sd-lora"] * (kind == "lora")],
        "license": wishes.license or None,
        "pipeline_tag": "text-to-image",
        "library_name": "diffusers" if readable else None,
    }
    return f"---\n{ModelCardData(**entries).to_yaml()}\n---\n\n{text}"


def _notes(base: str, wishes: CardWishes, facts: AdapterFacts) -> tuple[str, ...]:
    notes = []
    if not base:
        trained = f"the header says it was trained on {facts.base!r}" if facts.base else "the header does not tell it"
        notes.append(f"the card names no base model, because {trained}; name its Hub id with --base-model")
    if not wishes.license:
        notes.append("the card names no licence; name one with --license")
    if not facts.triggers:
        guess = f", such as its commonest tag {facts.guessed_trigger!r}" if facts.guessed_trigger else ""
        notes.append(f"the header names no trigger words; add to the card what a prompt should say{guess}")
    return tuple(notes)

"""What may be told of an adapter to everybody: from its tensors and the harmless part of its header."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdlora.adapters.formats import diffusers, kohya, peft
from sdlora.adapters.formats.detect import EMBEDDING
from sdlora.adapters.formats.embedding_keys import BUNDLE, named_words
from sdlora.adapters.formats.parts import LORA
from sdlora.adapters.header_text import base_of, named_triggers, plain, trigger_of
from sdlora.adapters.inspect import AdapterReport, inspect_adapter
from sdlora.adapters.private_text import telling
from sdlora.adapters.stored import Stored, is_pickle, stored
from sdlora.errors import FormatError
from sdlora.families.traits import family_title
from sdlora.storage import user_path

_MOST_WORDS = 20
_LONGEST_TRAINING = 10 * 365 * 86_400.0
_SETTINGS = {
    "steps": "ss_steps",
    "epochs": "ss_num_epochs",
    "batch size": "ss_total_batch_size",
    "batches accumulated": "ss_gradient_accumulation_steps",
    "learning rate of the UNet": "ss_unet_lr",
    "learning rate of the text encoder": "ss_text_encoder_lr",
    "learning rate of the words": "sdlora_tokens_lr",
    "schedule of rates": "ss_lr_scheduler",
    "optimizer": "ss_optimizer",
    "resolution": "ss_resolution",
    "loss": "ss_loss_type",
    "min-SNR gamma": "ss_min_snr_gamma",
    "debiased loss": "ss_debiased_estimation",
    "noise offset": "ss_noise_offset",
    "zero terminal SNR": "ss_zero_terminal_snr",
    "dropout": "ss_network_dropout",
    "prediction": "modelspec.prediction_type",
    "precision": "ss_mixed_precision",
    "seed": "ss_seed",
}
"""What a settings table says -> the header entry that it is from."""
_MEANS_NOTHING = ("", "none", "false")


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter as strangers may know it. All text is of one line and of bounded length."""

    path: Path
    report: AdapterReport
    name: str
    triggers: tuple[str, ...]
    """What a prompt should say: trigger words that the header names as such, then new words that are none of them."""
    guessed_trigger: str
    """For the author alone: what may be the trigger of a file that names none, though it may be somebody's caption."""
    words: Mapping[str, str]
    """{new word: digest of its vectors} for the embeddings that lie beside the adapter."""
    base: str
    """What the header calls the base that it was trained on, or ""."""
    settings: Mapping[str, str]
    pictures: int
    """Number of training pictures, 0 where the header does not tell."""
    concepts: int
    seconds: float
    """How long it was trained, 0 where the header does not tell."""
    unread_by_diffusers: str
    """Why diffusers does not do with the file what it should, or ""."""

    @property
    def is_embedding(self) -> bool:
        return self.report.format == EMBEDDING

    @property
    def title(self) -> str:
        """What it is, in a few words: "LoRA of rank 8 for Stable Diffusion XL"."""
        if self.is_embedding:
            what = "embedding (textual inversion)"
        else:
            what = " and ".join(_KIND_TITLES.get(kind, kind) for kind in self.report.kinds) or "LoRA"
        rank = f" of rank {numbers(self.report.rank)}" if self.report.rank is not None else ""
        family = f" for {family_title(self.report.family)}" if self.report.family else ""
        return f"{what}{rank}{family}"


_KIND_TITLES = {
    "lora": "LoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "dense": "full-weight difference",
    "dora lora": "DoRA",
    "dora loha": "DoRA on LoHa",
    "dora lokr": "DoRA on LoKr",
}


def adapter_facts(path: Path | str) -> AdapterFacts:
    """Return what may be told of the adapter in one .safetensors file. Raises FormatError for anything else."""
    place = user_path(path)
    if is_pickle(place) or (place.is_dir() and peft.is_folder(place)) or peft.folder_of(place):
        raise FormatError(
            f"{place}: only single .safetensors files are shared; make one with 'sdlora adapter convert {place} OUT'"
        )
    found, report = stored(place), inspect_adapter(place)
    text = report.metadata
    named = named_triggers(text)
    known = dict.fromkeys(word for word in (*named, *map(plain, report.tokens)) if word and not telling(word))
    return AdapterFacts(
        path=place,
        report=report,
        name=_name(text, place),
        triggers=tuple(known)[:_MOST_WORDS],
        guessed_trigger="" if named else trigger_of(text),
        words=named_words(text),
        base=base_of(text)[0],
        settings=dict(_settings(text)),
        pictures=whole_number(text.get("ss_num_train_images", "")),
        concepts=len(_object(text.get("ss_dataset_dirs", ""))),
        seconds=_seconds(text),
        unread_by_diffusers=_unread_by_diffusers(found, report),
    )


def numbers(found: float | list[int] | list[float]) -> str:
    """Return one number, or the span of several."""
    return f"{found[0]:g} to {found[-1]:g}" if isinstance(found, list) else f"{found:g}"


def whole_number(text: str) -> int:
    """Return the number that the text is, 0 where it is none that counts something."""
    return int(text) if re.fullmatch(r"[0-9]{1,12}", text) else 0


def _name(metadata: Mapping[str, str], place: Path) -> str:
    """Return what the adapter calls itself, or its file is called, without what tells of people and machines."""
    names = (plain(metadata.get(key, "")) for key in ("modelspec.title", "ss_output_name"))
    return next((name for name in names if name and not telling(name)), plain(place.stem)) or "adapter"


def _settings(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for title, key in _SETTINGS.items():
        value = plain(metadata.get(key, ""), 80)
        if value.lower() not in _MEANS_NOTHING and "/" not in value and "\\" not in value:
            yield title, value


def _seconds(metadata: Mapping[str, str]) -> float:
    try:
        started, ended = (float(metadata.get(f"ss_training_{name}_at", "")) for name in ("started", "finished"))
    except ValueError:
        return 0.0
    return ended - started if 0 < ended - started < _LONGEST_TRAINING else 0.0  # nan compares as false


def _object(text: str) -> dict[str, object]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _unread_by_diffusers(found: Stored, report: AdapterReport) -> str:
    """Return why diffusers would refuse the file or do something else with it, by its code; "" where it reads it."""
    if report.format == EMBEDDING:
        return ""
    if report.format not in (kohya.NAME, diffusers.NAME):
        return f"it does not know files of {report.format}'s kind"
    if any(key.startswith(BUNDLE) for key in found.shapes):
        return "it refuses files with new words inside"
    other = [kind for kind in report.kinds if kind not in ("lora", "dora lora")]
    if other:
        return f"it does not know {_KIND_TITLES.get(other[0], other[0])}"
    if report.format == kohya.NAME and any(kind.startswith("dora") for kind in report.kinds):
        return "it drops DoRA's magnitudes with a warning, and the plain LoRA that is left is not what was trained"
    layers = found.contents.places.layers
    if any(LORA[2] in place.keys for place in layers.values()):
        return "it does not know LoRA in Tucker form"
    for encoder in ("text_encoder.", "text_encoder_2."):
        inside = [path for path in layers if path.startswith(encoder)]
        if report.format == kohya.NAME and inside and not any(path.endswith("out_proj") for path in inside):
            return "it reads a text encoder only where out_proj is among its layers"
    return ""

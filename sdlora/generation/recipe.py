"""`Recipe`: what ran, all that made one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sdlora.errors import FormatError
from sdlora.generation.request import ZeroSnr


@dataclass(frozen=True)
class UsedAdapter:
    """An adapter as it acted: its file's name and SHA-256, its tensors' SHA-256, its weight."""

    name: str
    sha256: str
    tensor_sha256: str
    weight: float
    words: dict[str, str] = field(default_factory=dict)
    """{new word that came with it: SHA-256 of its vectors}, wherever these were."""
    embedding: bool = False
    """Whether it is nothing but new words."""
    text_encoder_weight: float | None = None
    """Its weight in the text encoders, where that is another one."""
    blocks: str = ""
    """What its weight was multiplied by in each block, as it was asked for."""
    steps: str = ""
    """When it acted, as it was asked for."""


@dataclass(frozen=True)
class UsedPicture:
    """A picture that another was made from: its file's name and SHA-256."""

    name: str
    sha256: str


@dataclass(frozen=True)
class UsedMask:
    """What was painted anew."""

    picture: UsedPicture
    blur: float
    area: str
    padding: int
    content: str


@dataclass(frozen=True)
class UsedStart:
    """The picture that denoising began with."""

    picture: UsedPicture
    strength: float
    resize: str
    mask: UsedMask | None = None


@dataclass(frozen=True)
class UsedControl:
    """A ControlNet as it acted: its name and SHA-256, its map, how strongly and when."""

    model: str
    """Its Hub id, or its file's or folder's name."""
    sha256: str
    picture: UsedPicture
    strength: float
    start: float
    end: float
    resize: str


@dataclass(frozen=True)
class UsedHires:
    """The second pass, in which the picture was made larger."""

    scale: float
    steps: int
    strength: float
    upscaler: str
    """A name, or of a file its stem."""
    upscaler_sha256: str = ""


@dataclass(frozen=True)
class Recipe:
    """All that made one picture. On the same device and versions it makes the same pixels again."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    width: int
    height: int
    base: str
    base_family: str
    base_sha256: str
    adapters: tuple[UsedAdapter, ...]
    scheduler: str
    scheduler_config: dict[str, Any]
    noise_device: str
    """As which device noise was drawn, wherever that was done: cpu or cuda."""
    precision: str
    device: str
    versions: dict[str, str]
    quantize: str = "none"
    emphasis: str = "none"
    """Of recipes that say nothing of it: before there was a prompt language, brackets were text."""
    clip_skip: int = 1
    template: str = ""
    """The prompt before its choices were made, where it had some."""
    negative_template: str = ""
    start: UsedStart | None = None
    """None: pure noise."""
    controls: tuple[UsedControl, ...] = ()
    hires: UsedHires | None = None
    """None: no second pass; else width and height are those of the first."""
    vae_tiling: bool = False
    """Whether the VAE worked in tiles."""
    notes: tuple[str, ...] = ()
    """What should be known of how it came out, a sentence each."""
    sampler: str = ""
    """As people call it; "": the base's own."""
    schedule: str = ""
    guidance_rescale: float = 0.0
    zero_snr: ZeroSnr = "auto"
    """What was asked for; `scheduler_config` tells what ran."""

    def to_json(self) -> str:
        """Return the recipe as JSON text."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Recipe:
        """Return the recipe that `to_json` wrote. Raises FormatError for anything else."""
        try:
            values = json.loads(text)
            recipe = _RECIPE.validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise FormatError(f"not a recipe of sdlora ({where}: {first['msg'].lower()})") from error
        except (ValueError, RecursionError) as error:
            raise FormatError(f"not a recipe of sdlora ({error})") from error
        newer = _unknown(values, asdict(recipe))
        if newer:
            raise FormatError(
                f"this recipe, of sdlora {recipe.versions.get('sdlora', 'unknown')[:40]}, says {min(newer)[:40]!r}, which "
                "this version does not know; use that version or a newer one"
            )
        return recipe


_RECIPE = TypeAdapter(Recipe)


def _unknown(values: Any, known: Any) -> set[str]:
    """Return the keys of a recipe, also within it, that what was understood of it does not have."""
    if isinstance(known, Mapping) and isinstance(values, Mapping):
        return set(values.keys() - known.keys()).union(
            *(_unknown(values[key], known[key]) for key in values.keys() & known)
        )
    if isinstance(known, tuple):
        return set().union(*map(_unknown, values, known))
    return set()

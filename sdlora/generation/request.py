"""`GenerationRequest`: what was asked. `Recipe`: what ran."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from sdlora.adapters.blocks import parse_block_weights
from sdlora.config import Section, validated
from sdlora.errors import FormatError
from sdlora.generation.prompt_plan import Emphases
from sdlora.generation.step_weights import parse_step_weights

SEED_LIMIT = 2**32
_Side = Annotated[int, Field(ge=0, le=4096, multiple_of=8)]


class AdapterChoice(Section):
    """One adapter file and how strongly it acts."""

    path: str
    """The .safetensors file: an adapter, with its new words beside or in it, or an embedding."""
    weight: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] = 1.0
    """1 is as trained, 0 is not at all. New words act whole, but at 0."""
    text_encoder_weight: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] | None = None
    """How strongly it acts on the text encoders; not given: as on the UNet."""
    blocks: str = ""
    """What the weight is multiplied by in each block: "MIDD", "1,0,0,1,...", "IN=0, MID=1, OUT04=0.5"; empty: 1."""
    steps: str = ""
    """When it acts on the UNet: "5-20", "0.2-0.8" of the steps, or factors, "1@0, 0.5@8"; empty: always."""

    @field_validator("blocks")
    @classmethod
    def _known_blocks(cls, blocks: str) -> str:
        return _parsed(parse_block_weights, blocks)

    @field_validator("steps")
    @classmethod
    def _known_steps(cls, steps: str) -> str:
        return _parsed(parse_step_weights, steps)


def _parsed(parse: Callable[[str], object], text: str) -> str:
    """Return the text; raises ValueError where `parse` does not understand it."""
    if text:
        parse(text)
    return text


class GenerationRequest(Section):
    """Pictures asked for: `count` of them with seeds seed, seed + 1, ..."""

    prompt: str
    """What the picture shows."""
    negative_prompt: str = ""
    """What it should not show."""
    seed: Annotated[int, Field(ge=0, lt=SEED_LIMIT)] = 0
    """Seed of the first picture."""
    count: Annotated[int, Field(gt=0, le=10_000)] = 1
    """Number of pictures."""
    steps: Annotated[int, Field(gt=0, le=1000)] = 25
    """Denoising steps."""
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 7.5
    """How strongly the prompt steers; 1 and less: no negative prompt, half the time."""
    width: _Side = 0
    """Pixels, a multiple of 8; 0: the base's own size."""
    height: _Side = 0
    """Pixels, a multiple of 8; 0: the base's own size."""
    emphasis: Emphases = "original"
    """What (brackets:1.2) do: original and no norm as in AUTOMATIC1111, comfy as in ComfyUI, ignore: nothing, none: text."""
    wildcards: str = ""
    """Folder of .txt files, one choice a line: __colours__ in a prompt is a line of colours.txt."""
    clip_skip: Annotated[int, Field(ge=1, le=12)] = 1
    """Which layer of the text encoders counts: 1 the usual one, 2 the one before it."""
    adapters: tuple[AdapterChoice, ...] = ()
    """Adapters that act together."""

    @model_validator(mode="after")
    def _every_seed_in_range(self) -> GenerationRequest:
        if self.seed + self.count > SEED_LIMIT:
            raise ValueError(f"seed + count must not exceed {SEED_LIMIT}")
        return self

    @field_validator("adapters")
    @classmethod
    def _no_file_twice(cls, adapters: tuple[AdapterChoice, ...]) -> tuple[AdapterChoice, ...]:
        paths = [adapter.path for adapter in adapters]
        if len(set(paths)) < len(paths):
            raise ValueError("the same adapter is named twice; give it once with the sum of the weights")
        return adapters


def make_request(**values: Any) -> GenerationRequest:
    """Return the checked request. Raises one ConfigError for everything that is wrong."""
    return validated(GenerationRequest, values, "request")


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
        newer = _unknown(Recipe, values).union(*(_unknown(UsedAdapter, item) for item in values["adapters"]))
        if newer:
            raise FormatError(
                f"this recipe, of sdlora {recipe.versions.get('sdlora', 'unknown')[:40]}, says {min(newer)[:40]!r}, which "
                "this version does not know; use that version or a newer one"
            )
        return recipe


_RECIPE = TypeAdapter(Recipe)


def _unknown(kind: type[Any], values: dict[str, Any]) -> set[str]:
    """Return the keys for which a dataclass has no field."""
    return values.keys() - {item.name for item in fields(kind)}

"""Which pictures are made together: all that have in common what a batch cannot have two of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

from sdlora.families.base import LoadedBase
from sdlora.families.prompts import chunk_count
from sdlora.families.samplers.names import SAMPLERS
from sdlora.families.words import knowing
from sdlora.generation.asked import Asked
from sdlora.generation.prompts.plan import Emphases
from sdlora.generation.recipe import Recipe
from sdlora.generation.request import AdapterChoice, GenerationRequest, NoiseSource
from sdlora.generation.resident import Acting
from sdlora.generation.upscaling.hires import Hires

P = TypeVar("P")
Made = tuple[int, Image.Image, Recipe]
"""(number of its request, picture, recipe)."""


@dataclass(frozen=True)
class Likeness:
    """What the pictures of a batch have in common."""

    size: tuple[int, int]
    steps: int
    sampler: str
    schedule: str
    noise: NoiseSource
    guided: bool
    emphasis: Emphases
    clip_skip: int
    zero_snr: bool
    """Whether request or adapters ask for a schedule that ends in pure noise."""
    chunks: int
    """Of 75 tokens, in the longest of all its prompts."""
    strength: float | None
    """How much of a picture that it starts from is made anew, None where it starts from noise."""
    masked: bool
    """Whether a part of that picture stays."""
    hires: Hires | None
    controls: tuple[str, ...]
    """SHA-256 of its ControlNets; maps, strengths and spans are each picture's own."""


def in_order(asked: Sequence[Asked], batch_size: int) -> Iterator[list[Asked]]:
    """Yield the pictures in their order, so many together."""
    for start in range(0, len(asked), batch_size):
        yield list(asked[start : start + batch_size])


def regrouped(base: LoadedBase, asked: Sequence[Asked], batch_size: int) -> Iterator[list[Asked]]:
    """Yield all pictures in full batches as far as possible, those with the same adapters next to one another.

    What adapters change, their words and schedules, is not known here; `split_alike` has the last word.
    """
    groups: dict[Likeness, list[Asked]] = {}
    for picture in asked:
        groups.setdefault(likeness(base, picture), []).append(picture)
    for group in groups.values():
        yield from in_order(neighbours(group, lambda picture: picture.adapters), batch_size)


def neighbours(pictures: Sequence[P], adapters: Callable[[P], tuple[AdapterChoice, ...]]) -> list[P]:
    """Return the pictures, those with the same adapters next to one another, in the order of their first ones."""
    places = {mix: place for place, mix in enumerate(dict.fromkeys(map(adapters, pictures)))}
    return sorted(pictures, key=lambda picture: places[adapters(picture)])


def split_alike(base: LoadedBase, batch: Sequence[Asked], acting: Sequence[Acting]) -> list[list[int]]:
    """Return the numbers of pictures in groups that can be made together, in the order of their first ones.

    A sampler whose steps are fitted to the picture has each by itself.
    """
    groups: dict[tuple[Likeness, int], list[int]] = {}
    for number, (picture, one) in enumerate(zip(batch, acting, strict=True)):
        sampler = SAMPLERS.get(picture.request.sampler)
        by_itself = 1 + number if sampler and sampler.one_by_one else 0
        with knowing(base, one.words):
            groups.setdefault((likeness(base, picture, one.zero_snr), by_itself), []).append(number)
    return list(groups.values())


def wants_zero_snr(base: LoadedBase, request: GenerationRequest, by_adapters: bool) -> bool:
    """Return whether a picture's noise is to end in pure noise: as the request says, else where its adapters ask for it."""
    if request.zero_snr == "auto":
        return by_adapters and base.prediction == "v"
    return request.zero_snr == "on"


def likeness(base: LoadedBase, asked: Asked, zero_snr: bool = False) -> Likeness:
    """Return what the picture shares with those of its batch; the base must know its words."""
    request = asked.request
    return Likeness(
        size=asked.size(base),
        steps=request.steps,
        sampler=request.sampler,
        schedule=request.schedule,
        noise=request.noise,
        guided=asked.guided,
        emphasis=request.emphasis,
        clip_skip=request.clip_skip,
        zero_snr=wants_zero_snr(base, request, zero_snr),
        chunks=chunk_count(base, list(asked.plan.spellings())),
        strength=request.strength if asked.source else None,
        masked=bool(request.mask),
        hires=asked.hires,
        controls=tuple(control.used.sha256 for control in asked.controls),
    )

"""What a picture's prompt is at each of its steps: from the prompt language to weighted segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from sdlora.families.base import Emphasis
from sdlora.families.traits import BREAK_SEGMENT
from sdlora.generation.prompts.attention import Composed, parse_attention, parse_composition
from sdlora.generation.prompts.schedule import parse_schedule
from sdlora.generation.prompts.wildcards import Wildcards, expand_wildcards

Emphases = Literal["original", "no norm", "comfy", "ignore", "none"]
"""What brackets do: as `Emphasis` of the families says, nothing ("ignore"), or stand for themselves ("none")."""
Spelling = tuple[tuple[str, float], ...]
"""A prompt at one step, in segments."""


@dataclass(frozen=True)
class Part:
    """One of the prompts that guide a picture, and how strongly."""

    weight: float
    spellings: tuple[tuple[int, Spelling], ...]
    """(last step, what it is up to then), steps counted from 1."""

    def at(self, step: int) -> Spelling:
        """Return what it is at a step."""
        return next(spelling for last, spelling in self.spellings if step <= last or last == self.spellings[-1][0])


@dataclass(frozen=True)
class PromptPlan:
    """What guides one picture."""

    positive: tuple[Part, ...]
    negative: Part | None
    """None: no negative prompt."""

    @property
    def is_plain(self) -> bool:
        """Whether it is one prompt of weight 1, which without guidance is all that is needed."""
        return len(self.positive) == 1 and self.positive[0].weight == 1

    def spellings(self) -> Iterator[Spelling | None]:
        """Yield everything that is to be encoded, None for no negative prompt."""
        for part in (*self.positive, *((self.negative,) if self.negative else ())):
            yield from (spelling for _, spelling in part.spellings)
        if self.negative is None:
            yield None


@dataclass(frozen=True)
class PicturePrompts:
    """A picture's prompts after every choice in them was made."""

    prompt: str
    negative_prompt: str


def picture_prompts(
    prompt: str, negative_prompt: str, seed: int, wildcards: Wildcards, emphasis: Emphases = "original"
) -> PicturePrompts:
    """Return what the prompts of the picture with that seed are; the seed alone makes all their choices."""
    if emphasis == "none":
        return PicturePrompts(prompt, negative_prompt)
    return PicturePrompts(expand_wildcards(prompt, seed, wildcards), expand_wildcards(negative_prompt, seed, wildcards))


def plan_prompt(prompt: str, negative_prompt: str, steps: int, emphasis: Emphases = "original") -> PromptPlan:
    """Return what the prompts are at each of `steps` steps. AND has no meaning in a negative prompt."""
    parts = parse_composition(prompt) if emphasis != "none" else [Composed(prompt)]
    positive = tuple(Part(part.weight, _spellings(part.text, steps, emphasis)) for part in parts)
    negative = Part(1.0, _spellings(negative_prompt, steps, emphasis)) if negative_prompt else None
    return PromptPlan(positive, negative)


def encoder_emphasis(emphasis: Emphases) -> Emphasis:
    """Return what the families are told; where there are no weights it makes no difference."""
    return emphasis if emphasis in get_args(Emphasis) else "original"  # type: ignore[return-value]


@lru_cache(maxsize=256)  # many pictures have one negative prompt
def _spellings(text: str, steps: int, emphasis: Emphases) -> tuple[tuple[int, Spelling], ...]:
    schedule = [(steps, text)] if emphasis == "none" else parse_schedule(text, steps)
    return tuple((last, _spelling(shown, emphasis)) for last, shown in schedule)


def _spelling(text: str, emphasis: Emphases) -> Spelling:
    if emphasis == "none":
        return ((text, 1.0),)
    segments = parse_attention(text)
    if emphasis == "ignore":
        segments = [segment if segment == BREAK_SEGMENT else (segment[0], 1.0) for segment in segments]
    return _whole(segments)


def _whole(segments: Sequence[tuple[str, float]]) -> Spelling:
    """Return the segments; one that is nothing beside others says nothing."""
    return tuple(segment for segment in segments if segment[0] or len(segments) == 1) or (("", 1.0),)

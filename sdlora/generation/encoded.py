"""The prompts of a batch as the UNet is given them, each text encoded once under its own picture's adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sdlora.families.base import Conditioning, LoadedBase, PromptStyle
from sdlora.generation.prompts.plan import PromptPlan, Spelling
from sdlora.generation.resident import Acting, ResidentAdapters


@dataclass(frozen=True)
class Guide:
    """One row of a batch for the UNet: which picture's latents, which conditioning, how strongly it pulls."""

    picture: int
    row: int
    weight: float | None
    """None: it is the negative prompt, from which the others pull away."""


class EncodedPrompts:
    """The conditioning of everything that a batch of pictures is guided by.

    All texts of the batch must fill equally many chunks, so that no picture depends on the others.
    """

    def __init__(
        self,
        base: LoadedBase,
        adapters: ResidentAdapters,
        plans: Sequence[PromptPlan],
        acting: Sequence[Acting],
        style: PromptStyle,
    ) -> None:
        self._plans = plans
        self._rows: list[dict[Spelling | None, int]] = [{} for _ in plans]
        parts: list[Conditioning] = []
        rows = 0
        for alike in _speaking_alike(acting):
            spellings = dict.fromkeys(spelling for number in alike for spelling in plans[number].spellings())
            with adapters.speaking(acting[alike[0]]):
                parts.append(base.family.encode_segments(base, list(spellings), style))
            for number in alike:
                self._rows[number] = {spelling: row for row, spelling in enumerate(spellings, rows)}
            rows += len(spellings)
        self._conditioning = Conditioning.concatenate(parts)

    @property
    def dtype(self) -> torch.dtype:
        """What the latents are computed in."""
        return self._conditioning.states.dtype

    def step(self, step: int) -> int:
        """Return the step of the plan at a step of a pass, the same."""
        return step

    def guides(self, step: int, guided: bool) -> list[Guide]:
        """Return the batch of a step, picture by picture: where `guided`, its negative prompt first, then all others."""
        return [guide for number in range(len(self._plans)) for guide in self._guides(number, step, guided)]

    def _guides(self, number: int, step: int, guided: bool) -> Iterator[Guide]:
        plan, rows = self._plans[number], self._rows[number]
        if guided:
            yield Guide(number, rows[plan.negative.at(step) if plan.negative else None], None)
        for part in plan.positive:
            yield Guide(number, rows[part.at(step)], part.weight)

    def rows(self, guides: Sequence[Guide]) -> Conditioning:
        """Return the conditioning of a batch."""
        return self._conditioning.rows([guide.row for guide in guides])


def _speaking_alike(acting: Sequence[Acting]) -> list[list[int]]:
    """Return the pictures' numbers in groups to which prompts mean the same."""
    groups: list[list[int]] = []
    for number, one in enumerate(acting):
        group = next((group for group in groups if acting[group[0]].speaks_like(one)), None)
        if group is None:
            groups.append([number])
        else:
            group.append(number)
    return groups

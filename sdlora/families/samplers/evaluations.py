"""The evaluations of a pass: known beforehand, or one by one where a sampler decides as it goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Evaluation:
    """One of the times that the UNet is asked."""

    timestep: torch.Tensor
    step: int
    """Which of the steps it is of that the sampler was set to, counted from 1 at the first that runs."""
    span: tuple[float, float]
    """From which share of the pass to which it reaches."""


class Evaluations(Protocol):
    """The evaluations of a pass, each to be made, with the sampler's step behind it, before the next is asked for."""

    def __iter__(self) -> Iterator[Evaluation]:
        """Yield them."""
        ...

    @property
    def following(self) -> torch.Tensor:
        """The timesteps that are known to come, the next one's first; [0]: none comes."""
        ...

    @property
    def done(self) -> tuple[int, int]:
        """(How far the pass is, of how much), both at least 1."""
        ...


def evaluations_of(made: Any, timesteps: torch.Tensor, steps: int, planned: int) -> Evaluations:
    """Return the evaluations at the timesteps that run, of `planned` ones that the sampler has for `steps` steps."""
    if hasattr(made, "share_done"):
        return _Adaptive(made, timesteps)
    return _Known(timesteps, steps, planned)


class _Known:
    def __init__(self, timesteps: torch.Tensor, steps: int, planned: int) -> None:
        self._timesteps, self._steps, self._planned = timesteps, steps, planned
        self._number = 0

    def __iter__(self) -> Iterator[Evaluation]:
        count = len(self._timesteps)
        for number, timestep in enumerate(self._timesteps):
            self._number = number
            yield Evaluation(
                timestep, number * self._steps // self._planned + 1, (number / count, (number + 1) / count)
            )

    @property
    def following(self) -> torch.Tensor:
        return self._timesteps[self._number + 1 :]

    @property
    def done(self) -> tuple[int, int]:
        return self._number + 1, len(self._timesteps)


class _Adaptive:
    """Each evaluation belongs to the part of the way in which its step begins, of as many as steps were asked for."""

    def __init__(self, made: Any, timesteps: torch.Tensor) -> None:
        self._made, self._timesteps = made, timesteps

    def __iter__(self) -> Iterator[Evaluation]:
        while len(following := self.following):
            share = self._made.share_done
            yield Evaluation(following[0], int(share * len(self._timesteps)) + 1, (share, share))

    @property
    def following(self) -> torch.Tensor:
        known = self._made.next_timestep if len(self._timesteps) else None
        return self._timesteps[:0] if known is None else known[None]

    @property
    def done(self) -> tuple[int, int]:
        parts = len(self._timesteps)
        return max(int(self._made.share_done * parts), 1), parts

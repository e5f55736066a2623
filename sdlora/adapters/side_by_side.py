"""LoRA of several adapters beside one linear layer, each in rows of its own, as two products for all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Factors(NamedTuple):
    """The update scale * up @ down of a linear layer's weight: down [r,in], up [out,r]."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


class SideBySide:
    """Computes what several LoRAs add to a layer's output, each with a strength of its own in every row of a batch.

    The batch is cut into parts of equally many rows with the same adapters. The factors of a part's adapters lie side by side,
    so that their ranks add up; narrower parts are filled up with zeros.
    """

    def __init__(self, acting: Sequence[tuple[Factors, Sequence[float]]]) -> None:
        self._acting = acting
        rows = list(zip(*(strengths for _, strengths in acting), strict=True))
        length = math.gcd(*(len(list(members)) for _, members in itertools.groupby(rows)))
        self._mixes = rows[::length]
        """Of each part, the adapters' strengths."""
        self._ranks = [len(factors.down) for factors, _ in acting]
        self._width = max(sum(itertools.compress(self._ranks, mix)) for mix in self._mixes)
        self._laid: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def is_small(self) -> bool:
        """Whether the factors as they are laid out take no more than twice the memory that the adapters take."""
        return len(self._mixes) * self._width <= 2 * sum(self._ranks)

    def add_to(self, result: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Return `result` [B,...,out] with what is added to it where the layer is given `inputs` [B,...,in]."""
        if self._laid is None:
            self._laid = self._lay()
        down, up, scale = self._laid
        narrow = torch.bmm(inputs.to(down.dtype).reshape(len(down), -1, inputs.shape[-1]), down).mul_(scale)
        wide = result.reshape(len(up), -1, result.shape[-1])
        if result.dtype == up.dtype == torch.float32:  # in one pass over the output
            return torch.baddbmm(wide, narrow, up).reshape(result.shape)
        # Rounded before it is added, as where an adapter acts alone.
        return (wide + torch.bmm(narrow, up).to(result.dtype)).reshape(result.shape)

    def _lay(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return down [k,in,r], up [k,r,out] and, in float32, scale [k,1,r] of the k parts of the batch."""
        first = self._acting[0][0]
        count, width = len(self._mixes), self._width
        down = first.down.new_zeros(count, first.down.shape[1], width)
        up = first.up.new_zeros(count, width, len(first.up))
        scale = torch.zeros(count, 1, width, device=first.down.device)
        for number, mix in enumerate(self._mixes):
            start = 0
            for (factors, _), strength, rank in zip(self._acting, mix, self._ranks, strict=True):
                if strength:
                    place = slice(start, start + rank)
                    down[number, :, place], up[number, place] = factors.down.T, factors.up.T
                    scale[number, 0, place] = strength * factors.scale
                    start += rank
        return down, up, scale

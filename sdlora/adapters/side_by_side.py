"""LoRA of several adapters beside one linear layer, each in rows of its own, as two products for all of them."""

from __future__ import annotations

import itertools
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

    Rows next to one another with the same adapters are one part, where all parts have equally many rows. The factors of
    a part's adapters lie side by side, so that their ranks add up; narrower parts are filled up with zeros.
    """

    def __init__(self, acting: Sequence[tuple[Factors, Sequence[float]]]) -> None:
        self._acting = acting
        self._laid: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def __call__(self, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Return what is added to `output` [B,...,out], which the bare layer gave for `inputs` [B,...,in]."""
        if self._laid is None:
            self._laid = self._lay()
        down, up, scale = self._laid
        narrow = torch.bmm(inputs.to(down.dtype).reshape(len(down), -1, inputs.shape[-1]), down) * scale
        return torch.bmm(narrow, up).reshape(output.shape).to(output.dtype)

    def _lay(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return down [k,in,r], up [k,r,out] and scale [k,1,r] of the k parts of the batch."""
        rows = list(zip(*(strengths for _, strengths in self._acting), strict=True))
        parts = [(mix, len(list(members))) for mix, members in itertools.groupby(rows)]
        mixes = [mix for mix, _ in parts] if len({count for _, count in parts}) == 1 else rows
        ranks = [len(factors.down) for factors, _ in self._acting]
        widest = max(sum(itertools.compress(ranks, mix)) for mix in mixes)
        first = self._acting[0][0]
        down = first.down.new_zeros(len(mixes), widest, first.down.shape[1])
        up = first.up.new_zeros(len(mixes), widest, len(first.up))
        scale = first.down.new_zeros(len(mixes), 1, widest)
        for number, mix in enumerate(mixes):
            start = 0
            for (factors, _), strength, rank in zip(self._acting, mix, ranks, strict=True):
                if strength:
                    place = slice(start, start + rank)
                    down[number, place], up[number, place] = factors.down, factors.up.T
                    scale[number, 0, place] = strength * factors.scale
                    start += rank
        return down.transpose(1, 2).contiguous(), up, scale

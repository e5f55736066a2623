"""Starts of LoRA other than zero: the layer's own directions, of which only the change acts and is saved.

The base is never written. Where peft would take the start out of the base's weight, the start stays beside the
layer as frozen factors that are subtracted: W + scale * (up @ down - up_0 @ down_0).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def start_from(layer: Any, name: str, start: str, weight: torch.Tensor) -> None:
    """LoRA `name` of a peft layer stands at its start, and its output there is zero, up to rounding.

    `weight` is the base's, float32. Ranks beyond the weight's own stay as they are in plain LoRA.
    """
    down, up = layer.lora_A[name], layer.lora_B[name]
    factors = {"pissa": principal_factors, "olora": orthonormal_factors}[start]
    first, second = factors(weight.flatten(1), layer.r[name], layer.scaling[name])
    rank = len(first)
    with torch.no_grad():
        down.weight[:rank] = first.view_as(down.weight[:rank])
        up.weight[:, :rank] = second.view_as(up.weight[:, :rank])
    layer.lora_A[name] = DownWithStart(down)
    layer.lora_B[name] = UpLessStart(up)


def principal_factors(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return down [r,in] and up [out,r] whose product times `scale` is the best rank-r part of weight [out,in].

    PiSSA (Meng et al. 2024, eq. 2 and 3).
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    roots = (values[:rank] / scale).sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def orthonormal_factors(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return down [r,in] and up [out,r], the first rows of R and the first, orthonormal columns of Q in weight = Q R.

    OLoRA (Büyükakyüz 2024); `scale` plays no part in it.
    """
    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()


class DownWithStart(nn.Module):
    """The trained down matrix and, in the second half of the output's channels, the one it started as."""

    def __init__(self, down: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.now, self.start = down, _frozen(down)

    @property
    def weight(self) -> torch.Tensor:
        """The trained matrix."""
        return self.now.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.now(x), self.start(x)), _channels(self.now))


class UpLessStart(nn.Module):
    """The trained up matrix applied to the first half of the channels, less its start applied to the second."""

    def __init__(self, up: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.now, self.start = up, _frozen(up)

    @property
    def weight(self) -> torch.Tensor:
        """The trained matrix."""
        return self.now.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        now, start = x.chunk(2, _channels(self.now))
        difference: torch.Tensor = self.now(now) - self.start(start)
        return difference


def _frozen(layer: nn.Linear | nn.Conv2d) -> Any:
    """Return a copy that nobody trains: its weight is a buffer, because peft thaws parameters."""
    frozen: Any = copy.deepcopy(layer)
    weight = frozen.weight.detach()
    del frozen.weight
    frozen.register_buffer("weight", weight)
    return frozen


def _channels(layer: nn.Module) -> int:
    return 1 if isinstance(layer, nn.Conv2d) else -1

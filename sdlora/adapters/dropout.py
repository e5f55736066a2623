"""Dropout of ranks and of whole layers while an adapter is trained, drawn from torch's global generators."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def drop_from_lora(layer: Any, name: str, rank_share: float, module_share: float) -> None:
    """While it trains, LoRA `name` of a peft layer loses shares of its ranks and, at times, all of its update.

    As in kohya's trainer: ranks are drawn for each example and what is left counts 1 / (1 - share), so that
    the mean is unchanged; a layer left out is not made up for in other steps.
    """
    down, up = layer.lora_A[name], layer.lora_B[name]
    if rank_share:
        channels = 1 if isinstance(layer.get_base_layer(), nn.Conv2d) else -1
        down.register_forward_hook(_RankDropout(layer.r[name], rank_share, channels))
    if module_share:
        up.register_forward_hook(_LayerDropout(module_share))


def drop_rows(layer: Any, share: float) -> None:
    """While it trains, a LoHa or LoKr layer of peft loses a share of the rows of its update.

    That is what LyCORIS calls rank dropout. What is left counts 1 / (1 - share), where peft divides by the share
    of rows drawn, which can be none.
    """
    whole = layer.get_delta_weight

    def dropped(adapter: str, **_: Any) -> torch.Tensor:
        update: torch.Tensor = whole(adapter)
        if not layer.training:
            return update
        rows = (len(update), *(1 for _ in update.shape[1:]))
        return update * (torch.rand(rows, device=update.device) >= share) / (1 - share)

    layer.get_delta_weight = dropped


class _RankDropout:
    def __init__(self, rank: int, share: float, channels: int) -> None:
        self.rank, self.share, self.channels = rank, share, channels

    def __call__(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        shape = [1] * output.ndim
        shape[0], shape[self.channels] = len(output), self.rank
        kept = torch.rand(shape, device=output.device) >= self.share
        # Where the start of a rank is subtracted from it, both are left out together.
        kept = torch.cat([kept] * (output.shape[self.channels] // self.rank), self.channels)
        return output * kept / (1 - self.share)


class _LayerDropout:
    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        return output * (torch.rand((), device=output.device) >= self.share)

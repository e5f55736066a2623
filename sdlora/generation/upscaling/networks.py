"""Networks that enlarge pictures: ESRGAN's, and the small ones that Real-ESRGAN calls compact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

_SLOPE = 0.2
"""Of the leaky ReLU behind convolutions; residuals are scaled by as much (Wang et al. 2018, ESRGAN, sec. 3.1)."""


@dataclass(frozen=True)
class RrdbPlan:
    """What a network of residual-in-residual dense blocks is like."""

    scale: int
    blocks: int
    features: int
    growth: int
    unshuffle: int
    """So many pixels each way become channels before the first layer."""

    @property
    def step(self) -> int:
        """Of what the sides of a picture must be multiples."""
        return self.unshuffle

    def network(self) -> Rrdb:
        """Return one with random weights."""
        return Rrdb(self)


@dataclass(frozen=True)
class CompactPlan:
    """What a compact network is like."""

    scale: int
    layers: int
    """Convolutions between the first and the last."""
    features: int
    step: ClassVar[int] = 1
    """Of what the sides of a picture must be multiples."""

    def network(self) -> Compact:
        """Return one with random weights."""
        return Compact(self)


class Rrdb(nn.Module):
    """A network of residual-in-residual dense blocks, [B,3,H,W] in [0,1] to [B,3,s*H,s*W] (Wang et al. 2018, fig. 4)."""

    def __init__(self, plan: RrdbPlan) -> None:
        super().__init__()
        self.plan = plan
        wide = plan.features
        self.conv_first = _conv(3 * plan.unshuffle**2, wide)
        self.body = nn.Sequential(*(_Block(plan) for _ in range(plan.blocks)))
        self.conv_body = _conv(wide, wide)
        doublings = (plan.scale * plan.unshuffle).bit_length() - 1
        self.conv_up = nn.ModuleList(_conv(wide, wide) for _ in range(doublings))
        self.conv_hr = _conv(wide, wide)
        self.conv_last = _conv(wide, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the pixels enlarged."""
        if self.plan.unshuffle > 1:
            pixels = functional.pixel_unshuffle(pixels, self.plan.unshuffle)
        features = self.conv_first(pixels)
        features = features + self.conv_body(self.body(features))
        for layer in self.conv_up:
            features = _active(layer(functional.interpolate(features, scale_factor=2, mode="nearest")))
        result: torch.Tensor = self.conv_last(_active(self.conv_hr(features)))
        return result


class _Block(nn.Module):
    def __init__(self, plan: RrdbPlan) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (_Dense(plan.features, plan.growth) for _ in range(3))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + _SLOPE * self.rdb3(self.rdb2(self.rdb1(features)))


class _Dense(nn.Module):
    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (_conv(features + n * growth, growth) for n in range(4))
        self.conv5 = _conv(features + 4 * growth, features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        known = features
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            known = torch.cat([known, _active(layer(known))], dim=1)
        return features + _SLOPE * self.conv5(known)


class Compact(nn.Module):
    """Convolutions with PReLUs at the picture's own size, whose last channels become pixels, added to the picture enlarged.

    [B,3,H,W] in [0,1] to [B,3,s*H,s*W]; SRVGGNetCompact of Real-ESRGAN (Wang et al. 2021, version 0.2.3).
    """

    def __init__(self, plan: CompactPlan) -> None:
        super().__init__()
        self.plan = plan
        wide = plan.features
        body: list[nn.Module] = [_conv(3, wide), nn.PReLU(wide)]
        for _ in range(plan.layers):
            body += [_conv(wide, wide), nn.PReLU(wide)]
        self.body = nn.Sequential(*body, _conv(wide, 3 * plan.scale**2))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the pixels enlarged."""
        added = functional.pixel_shuffle(self.body(pixels), self.plan.scale)
        return added + functional.interpolate(pixels, scale_factor=self.plan.scale, mode="nearest")


Network = Rrdb | Compact
Plan = RrdbPlan | CompactPlan


def _conv(inside: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(inside, out, 3, padding=1)


def _active(features: torch.Tensor) -> torch.Tensor:
    return functional.leaky_relu(features, _SLOPE)

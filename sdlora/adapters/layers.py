"""`LoraLayer`: the low-rank update of one layer, and what can be computed of it without a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoraLayer:
    """delta-W = alpha / rank * up @ down.

    Linear: down [r,in], up [out,r]. Convolution: down [r,in,kh,kw], up [out,r,1,1].
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Width of the update."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product is multiplied with, alpha / rank."""
        return self.alpha / self.rank

    def delta_weight(self) -> torch.Tensor:
        """Return delta-W in float32, [out,in] or [out,in,kh,kw]."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.scale * product).reshape(self.up.shape[0], *self.down.shape[1:])

    def delta_norm(self) -> float:
        """Return the Frobenius norm of delta-W without forming it: sqrt(trace((B^T B)(A A^T)))."""
        up, down = self.up.double().flatten(1), self.down.double().flatten(1)
        squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
        return abs(self.scale) * float(squared.sqrt())

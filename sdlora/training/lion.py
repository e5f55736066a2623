"""The Lion optimizer in 32 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Steps of equal size in the direction of the momentum's sign (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

    Its one moment takes half the memory of Adam's two. All steps being `lr` long, it wants a learning rate three
    to ten times below Adam's, and that much more weight decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Every parameter that has a gradient has moved by `lr`, element for element. `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            moments = [self._moment(parameter) for parameter in parameters]
            first, second = group["betas"]
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            directions = torch._foreach_lerp(moments, gradients, 1 - first)
            torch._foreach_sign_(directions)
            torch._foreach_add_(parameters, directions, alpha=-group["lr"])
            torch._foreach_lerp_(moments, gradients, 1 - second)

    def _moment(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        moment: torch.Tensor = state["exp_avg"]
        return moment

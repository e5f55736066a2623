"""`Optimization`: how the trained weights change from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from sdlora.adapters.weights import TrainedWeight
from sdlora.config import OptimizerSection, TokensSection
from sdlora.errors import ConfigError
from sdlora.training.optimizers import averages_itself, choose_optimizer, eval_mode, step_size, train_mode
from sdlora.training.rates import ADAPTER, TOKENS, Span, full_rates, rate_factor, spans


class MovingAverage:
    """The exponential moving average of parameters, float32.

    The decay of update n (from 0) is min(decay, (1 + n) / (10 + n)), so that the start is soon forgotten.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.values = [parameter.detach().clone() for parameter in parameters]
        self.updates = 0
        self._decay = decay

    @torch.no_grad()
    def update(self, parameters: Sequence[nn.Parameter]) -> None:
        """The parameters as they are now count too."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, list(parameters), 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs."""
        return {"values": self.values, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The average stands where `state_dict` was called."""
        for value, saved in zip(self.values, state["values"], strict=True):
            value.copy_(saved)
        self.updates = state["updates"]


@dataclass
class _Group:
    """Weights that learn at one rate over one span of steps, with an optimizer of their own.

    Of their own, because some optimizers measure over all that they hold (Prodigy its step size) or count steps
    (schedule-free), and the others do not mind.
    """

    component: str
    rate: float
    span: Span
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None
    over: bool = field(default=False, init=False)

    def trains(self, step: int) -> bool:
        return self.span[0] <= step < self.span[1]

    def begin(self, step: int, factor: float) -> None:
        """The group trains at `factor` times its rate, or it holds still."""
        trains = self.trains(step)
        for parameter in self.parameters:
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor

    @property
    def has_average(self) -> bool:
        """Whether the weights to use are others than those that train."""
        return not self.over and (self.average is not None or averages_itself(self.optimizer))

    def show_average(self) -> None:
        """The weights are those to use."""
        if self.average is not None:
            _set(self.parameters, self.average.values)
        else:
            eval_mode(self.optimizer)

    def hide_average(self) -> None:
        """The optimizer trains again; the weights that it trains are restored by the caller."""
        if self.average is None:
            train_mode(self.optimizer)  # gives those weights but for rounding

    @torch.no_grad()
    def limit_what_is_averaged(self, limit: Callable[[], None]) -> None:
        """The average that a schedule-free optimizer keeps is within the limit, and so is the point that it moves.

        The weights that train lie between the two; a limit put on them alone would leave both beyond it.
        """
        eval_mode(self.optimizer)
        limit()
        average = _copies(self.parameters)
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        moving = [(p, state["z"]) for p, state in zip(self.parameters, states, strict=True) if "z" in state]
        for parameter, point in moving:
            parameter.copy_(point)
        limit()
        for parameter, point in moving:
            point.copy_(parameter)
        _set(self.parameters, average)
        train_mode(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "class": type(self.optimizer).__name__,
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "over": self.over,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        here = type(self.optimizer).__name__
        if state["class"] != here:
            raise ConfigError(
                f"training.resume: the checkpoint holds the state of {state['class']}, but here {here} is used; "
                "go on where the run began, or start anew in another output.folder"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.over = state["over"]


class Optimization:
    """The optimizer, its learning rates, clipping and averages, over all trained weights.

    A step is: `begin`, backward passes, `average_gradients`, `clip`, `apply` where all is finite, `end`.
    `notes` says in a line each what is not as asked for. Raises ConfigError for settings that cannot train.
    """

    notes: tuple[str, ...]

    def __init__(
        self,
        section: OptimizerSection,
        tokens: TokensSection,
        ema_decay: float,
        weights: Sequence[TrainedWeight],
        steps: int,
    ) -> None:
        self._section = section
        factory, self.notes = choose_optimizer(section, weights[0].parameter.device)
        found: dict[tuple[str, float, bool, Span], list[nn.Parameter]] = {}
        active = spans(tokens, steps)
        self.parameters: list[nn.Parameter] = []
        """All that train in any step, in the order of `weights`."""
        self.limit: Callable[[], None] = lambda: None
        """Puts all weights within their bounds: called after each step, and where an average takes their place."""
        for weight, rate in zip(weights, full_rates(section, tokens, weights), strict=True):
            span = active.get(TOKENS if weight.component == TOKENS else ADAPTER)
            if span is None or rate == 0:
                weight.parameter.requires_grad_(False)
                continue
            self.parameters.append(weight.parameter)
            found.setdefault((weight.component, rate, weight.decays, span), []).append(weight.parameter)
        self._groups: list[_Group] = []
        for (component, rate, decays, span), members in found.items():
            settings = {"params": members, "lr": rate, **({} if decays else {"weight_decay": 0.0})}
            average = MovingAverage(members, ema_decay) if ema_decay > 0 else None
            self._groups.append(_Group(component, rate, span, members, factory([settings]), average))
        self._check_every_step_trains(steps)
        self.begin(0)

    def _check_every_step_trains(self, steps: int) -> None:
        changes = {0, *(step for group in self._groups for step in group.span if step < steps)}
        for step in sorted(changes):
            if not any(group.trains(step) for group in self._groups):
                raise ConfigError(
                    f"optimizer.learning_rates: from step {step} on nothing is trained; give some layers a rate above 0"
                )

    def begin(self, step: int) -> None:
        """Learning rates are those of `step`; only what trains in it takes gradients, the rest holds still.

        What has trained before holds still as averaged.
        """
        ended = [group for group in self._groups if step >= group.span[1] and not group.over]
        if self._show(ended):
            self.limit()
        for group in ended:
            group.over = True
        for group in self._groups:
            group.begin(step, self._factor(group, step))
        self._training = [group for group in self._groups if group.trains(step)]

    def _factor(self, group: _Group, step: int) -> float:
        first, last = group.span
        return rate_factor(self._section, step - first, last - first) if group.trains(step) else 0.0

    def learning_rate(self, step: int) -> float:
        """Return the learning rate in `step` of the first weights that train in it.

        Times the step size that the optimizer has estimated so far, where it does so (Prodigy).
        """
        group = next(group for group in self._groups if group.trains(step))
        estimated = step_size(group.optimizer)
        return group.rate * self._factor(group, step) * (1.0 if estimated is None else estimated)

    def _trained_now(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters if parameter.requires_grad]

    def average_gradients(self, accelerator: Accelerator) -> None:
        """Every process has the mean of all processes' gradients; a missing gradient counts as zero."""
        if accelerator.num_processes == 1:
            return
        parameters = self._trained_now()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat: torch.Tensor = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def clip(self, scaler: torch.amp.GradScaler) -> float:
        """The gradients are unscaled, their joint norm at most clip_norm (0: as it was); returns the norm before.

        Infinite or NaN where a gradient is: `apply` is not to be called then.
        """
        for group in self._with_gradients():
            scaler.unscale_(group.optimizer)
        bound = self._section.clip_norm if self._section.clip_norm > 0 else math.inf
        return float(nn.utils.clip_grad_norm_(self._trained_now(), bound))

    def apply(self, scaler: torch.amp.GradScaler) -> None:
        """The weights have taken their step, are within their limit, and count in the average."""
        for group in self._with_gradients():
            scaler.step(group.optimizer)
        self._limit_training()
        for group in self._training:
            if group.average is not None:
                group.average.update(group.parameters)

    def _limit_training(self) -> None:
        words = [g for g in self._training if g.component == TOKENS and averages_itself(g.optimizer)]
        for group in words:
            group.limit_what_is_averaged(self.limit)
        if not words:
            self.limit()

    def _with_gradients(self) -> list[_Group]:
        """Return what can take a step; a scaler refuses optimizers without any gradient."""
        return [group for group in self._training if any(p.grad is not None for p in group.parameters)]

    def end(self, scaler: torch.amp.GradScaler) -> None:
        """No weight has a gradient, and the loss scale follows what `clip` found."""
        if self._with_gradients():  # a scaler that has unscaled nothing refuses to be updated
            scaler.update()
        for parameter in self.parameters:
            parameter.grad = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are those that are saved, validated and sampled; afterwards as before, to the bit.

        The moving average, or the point at which a schedule-free optimizer is to be judged, or simply the weights.
        """
        kept = _copies(self.parameters) if any(group.has_average for group in self._groups) else []
        shown = self._show(self._groups)
        try:
            if shown:
                self.limit()
            yield
        finally:
            for group in shown:
                group.hide_average()
            _set(self.parameters if shown else [], kept)

    def _show(self, groups: Sequence[_Group]) -> list[_Group]:
        """Of groups that have an average the weights are that; returns those."""
        shown = [group for group in groups if group.has_average]
        for group in shown:
            group.show_average()
        return shown

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes but the weights themselves, in types that torch.load reads with weights_only."""
        return {"groups": [group.state_dict() for group in self._groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All stands where `state_dict` was called; the weights are restored by the caller, before or after.

        Raises ConfigError for the state of another optimizer.
        """
        for group, saved in zip(self._groups, state["groups"], strict=True):
            group.load_state_dict(saved)


def _copies(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def _set(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)

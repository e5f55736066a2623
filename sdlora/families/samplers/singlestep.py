"""DPM-Solver's single steps (Lu et al. 2022), and DPM fast, which deals its evaluations out to them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from sdlora.families.samplers.sigmas import sigma_table, sigmas_of, timesteps_at

_SHARES = {1: (0.0,), 2: (0.0, 1 / 2), 3: (0.0, 1 / 3, 2 / 3)}
"""Order -> which shares of the way down, in the logarithm of the level, its evaluations are made at."""


@dataclass(frozen=True)
class SingleStep:
    """A step of DPM-Solver-1, -2 or -3 (Lu et al. 2022, eq. 3.7, algorithms 1 and 2), in x / alpha."""

    start: float
    down: float
    """The level to which the solver leads."""
    end: float
    """The level up to which noise leads from there."""
    order: int

    @property
    def levels(self) -> tuple[float, ...]:
        """The level of each of its evaluations, as many as its order."""
        return tuple(self.start * (self.down / self.start) ** share for share in _SHARES[self.order])

    def reached(self, x: torch.Tensor, slopes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what x becomes by the slopes dx / dsigma so far: at the level of the next evaluation, or behind the last, below.

        A step in eps, whose h is log(start / level), is one in sigma: level * (exp(h) - 1) = start - level.
        """
        number = len(slopes)
        to = (*self.levels, self.down)[number]
        if number == 1:
            return x + (to - self.start) * slopes[0]
        shares = (*_SHARES[self.order], 1.0)
        if self.order == 2:
            return self._second_order(x, slopes[0], slopes[1], shares[1])
        bend = (self.start - to) / math.log(self.start / to) - to
        turned = (slopes[-1] - slopes[0]) * shares[number] / shares[number - 1]
        return x + (to - self.start) * slopes[0] - bend * turned

    def lower(self, x: torch.Tensor, slopes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what second order makes of the first two slopes of a step of third: the other result of DPM-Solver-23."""
        return self._second_order(x, slopes[0], slopes[1], _SHARES[3][1])

    def _second_order(self, x: torch.Tensor, first: torch.Tensor, then: torch.Tensor, share: float) -> torch.Tensor:
        return x + (self.down - self.start) * (first + (then - first) / (2 * share))


def single_step(start: float, end: float, order: int, lowest: float, eta: float) -> SingleStep:
    """Return the step between two levels with `eta` times the noise of a reverse diffusion, as k-diffusion has it.

    It leads to no level below the `lowest`, so the last one has no noise.
    """
    up = min(end, eta * math.sqrt(end**2 * (start**2 - end**2) / start**2))
    return SingleStep(start, max(math.sqrt(end**2 - up**2), lowest), end, order)


def fast_steps(high: float, low: float, evaluations: int, eta: float) -> Iterator[SingleStep]:
    """Yield the steps of DPM-Solver-fast (Lu et al. 2022, section 3.4), each the same share of its level long.

    They are of third order, and the last of what is left of so many evaluations: 1, 2, or 2 and then 1.
    """
    threes, left = divmod(evaluations, 3)
    orders = [3] * threes + [left] if left else [3] * (threes - 1) + [2, 1]
    levels = np.geomspace(high, low, len(orders) + 1).tolist()
    levels[0], levels[-1] = high, low
    for start, end, order in zip(levels, levels[1:], orders, strict=False):
        yield single_step(start, end, order, low, eta)


class SinglestepScheduler(EulerDiscreteScheduler, ABC):
    """Begins where the schedule Uniform does, partway too, and goes down to the lowest level that the base was trained at.

    So much noise stays. With `eta` 1, as AUTOMATIC1111 runs both samplers of this kind, noise is drawn in every step.
    """

    timesteps: Any

    def __init__(self, *, eta: float = 1.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.register_to_config(eta=eta)

    def set_timesteps(self, num_inference_steps: int, device: Any = None, *arguments: Any, **options: Any) -> None:
        """The sampler is set to so many steps."""
        super().set_timesteps(num_inference_steps, device, *arguments, **options)
        self._training = sigmas_of(self.alphas_cumprod.cpu().numpy())
        self._levels = sigma_table("Uniform", num_inference_steps, self._training)
        self._begin(self._levels)

    def keep_last(self, run: int) -> None:
        """Of the steps the last `run` alone are left."""
        self._begin(self._levels[-run:])

    @abstractmethod
    def _begin(self, levels: np.ndarray) -> None:
        """The sampler is where the first of these levels of Uniform is, with so many steps to run."""

    def _timesteps_at(self, levels: Sequence[float] | np.ndarray) -> torch.Tensor:
        return torch.from_numpy(timesteps_at(levels, self._training)).to(self.timesteps.device)

    def _slope(self, predicted: torch.Tensor, noisy: torch.Tensor, sigma: float) -> torch.Tensor:
        """Return dx / dsigma, which is the noise in x."""
        if self.config.prediction_type == "v_prediction":
            return predicted / (sigma**2 + 1) ** 0.5 + noisy * sigma / (sigma**2 + 1)
        return predicted


class DPMFastScheduler(SinglestepScheduler):
    """DPM-Solver-fast: of so many steps each is an evaluation."""

    def _begin(self, levels: np.ndarray) -> None:
        low = float(self._training[0])
        steps = list(fast_steps(float(levels[0]), low, len(levels), self.config.eta))
        evaluated = [level for step in steps for level in step.levels]
        self.sigmas = torch.tensor([*evaluated, low], dtype=torch.float32)
        self.timesteps = self._timesteps_at(evaluated)
        self._steps = steps
        self._slopes: list[torch.Tensor] = []

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Return (latents,) behind this evaluation; a step's noise is drawn behind its last."""
        if self.step_index is None:
            self._init_step_index(timestep)
        step, noisy = self._steps[0], sample.float()
        if not self._slopes:
            self._begun = noisy
        self._slopes.append(self._slope(model_output.float(), noisy, step.levels[len(self._slopes)]))
        latents = step.reached(self._begun, self._slopes)
        if len(self._slopes) == step.order:
            latents = with_noise(latents, step, generator)
            self._steps, self._slopes = self._steps[1:], []
        self._step_index += 1
        return (latents.to(sample.dtype),)


def with_noise(
    latents: torch.Tensor, step: SingleStep, generator: torch.Generator | list[torch.Generator] | None
) -> torch.Tensor:
    """Return the latents with the noise in which a step ends."""
    if step.end == step.down:
        return latents
    noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    return latents + noise * math.sqrt(step.end**2 - step.down**2)

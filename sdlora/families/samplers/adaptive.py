"""DPM adaptive: DPM-Solver-23, whose steps are as long as the picture allows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from sdlora.errors import GenerationError
from sdlora.families.samplers.singlestep import SingleStep, SinglestepScheduler, single_step, with_noise

_FIRST_STEP = 0.05
"""In the logarithm of the level, as all step sizes here."""
_RELATIVE, _ABSOLUTE = 0.05, 0.0078
"""By how much two results may differ: the tolerances of Lu et al. (2022), the latter of pictures in [-1,1]."""
_SAFETY = 0.81
"""A step stays where the next one is to be no less than this share of it."""
_NEAR = 1e-5
"""So near to the lowest level it has arrived."""
_SHORTEST = 1e-7
"""A step that is to be shorter than this leads nowhere."""


class DPMAdaptiveScheduler(SinglestepScheduler):
    """DPM-Solver-23 (Lu et al. 2022, appendix C), with the step sizes that k-diffusion's controller has by default.

    How many steps it makes is known at the end, so it tells one evaluation at a time. `timesteps` are those of the
    schedule Uniform: where it begins, and into how many parts its way is divided for what changes with the steps. The
    error is that of the whole tensor: give it one picture.
    """

    next_timestep: torch.Tensor | None = None
    """Of the evaluation that is to be made now, [] float32; None: there is none any more."""

    def _begin(self, levels: np.ndarray) -> None:
        self._highest, self._lowest = float(levels[0]), float(self._training[0])
        self.timesteps = self._timesteps_at(levels)
        self._size, self._slopes = _FIRST_STEP, list[torch.Tensor]()
        self._before: torch.Tensor | None = None
        self._go_on(self._highest)
        self._expect(self._highest)

    @property
    def share_done(self) -> float:
        """How much of the way down is done, in the logarithm of the level; it is the same in all evaluations of a step."""
        if self.next_timestep is None:
            return 1.0
        return math.log(self._highest / self._step.start) / math.log(self._highest / self._lowest)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Return (latents,) for the next evaluation; a step's noise is drawn where the step stays."""
        if self.step_index is None:
            self._init_step_index(timestep)
        noisy = sample.float()
        if not self._slopes:
            self._begun = noisy
        self._slopes.append(self._slope(model_output.float(), noisy, self._step.levels[len(self._slopes)]))
        if len(self._slopes) == self._step.order and self._stays():
            latents = with_noise(self._step.reached(self._begun, self._slopes), self._step, generator)
            self._slopes = []
            self._go_on(self._step.end)
            self._expect(self._step.start)
        else:
            latents = self._step.reached(self._begun, self._slopes)
            self._expect(self._step.levels[len(self._slopes)])
        return (latents.to(sample.dtype),)

    def _stays(self) -> bool:
        """The size of the next step is that which this one's error allows; where this one was too long, it is planned anew.

        Its first evaluation still holds then. Sizes change by the root of the error whose order the solver is of, 1.5 where
        there is noise, and not by much at once.
        """
        high, low = self._step.reached(self._begun, self._slopes), self._step.lower(self._begun, self._slopes)
        before = self._begun if self._before is None else self._before
        allowed = (_RELATIVE * torch.maximum(low.abs(), before.abs())).clamp(min=_ABSOLUTE)
        error = ((low - high) / allowed).square().mean().sqrt().item()
        order = 1.5 if self.config.eta else self._step.order
        factor = 1 + math.atan((error + 1e-8) ** (-1 / order) - 1)
        self._size *= factor
        if factor >= _SAFETY:
            self._before = low
            return True
        self._slopes = self._slopes[:1]
        self._go_on(self._step.start)
        return False

    def _go_on(self, level: float) -> None:
        """A step of the present size is planned from that level, with the lowest as its end where that is nearer.

        Raises GenerationError where no step is short enough for what the UNet gives.
        """
        if self._size < _SHORTEST:
            raise GenerationError(
                "the sampler DPM adaptive finds no step short enough, since the UNet gives too large numbers; use a lower "
                "guidance scale or adapter weight, or another sampler"
            )
        end = max(level * math.exp(-self._size), self._lowest)
        self._step: SingleStep = single_step(level, end, 3, self._lowest, self.config.eta)

    def _expect(self, level: float) -> None:
        """The next evaluation is one at that level; where that is the lowest, there is none."""
        arrived = math.log(level / self._lowest) <= _NEAR
        self.sigmas = torch.tensor([level], dtype=torch.float32)
        self.next_timestep = None if arrived else self._timesteps_at([level])[0]

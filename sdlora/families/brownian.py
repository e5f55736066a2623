"""DPM++ SDE with noise that is each picture's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DPMSolverSDEScheduler
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler


class SeededSdeScheduler(DPMSolverSDEScheduler):
    """Takes each picture's noise from a Brownian tree of its own seed, drawn on the CPU whatever device computes.

    So a picture is the same in any batch and on any device, and has the noise that AUTOMATIC1111 draws on a CPU.
    """

    noise_sampler: Any

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, generator: Any = None, **options: Any
    ) -> Any:
        """Return the next latents; of the generators, one a picture, the seeds alone count."""
        if self.noise_sampler is None and generator is not None:
            generators = generator if isinstance(generator, list) else [generator]
            self.noise_sampler = self._tree(sample, [one.initial_seed() for one in generators])
        return super().step(model_output, timestep, sample, **options)

    def _tree(self, sample: torch.Tensor, seeds: list[int]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        low, high = self.sigmas[self.sigmas > 0].min().item(), self.sigmas.max().item()
        like = torch.zeros(sample.shape, dtype=torch.float32)
        tree = BrownianTreeNoiseSampler(like, low, high, seeds)

        def noise(sigma: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Should have t[ab]", UserWarning)  # by a rounding: the end is taken
                return tree(sigma.cpu(), following.cpu()).to(sample)

        return noise


SeededSdeScheduler.__name__ = DPMSolverSDEScheduler.__name__  # by which recipes call it

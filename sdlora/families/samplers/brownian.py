"""Samplers whose noise is each picture's own: drawn from a Brownian tree of its seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, DPMSolverSDEScheduler
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

Noise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From the levels that a step leads from and to, to its noise [B,4,h,w] of variance 1."""


class SeededSdeScheduler(DPMSolverSDEScheduler):
    """Takes each picture's noise from a tree; of the generators, one a picture, the seeds alone count.

    So a picture is the same in any batch and on any device, and has the noise that AUTOMATIC1111 draws on a CPU.
    """

    noise_sampler: Any
    draws_from_trees = True

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, generator: Any = None, **options: Any
    ) -> Any:
        """Return the next latents."""
        if self.noise_sampler is None and generator is not None:
            self.noise_sampler = noise_of_trees(self.sigmas, sample, generator)
        return super().step(model_output, timestep, sample, **options)


class SeededMultistepScheduler(DPMSolverMultistepScheduler):
    """DPM++ 2M SDE and 3M SDE with the noise of trees, likewise."""

    draws_from_trees = True
    _noise: Noise | None = None

    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        """The sampler is set to so many steps, and the next picture has trees of its own."""
        super().set_timesteps(*arguments, **options)
        self._noise = None

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, generator: Any = None, **options: Any
    ) -> Any:
        """Return the next latents. The step that ends in the picture has no noise."""
        if generator is not None:
            if self._noise is None:
                self._noise = noise_of_trees(self.sigmas, sample, generator)
            if self.step_index is None:
                self._init_step_index(timestep)
            sigma, following = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
            options["variance_noise"] = self._noise(sigma, following) if following > 0 else torch.zeros_like(sample)
        return super().step(model_output, timestep, sample, **options)

    def multistep_dpm_solver_third_order_update(
        self, model_output_list: list[torch.Tensor], *, sample: torch.Tensor, noise: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Return the latents that third order leads to, as k-diffusion has it.

        With u = 2 h the second difference counts 1/2 - (u - 1 + exp(-u)) / u^2, which goes to 0 with h; diffusers has
        -1/2 in place of 1/2.
        """
        levels = self.sigmas[self.step_index - 2 : self.step_index + 2]
        earlier, before, h = levels.log().diff().neg()
        now, last, first = reversed(model_output_list[-3:])
        slope, slope_before = (now - last) * h / before, (last - first) * h / earlier
        bend = (slope - slope_before) * h / (before + earlier)
        slope = slope + bend * before / h
        u = 2 * h
        share = -torch.expm1(-u)
        target = share * now + (1 - share / u) * slope + (0.5 - (u - share) / u**2) * bend
        kept = torch.exp(-h) * levels[3] / levels[2]
        signal_before, signal = 1 / (1 + levels[2:] ** 2).sqrt()
        return signal * (kept * sample / signal_before + target + levels[3] * share.sqrt() * noise)


def noise_of_trees(
    sigmas: torch.Tensor, like: torch.Tensor, generators: torch.Generator | Sequence[torch.Generator]
) -> Noise:
    """Return the noise of trees over the levels of a sampler, one of each generator's seed, drawn on the CPU."""
    seeds = [one.initial_seed() for one in ([generators] if isinstance(generators, torch.Generator) else generators)]
    trees: list[BrownianTreeNoiseSampler] = []

    def noise(sigma: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        if not trees:  # a single step, which needs none, has levels for none
            low, high = sigmas[sigmas > 0].min().item(), sigmas.max().item()
            blank = torch.zeros(like.shape, dtype=torch.float32)
            trees.append(BrownianTreeNoiseSampler(blank, low, high, seeds))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Should have t[ab]", UserWarning)  # by a rounding: the end is taken
            drawn: torch.Tensor = trees[0](sigma.cpu(), following.cpu())
        return drawn.to(like.device)

    return noise


# By which bases and recipes call them.
SeededSdeScheduler.__name__ = DPMSolverSDEScheduler.__name__
SeededMultistepScheduler.__name__ = DPMSolverMultistepScheduler.__name__

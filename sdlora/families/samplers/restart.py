"""Restart: Heun's steps down, then from little noise up again and down once more (Xu et al. 2023)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import HeunDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from sdlora.families.samplers.sigmas import sigma_table, sigmas_of, timesteps_at

_LOW, _HIGH = 0.1, 2.0
"""Between which levels it is done again, as AUTOMATIC1111 has it."""
_FEWEST, _FEWEST_TWICE = 20, 36
"""Steps from which on it is done once, and twice."""
_STEPS_ONCE = 9


class RestartScheduler(HeunDiscreteScheduler):
    """Heun's method (Karras et al. 2022, algorithm 1) over a list of steps, each with both its levels.

    Where one begins at more noise than the one before has ended, that noise is drawn in between.
    """

    timesteps: Any

    def set_timesteps(self, num_inference_steps: int, device: Any = None, *arguments: Any, **options: Any) -> None:
        """The sampler is set to so many steps, those after restarts counted."""
        super().set_timesteps(num_inference_steps, device, *arguments, **options)
        self._levels = self.sigmas[::2].double().numpy()
        self._plan(self._levels)

    def keep_last(self, run: int) -> None:
        """Of the levels the last `run` alone are left, and restarts are as many as befit so many steps."""
        self._plan(self._levels[-run:])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Return (latents, denoised) behind this evaluation, with a restart's noise where one is next."""
        latents, denoised = super().step(model_output, timestep, sample, return_dict=False)
        now, following = self.sigmas[self.step_index - 1 : self.step_index + 1].tolist()
        if self.state_in_first_order and following > now:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            latents = latents + noise * (following**2 - now**2) ** 0.5
        return latents, denoised

    def _plan(self, levels: np.ndarray) -> None:
        steps = np.array(list(restart_steps(levels)))
        self.sigmas = torch.from_numpy(steps.flatten().astype(np.float32))
        training = sigmas_of(self.alphas_cumprod.cpu().numpy())
        evaluated = steps.flatten()[:-1]  # nothing is evaluated where there is no noise
        self.timesteps = torch.from_numpy(timesteps_at(evaluated, training)).to(self.timesteps.device)


def restart_steps(levels: np.ndarray) -> Iterator[tuple[float, float]]:
    """Yield (from, to) of each step, as many as there are falling levels; the last ends at 0.

    With 20 steps and more, fewer go down the levels, which are then Karras' between the same ends. Having reached the
    one nearest to 0.1 they go down from the one nearest to 2 once more: once in 9 steps, or from 36 steps on twice,
    each time in a quarter of all steps. Levels that begin below 0.1 are gone down just once, in fewer steps.
    """
    count = len(levels)
    times, length = (0, 0) if count < _FEWEST else (1, _STEPS_ONCE) if count < _FEWEST_TWICE else (2, count // 4)
    if times:
        levels = _karras(count - times * length, levels[0], levels[-1])
    low, high = (int(np.abs(levels - level).argmin()) for level in (_LOW, _HIGH))
    for number, step in enumerate(itertools.pairwise([*levels.tolist(), 0.0]), start=1):
        yield step
        if number == low and high < low:
            for _ in range(times):
                yield from itertools.pairwise(_karras(length + 1, levels[high], levels[low]).tolist())


def _karras(count: int, high: float, low: float) -> np.ndarray:
    """Return Karras' levels with exactly these ends."""
    levels = sigma_table("Karras", count, np.array([low, high]))
    levels[0], levels[-1] = high, low
    return levels

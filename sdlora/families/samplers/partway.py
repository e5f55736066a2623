"""A sampler in the middle of its steps: where it begins there, and pictures with as much noise as it stands at."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import KDPM2AncestralDiscreteScheduler, LMSDiscreteScheduler, PNDMScheduler


def last_steps(made: Any, steps: int, run: int) -> torch.Tensor:
    """Return the timesteps of the last `run` of the `steps` that the sampler was set to, with which it now begins."""
    timesteps: torch.Tensor = made.timesteps
    run = min(run, steps)
    if isinstance(made, PNDMScheduler) and made.config.skip_prk_steps and run:
        # The first of its steps has two evaluations, at the level of the second too, wherever it begins.
        levels = torch.cat([timesteps[:1], timesteps[2:]])[-run:]
        return torch.cat([levels[:2], levels[1:]])
    if hasattr(made, "keep_last") and 0 < run < steps:
        made.keep_last(run)
        made.set_begin_index(0)
        kept: torch.Tensor = made.timesteps
        return kept
    first = (steps - run) * made.order
    if isinstance(made, LMSDiscreteScheduler):
        # It takes its place in the list for the number of slopes that it has seen.
        made.sigmas = made.sigmas[first:]
        made.set_begin_index(0)
    elif hasattr(made, "set_begin_index"):
        made.set_begin_index(first)
    return timesteps[first:] if run else timesteps[:0]


def levels_fall(made: Any) -> bool:
    """Return whether the sampler can make the steps it was set to: multistep solvers divide by how far each leads."""
    if not type(made).__name__.endswith("MultistepScheduler"):
        return True
    falling: torch.Tensor = made.sigmas.diff() < 0
    return bool(falling.all())


def as_noisy(made: Any, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Return clean latents with the noise at which the sampler's next evaluation, at that timestep [1], is made."""
    level = _half_way(made)
    if level is None:
        noisy: torch.Tensor = made.add_noise(latents, noise, timestep)
        return noisy
    return latents + noise * level.to(latents)


def _half_way(made: Any) -> torch.Tensor | None:
    """Return the level of a step's second evaluation where that is next and no level of the sampler's list, else None."""
    if getattr(made, "state_in_first_order", True):
        return None
    if hasattr(made, "sigmas_interpol"):  # of DPM2 and its like, whose lists do not begin alike
        place = made.step_index - isinstance(made, KDPM2AncestralDiscreteScheduler)
        level: torch.Tensor = made.sigmas_interpol[place]
        return level
    return getattr(made, "mid_point_sigma", None)

"""Where denoising begins, and what it keeps of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sdlora.families.samplers.partway import as_noisy, last_steps


@dataclass(frozen=True)
class Start:
    """The latents that denoising begins with, in place of noise alone, and what of them stays."""

    latents: torch.Tensor
    """[B,4,h,w], without noise."""
    steps: int
    """So many of a sampler's steps run, the last ones."""
    anew: torch.Tensor | None = None
    """[B,1,h,w]: 1 where a latent is made anew, 0 where it stays; None: all are."""
    from_noise: bool = False
    """Whether what is made anew begins at noise alone, as without a picture."""

    def begun(self, scheduler: Any, noise: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the noisy latents, and the timesteps that are to run of those that were set for `steps` steps."""
        timesteps = last_steps(scheduler, steps, self.steps)
        if not self.steps:
            return self.latents, timesteps
        if self.from_noise:
            return noise * scheduler.init_noise_sigma, timesteps
        return scheduler.add_noise(self.latents, noise, timesteps[:1].repeat(len(noise))), timesteps

    def kept(self, scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """Return the latents with what stays put back, as noisy as the evaluation that follows expects; [0] timesteps: none does."""
        if self.anew is None:
            return latents
        own = as_noisy(scheduler, self.latents, noise, following[:1]) if len(following) else self.latents
        return ((1 - self.anew) * own + self.anew * latents).to(latents.dtype)

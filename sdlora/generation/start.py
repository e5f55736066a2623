"""Where denoising begins: at pictures in latents, for all pictures of a batch together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdlora.families.samplers.partway import as_noisy, last_steps
from sdlora.generation.besides import Masked
from sdlora.generation.inpaint import Canvas, covered, latent_mask
from sdlora.generation.request import MaskedContent
from sdlora.generation.vae import Vae


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


def steps_run(steps: int, strength: float) -> int:
    """Return how many of `steps` steps run at a strength, as in diffusers' pipelines."""
    return min(int(steps * strength), steps)


def start_at(
    vaes: Sequence[Vae],
    canvases: Sequence[Canvas],
    contents: Sequence[MaskedContent],
    generators: Sequence[torch.Generator],
    dtype: torch.dtype,
    *,
    steps: int,
    from_noise: bool,
    keeps: bool = True,
) -> Start:
    """Return the start at these pictures, of which the last `steps` steps run.

    Each is drawn from the VAE's posterior by its own generator. `from_noise` counts where there are masks: what is made
    anew begins at noise alone. Unless it `keeps` what they do not cover, that is left to the UNet, which is shown it.
    """
    drawn = zip(vaes, canvases, generators, strict=True)
    rows = [vae.encode(pixels_of(canvas.picture), generator) for vae, canvas, generator in drawn]
    latents = torch.cat(rows).to(dtype)
    if canvases[0].mask is None:
        return Start(latents, steps)
    masks = [latent_mask(canvas.mask, vaes[0].factor) for canvas in canvases if canvas.mask is not None]
    anew = torch.cat(masks).to(latents)
    under = [_under_mask(row, content, one) for row, content, one in zip(latents, contents, generators, strict=True)]
    latents = (1 - anew) * latents + anew * torch.stack(under)
    return Start(latents, steps, anew if keeps else None, from_noise)


def masked_pictures(vaes: Sequence[Vae], canvases: Sequence[Canvas | None], size: tuple[int, int]) -> Masked:
    """Return what an inpainting UNet is shown of these pictures, in that width and height; without a mask, grey all over."""
    masks, means, stds = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    width, height = size
    for vae, canvas in zip(vaes, canvases, strict=True):
        if canvas and canvas.mask:
            masks.append(latent_mask(canvas.mask, vae.factor))
            mean, std = vae.posterior(pixels_of(canvas.picture) * ~covered(canvas.mask))
            stds.append(std)
        else:
            masks.append(torch.ones(1, 1, height // vae.factor, width // vae.factor))
            mean, _ = vae.posterior(torch.zeros(1, 3, height, width))
        means.append(mean)
    return Masked(torch.cat(masks), torch.cat(means), torch.cat(stds) if stds else None)


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """Return the picture as the VAE takes it, [1,3,H,W] float32 in [-1,1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255 * 2 - 1


def picture_of(pixels: torch.Tensor) -> Image.Image:
    """Return the picture of pixels [3,H,W] in [0,1]."""
    return Image.fromarray((pixels * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy())


def _under_mask(row: torch.Tensor, content: MaskedContent, generator: torch.Generator) -> torch.Tensor:
    """Return the latents [4,h,w] that are under the mask at first."""
    if content == "latent nothing":
        return torch.zeros_like(row)
    if content == "latent noise":
        return torch.randn(row.shape, generator=generator, device=generator.device).to(row)
    return row

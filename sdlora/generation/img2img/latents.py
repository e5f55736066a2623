"""Pictures and masks as latents, for all pictures of a batch together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from sdlora.generation.denoising.besides import Masked
from sdlora.generation.denoising.start import Start
from sdlora.generation.img2img.inpaint import Canvas, covered, latent_mask
from sdlora.generation.request import MaskedContent
from sdlora.generation.vae import Vae


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

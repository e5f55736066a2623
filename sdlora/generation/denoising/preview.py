"""What latents show, without the VAE: colours by a linear map, one pixel a latent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate

from sdlora.families.base import LoadedBase

_KNOWN_VAE = (128, 256, 512, 512)
"""Widths of the VAE of which a family's map was published."""
_SAMPLES = 12


@dataclass(frozen=True)
class LatentColours:
    """Red, green and blue, -1 to 1, of latents: latents [4] times `factors` [4,3], plus `bias` [3]."""

    factors: torch.Tensor
    bias: torch.Tensor

    def pictures(self, latents: torch.Tensor) -> list[Image.Image]:
        """Return what latents [B,4,h,w] show, pictures of w x h pixels; early in sampling that is noise.

        Noise that a sampler holds at more than the latents' own variance is scaled down to it.
        """
        own = latents.detach().float().cpu()
        own = own / own.std(dim=(1, 2, 3), keepdim=True).clamp(min=1)
        colours = torch.einsum("bchw,cr->bhwr", own, self.factors) + self.bias
        shown = ((colours / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        return [Image.fromarray(row) for row in shown]


def latent_colours(base: LoadedBase) -> LatentColours:
    """Return the family's published map, or for a VAE of another size one that is fitted to what it makes of colours."""
    traits = base.family.traits
    published = LatentColours(torch.tensor(traits.latent_rgb), torch.tensor(traits.latent_rgb_bias))
    return published if tuple(base.vae.config.block_out_channels) == _KNOWN_VAE else _fitted(base) or published


def _fitted(base: LoadedBase) -> LatentColours | None:
    """Return the map that fits best, by least squares, for soft random colours; None where the VAE gives NaN for them."""
    draw = torch.rand(1, 3, _SAMPLES, _SAMPLES, generator=torch.Generator().manual_seed(0)) * 2 - 1
    factor = 2 ** (len(base.vae.config.block_out_channels) - 1)
    pixels = interpolate(draw, scale_factor=2 * factor, mode="nearest")
    latents = base.family.encode_images(base, pixels)[0].cpu()
    if not latents.isfinite().all():
        return None
    known = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1).flatten(2)[0].T
    wanted = avg_pool2d(pixels, factor).flatten(2)[0].T
    solution = torch.linalg.lstsq(known.double(), wanted.double(), driver="gelsd").solution.float()
    return LatentColours(solution[:-1], solution[-1])

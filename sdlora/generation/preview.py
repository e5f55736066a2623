"""What latents show, without the VAE: colours by a linear map, one pixel a latent."""

from __future__ import annotations

import torch
from PIL import Image

from sdlora.families.traits import FamilyTraits


def preview_pictures(traits: FamilyTraits, latents: torch.Tensor) -> list[Image.Image]:
    """Return what latents [B,4,h,w] show, pictures of w x h pixels; early in sampling that is noise.

    Noise that a sampler holds at more than the latents' own variance is scaled down to it.
    """
    own = latents.detach().float()
    own = own / own.std(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    factors = torch.tensor(traits.latent_rgb, device=own.device)
    bias = torch.tensor(traits.latent_rgb_bias, device=own.device)
    colours = torch.einsum("bchw,cr->bhwr", own, factors) + bias
    shown = ((colours / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()
    return [Image.fromarray(row) for row in shown]

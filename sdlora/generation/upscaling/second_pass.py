"""What the second pass begins with: the pictures of the first, enlarged in latents or in pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch.nn.functional import interpolate

from sdlora.families.base import Conditioning, LoadedBase
from sdlora.generation.denoising.loop import PromptRows
from sdlora.generation.denoising.start import Start
from sdlora.generation.encoded import Guide
from sdlora.generation.img2img.latents import picture_of, pixels_of
from sdlora.generation.request import LATENT_UPSCALERS
from sdlora.generation.upscaling.files import read_upscaler
from sdlora.generation.upscaling.hires import Hires
from sdlora.generation.upscaling.upscaler import upscale
from sdlora.generation.vae import Vae
from sdlora.storage import user_path

_LATENT_MODES = dict(zip(LATENT_UPSCALERS, ("bilinear", "nearest-exact", "bicubic"), strict=True))
_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}


def second_start(
    base: LoadedBase, hires: Hires, vaes: Sequence[Vae], latents: torch.Tensor, size: tuple[int, int]
) -> Start:
    """Return the start of the second pass, of that width and height, at the latents of the first."""
    width, height = size
    if mode := _LATENT_MODES.get(hires.upscaler):
        shape = (height // vaes[0].factor, width // vaes[0].factor)
        return Start(interpolate(latents.float(), shape, mode=mode).to(latents.dtype), hires.run_steps)
    rows = []
    for vae, row in zip(vaes, latents, strict=True):
        larger = _enlarged(picture_of(vae.decode(row)), hires.upscaler, size, base.device)
        # The posterior's mean, so that the noise is the seed's first draw whatever enlarges.
        rows.append(vae.encode(pixels_of(larger)))
    return Start(torch.cat(rows).to(latents.dtype), hires.run_steps)


def _enlarged(picture: Image.Image, upscaler: str, size: tuple[int, int], device: torch.device) -> Image.Image:
    if upscaler in _FILTERS:
        return picture.resize(size, _FILTERS[upscaler])
    larger = upscale(read_upscaler(user_path(upscaler)), picture, device)
    return larger.resize(size, Image.Resampling.LANCZOS)


class AtTheEnd:
    """Prompts that are at each step what they are at the last one of a plan: in a second pass nothing changes any more."""

    def __init__(self, prompts: PromptRows, steps: int) -> None:
        self._prompts = prompts
        self._steps = steps

    @property
    def dtype(self) -> torch.dtype:
        """What the latents are computed in."""
        return self._prompts.dtype

    def step(self, step: int) -> int:
        """Return the last step of the plan."""
        return self._steps

    def guides(self, step: int, guided: bool) -> list[Guide]:
        """Return the rows of the UNet's batch."""
        return self._prompts.guides(step, guided)

    def rows(self, guides: Sequence[Guide]) -> Conditioning:
        """Return their conditioning."""
        return self._prompts.rows(guides)

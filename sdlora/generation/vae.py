"""Between pictures and latents: in tiles where memory asks for it, again in float32 where the VAE overflows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sdlora.errors import GenerationError
from sdlora.families.base import LoadedBase
from sdlora.generation.request import Tiling
from sdlora.generation.what_ran import PRECISION_NAMES

_TILED_ABOVE_PIXELS = 1536 * 1536
_FLAT = 1e-3
"""A standard deviation of latents below which they are all the same."""


class Vae:
    """The VAE of a base at work for one picture; what befell it is noted.

    Its weights, precision and settings are as before after each call, whatever happens inside.
    """

    def __init__(self, base: LoadedBase, tiling: Tiling, prompt: str, most_pixels: int = 0) -> None:
        """`most_pixels` are those of the largest of several passes, so that all of them are in tiles or none."""
        self._base = base
        self._prompt = prompt
        self._tiling: Tiling = "on" if tiling == "auto" and most_pixels > _TILED_ABOVE_PIXELS else tiling
        self.tiled = False
        """Whether it worked in tiles."""
        self.notes: list[str] = []

    @property
    def factor(self) -> int:
        """How many pixels a latent is wide."""
        return int(2 ** (len(self._base.vae.config.block_out_channels) - 1))

    def encode(self, pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Return scaled latents [1,4,h,w] of pixels [1,3,H,W] in [-1,1]: drawn by the generator, without one the mean.

        Raises GenerationError as `posterior` does.
        """
        mean, std = self.posterior(pixels)
        if generator is None:
            return mean
        return mean + std * torch.randn(mean.shape, generator=generator, device=generator.device).to(std)

    def posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and std of the scaled latents, each [1,4,h,w], of pixels [1,3,H,W] in [-1,1].

        Raises GenerationError where they are NaN in float32 too, or memory is too small for tiles as well.
        """

        def means_and_stds() -> torch.Tensor:
            # Under autocast a VAE that is kept in float32 because it overflows would overflow again.
            with torch.autocast(self._base.device.type, enabled=False):
                return torch.stack(self._base.family.encode_images(self._base, pixels))

        mean, std = self._run(means_and_stds, pixels.shape[-2] * pixels.shape[-1])
        return mean, std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return pixels [3,H,W] in [0,1] of scaled latents [4,h,w]. Raises GenerationError as `encode` does."""
        pixels = latents.shape[-2] * latents.shape[-1] * self.factor**2
        picture = self._run(lambda: self._base.family.decode_latents(self._base, latents[None])[0], pixels)
        if _one_colour(picture):
            of_unet = float(latents.float().std(dim=(-2, -1)).max()) < _FLAT
            blame = "the UNet's latents are as even" if of_unet else "the VAE made it so of latents that are not"
            self.notes.append(f"the picture for {self._prompt!r} is of one colour: {blame}")
        return picture

    def _run(self, compute: Callable[[], torch.Tensor], pixels: int) -> torch.Tensor:
        result = self._fitting(compute, pixels)
        if result.isfinite().all():
            return result
        if (dtype := self._base.vae.dtype) != torch.float32:
            with _in_float32(self._base):
                result = self._fitting(compute, pixels)
            if result.isfinite().all():
                self.notes.append(f"the VAE gave NaN in {PRECISION_NAMES[dtype]} and was run again in fp32")
                return result
        raise GenerationError(
            f"the VAE gave NaN for {self._prompt!r}, in fp32 too; its weights or the picture may be damaged, use others"
        )

    def _fitting(self, compute: Callable[[], torch.Tensor], pixels: int) -> torch.Tensor:
        """Return the result, computed in tiles where that is asked for or the memory is too small without."""
        if self._tiling == "on" or self.tiled or (self._tiling == "auto" and pixels > _TILED_ABOVE_PIXELS):
            return self._in_tiles(compute)
        try:
            return compute()
        except torch.OutOfMemoryError:
            if self._tiling == "off":
                raise
        if self._base.device.type == "cuda":  # out of the handler, whose traceback holds the memory
            torch.cuda.empty_cache()
        return self._in_tiles(compute)

    def _in_tiles(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.tiled = True
        with _tiling(self._base):
            return compute()


@contextmanager
def _tiling(base: LoadedBase) -> Iterator[None]:
    before = base.vae.use_tiling
    base.vae.enable_tiling()
    try:
        yield
    finally:
        base.vae.use_tiling = before


@contextmanager
def _in_float32(base: LoadedBase) -> Iterator[None]:
    """Inside, the VAE computes in float32; afterwards its weights are bit for bit as before, since widening loses nothing."""
    before = base.vae.dtype
    base.vae.to(torch.float32)
    try:
        yield
    finally:
        base.vae.to(before)


def _one_colour(picture: torch.Tensor) -> bool:
    low, high = picture.amin(dim=(-2, -1)), picture.amax(dim=(-2, -1))
    return bool(((high - low) < 1 / 255).all())

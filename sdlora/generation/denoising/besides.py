"""What the UNet is given besides noisy latents and prompts."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdlora.families.base import Conditioning, LoadedBase, PictureSize, Residuals
from sdlora.generation.denoising.noise import drawing_noise


@dataclass(frozen=True)
class Rows:
    """A batch for the UNet."""

    inputs: torch.Tensor
    """Noisy latents as the sampler scales them, [R,4,h,w]."""
    timestep: torch.Tensor
    conditioning: Conditioning
    sizes: Sequence[PictureSize]
    pictures: Sequence[int]
    """The number of the picture that each row belongs to."""
    span: tuple[float, float] = (0.0, 1.0)
    """Which part of the pass's evaluations this one is, as shares of them."""


Predict = Callable[[Rows], torch.Tensor]
"""Returns the UNet's output for a batch, [R,4,h,w]."""


@dataclass(frozen=True)
class Masked:
    """What an inpainting UNet is shown of the pictures of a batch."""

    masks: torch.Tensor
    """[B,1,h,w]: 1 where a latent is made anew, else 0."""
    means: torch.Tensor
    """[B,4,h,w]: the scaled latents of the pictures, grey under their masks."""
    stds: torch.Tensor | None = None
    """Of the VAE's posterior, which is drawn from; None: its mean is taken."""

    def drawn(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Return what is shown, [B,5,h,w], each picture's latents drawn by its own generator."""
        latents = self.means
        if self.stds is not None:
            rows = zip(self.means, self.stds, generators, strict=True)
            with drawing_noise():
                drawn = [
                    mean + std * torch.randn(mean.shape, generator=one, device=one.device).to(std)
                    for mean, std, one in rows
                ]
            latents = torch.stack(drawn)
        return torch.cat([self.masks.to(latents), latents], dim=1)


@dataclass(frozen=True)
class Control:
    """A ControlNet at work for the pictures of a batch."""

    net: Any
    maps: torch.Tensor
    """What each picture is led by, [B,3,H,W] in [0,1]."""
    strengths: Sequence[float]
    """Of each picture."""
    spans: Sequence[tuple[float, float]]
    """From which share of the pass's evaluations to which it acts, of each picture."""

    def residuals(self, base: LoadedBase, rows: Rows) -> Residuals | None:
        """Return what it adds for the rows of a batch; None where it acts in none of them now."""
        begins, ends = rows.span
        strengths = [
            self.strengths[picture] * (start <= begins and ends <= end)
            for picture in rows.pictures
            for start, end in [self.spans[picture]]
        ]
        if not any(strengths):
            return None
        maps = self.maps[list(rows.pictures)].to(rows.inputs)
        added = base.family.control(self.net, rows.inputs, rows.timestep, rows.conditioning, rows.sizes, maps)
        return added.scaled(torch.tensor(strengths))


@dataclass(frozen=True)
class Besides:
    """What the UNet is given besides, for the pictures of a batch in one pass."""

    masked: Masked | None = None
    """Where the base inpaints."""
    controls: Sequence[Control] = ()

    def begun(self, base: LoadedBase, generators: Sequence[torch.Generator]) -> Predict:
        """Return the UNet as it is asked in this pass.

        Called after the pass's noise was drawn: the generators are at the place where diffusers' pipelines draw this.
        """
        shown = self.masked.drawn(generators) if self.masked else None

        def predict(rows: Rows) -> torch.Tensor:
            inputs = rows.inputs
            added = [one for control in self.controls if (one := control.residuals(base, rows))]
            residuals = functools.reduce(operator.add, added) if added else None
            if shown is not None:
                inputs = torch.cat([inputs, shown[list(rows.pictures)].to(inputs)], dim=1)
            return base.family.predict(base, inputs, rows.timestep, rows.conditioning, rows.sizes, residuals)

        return predict


NOTHING = Besides()

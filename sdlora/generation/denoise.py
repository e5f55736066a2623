"""From noise to latents: the steps of a sampler, guided by what each picture's prompts are at that step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sdlora.families.base import LoadedBase, PictureSize
from sdlora.families.traits import LATENT_CHANNELS
from sdlora.generation.encoded import EncodedPrompts, Guide

AfterStep = Callable[[int, int], None]
"""Called with (steps done, steps)."""
Act = Callable[[Sequence[int], int], None]
"""Called with the number of the picture that each row of the UNet's next batch belongs to, and the step."""


def denoise(
    base: LoadedBase,
    scheduler: Any,
    encoded: EncodedPrompts,
    generators: Sequence[torch.Generator],
    guidance_scales: Sequence[float],
    *,
    width: int,
    height: int,
    steps: int,
    guided: bool,
    act: Act,
    after_step: AfterStep,
) -> torch.Tensor:
    """Return the latents [B,4,h,w] of pictures of `width` x `height` pixels, one generator and one scale each.

    A guided picture follows n + scale * sum over its prompts p of weight * (p - n), n its negative prompt (Ho and
    Salimans 2022; Liu et al. 2022 for several); one that is not, its one prompt only.
    """
    scheduler.set_timesteps(steps, device=base.device)
    options = _step_options(scheduler, generators)
    size = PictureSize((height, width), (0, 0), (height, width))
    batch: list[Guide] = []
    latents = _noise(base, height, width, generators, encoded.dtype) * scheduler.init_noise_sigma
    count = len(scheduler.timesteps)
    for number, timestep in enumerate(scheduler.timesteps):
        step = number * steps // count + 1
        wanted = encoded.guides(step, guided)
        if wanted != batch:
            batch, conditioning = wanted, encoded.rows(wanted)
        act([guide.picture for guide in batch], step)
        inputs = scheduler.scale_model_input(latents[[guide.picture for guide in batch]], timestep)
        predicted = base.family.predict(base, inputs, timestep, conditioning, [size] * len(batch))
        if guided:
            predicted = _guide(predicted, batch, guidance_scales)
        dtype = latents.dtype
        latents = scheduler.step(predicted, timestep, latents, **options, return_dict=False)[0].to(dtype)
        after_step(number + 1, count)
    return latents


def _guide(predicted: torch.Tensor, batch: Sequence[Guide], scales: Sequence[float]) -> torch.Tensor:
    """Return what the prompts make of each picture together, [B,4,h,w]; its negative prompt's row is its first."""
    guided: list[torch.Tensor] = []
    for guide, row in zip(batch, predicted, strict=True):
        if guide.weight is None:
            without = row
            guided.append(row)
        else:
            guided[-1] = guided[-1] + scales[guide.picture] * guide.weight * (row - without)
    return torch.stack(guided)


def _noise(
    base: LoadedBase, height: int, width: int, generators: Sequence[torch.Generator], dtype: torch.dtype
) -> torch.Tensor:
    """Return the noise of each picture by itself, drawn where its generator is."""
    factor = 2 ** (len(base.vae.config.block_out_channels) - 1)
    shape = (1, LATENT_CHANNELS, height // factor, width // factor)
    drawn = [torch.randn(shape, generator=one, device=one.device, dtype=dtype) for one in generators]
    return torch.cat(drawn).to(base.device)


def _step_options(scheduler: Any, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Return what a sampler's step takes besides: the generators, where it adds noise of its own."""
    known = inspect.signature(scheduler.step).parameters
    return {"generator": list(generators)} if "generator" in known else {}

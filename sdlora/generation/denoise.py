"""From noise to latents: the steps of a sampler, guided by what each picture's prompts are at that step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdlora.families.base import LoadedBase, PictureSize
from sdlora.families.traits import LATENT_CHANNELS
from sdlora.generation.encoded import EncodedPrompts, Guide
from sdlora.generation.noise import drawing_noise

AfterStep = Callable[[int, int], None]
"""Called with (steps done, steps)."""
Act = Callable[[Sequence[int]], None]
"""Called with the number of the picture that each row of the UNet's next batches belongs to."""


@dataclass(frozen=True)
class Guidance:
    """How strongly a picture's prompts pull, and how far its contrast is brought back afterwards (0 to 1)."""

    scale: float
    rescale: float = 0.0


def denoise(
    base: LoadedBase,
    scheduler: Any,
    encoded: EncodedPrompts,
    generators: Sequence[torch.Generator],
    guidance: Sequence[Guidance],
    *,
    width: int,
    height: int,
    steps: int,
    guided: bool,
    act: Act,
    after_step: AfterStep,
) -> torch.Tensor:
    """Return the latents [B,4,h,w] of pictures of `width` x `height` pixels, one generator and one guidance each.

    A guided picture follows n + scale * sum over its prompts p of weight * (p - n), n its negative prompt (Ho and
    Salimans 2022; Liu et al. 2022 for several); one that is not, its one prompt only.
    """
    pictures = len(generators)
    scheduler.set_timesteps(steps, device=base.device)
    if hasattr(scheduler, "set_begin_index"):
        # Else a sampler looks the first timestep up, and of two equal ones, as many small steps have, takes the second.
        scheduler.set_begin_index(0)
    options = _step_options(scheduler, generators)
    size = PictureSize((height, width), (0, 0), (height, width))
    batch: list[Guide] = []
    latents = _noise(base, height, width, generators, encoded.dtype) * scheduler.init_noise_sigma
    count = len(scheduler.timesteps)
    for number, timestep in enumerate(scheduler.timesteps):
        wanted = encoded.guides(number * steps // count + 1, guided)
        if wanted != batch:
            batch, conditioning = wanted, encoded.rows(wanted)
            act([guide.picture for guide in batch])
        inputs = scheduler.scale_model_input(latents[[guide.picture for guide in batch]], timestep)
        predicted = base.family.predict(base, inputs, timestep, conditioning, [size] * len(batch))
        if guided:
            predicted = _guide(predicted, batch[pictures:], guidance)
        dtype = latents.dtype
        with drawing_noise():
            latents = scheduler.step(predicted, timestep, latents, **options, return_dict=False)[0].to(dtype)
        after_step(number + 1, count)
    return latents


def _guide(predicted: torch.Tensor, prompts: Sequence[Guide], guidance: Sequence[Guidance]) -> torch.Tensor:
    """Return what the prompts make of each picture together, [B,4,h,w]."""
    without = predicted[: len(guidance)]
    guided = list(without)
    plain = list(without)
    for guide, row in zip(prompts, predicted[len(guidance) :], strict=True):
        difference = row - without[guide.picture]
        guided[guide.picture] = guided[guide.picture] + guidance[guide.picture].scale * guide.weight * difference
        plain[guide.picture] = plain[guide.picture] + guide.weight * difference
    rows = zip(guided, plain, guidance, strict=True)
    return torch.stack([rescale(pulled, said, one.rescale) for pulled, said, one in rows])


def rescale(guided: torch.Tensor, plain: torch.Tensor, share: float) -> torch.Tensor:
    """Return `guided` with that share of it at the standard deviation of `plain`, what the prompts say at a scale of 1.

    share * guided * std(plain) / std(guided) + (1 - share) * guided (Lin et al. 2023, eq. 15 and 16).
    """
    if share == 0:
        return guided
    return share * guided * (plain.std() / guided.std()) + (1 - share) * guided


def _noise(
    base: LoadedBase, height: int, width: int, generators: Sequence[torch.Generator], dtype: torch.dtype
) -> torch.Tensor:
    """Return the noise of each picture by itself, drawn where its generator is."""
    factor = 2 ** (len(base.vae.config.block_out_channels) - 1)
    shape = (1, LATENT_CHANNELS, height // factor, width // factor)
    with drawing_noise():
        drawn = [torch.randn(shape, generator=one, device=one.device, dtype=dtype) for one in generators]
    return torch.cat(drawn).to(base.device)


def _step_options(scheduler: Any, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Return what a sampler's step takes besides: the generators, where it adds noise of its own."""
    known = inspect.signature(scheduler.step).parameters
    return {"generator": list(generators)} if "generator" in known else {}

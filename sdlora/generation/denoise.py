"""From noise to latents: the steps of a sampler, guided by what each picture's prompts are at that step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdlora.families.base import Conditioning, LoadedBase, PictureSize, PromptStyle
from sdlora.families.traits import LATENT_CHANNELS
from sdlora.generation.prompt_plan import PromptPlan, Spelling

AfterStep = Callable[[int, int], None]
"""Called with (steps done, steps)."""


@dataclass(frozen=True)
class _Guide:
    """One row of a batch for the UNet: which picture's latents, which conditioning, how strongly it pulls."""

    picture: int
    row: int
    weight: float


class _Encoded:
    """The conditioning of everything that a batch of pictures is guided by, each text encoded once."""

    def __init__(self, base: LoadedBase, plans: Sequence[PromptPlan], style: PromptStyle) -> None:
        spellings = dict.fromkeys(spelling for plan in plans for spelling in plan.spellings())
        self._rows: Mapping[Spelling | None, int] = {spelling: row for row, spelling in enumerate(spellings)}
        self._conditioning = base.family.encode_segments(base, list(spellings), style)
        self._plans = plans

    def guides(self, step: int, guided: bool) -> list[_Guide]:
        """Return the batch of a step: where `guided`, first each picture's negative prompt, then all other prompts."""
        negative = [
            _Guide(number, self._rows[plan.negative.at(step) if plan.negative else None], 0.0)
            for number, plan in enumerate(self._plans)
        ]
        positive = [
            _Guide(number, self._rows[part.at(step)], part.weight)
            for number, plan in enumerate(self._plans)
            for part in plan.positive
        ]
        return [*negative, *positive] if guided else positive

    def rows(self, guides: Sequence[_Guide]) -> Conditioning:
        """Return the conditioning of a batch."""
        return self._conditioning.rows([guide.row for guide in guides])


def denoise(
    base: LoadedBase,
    scheduler: Any,
    plans: Sequence[PromptPlan],
    generators: Sequence[torch.Generator],
    *,
    width: int,
    height: int,
    steps: int,
    guidance_scale: float,
    style: PromptStyle,
    after_step: AfterStep,
) -> torch.Tensor:
    """Return the latents [B,4,h,w] of pictures of `width` x `height` pixels, one plan and one generator each.

    A picture is guided by n + scale * sum over its prompts p of weight * (p - n), n its negative prompt (Ho and
    Salimans 2022; Liu et al. 2022 for several); of one prompt alone at a scale of 1 or less by that prompt only.
    """
    guided = guidance_scale > 1 or not all(plan.is_plain for plan in plans)
    encoded = _Encoded(base, plans, style)
    scheduler.set_timesteps(steps, device=base.device)
    options = _step_options(scheduler, generators)
    size = PictureSize((height, width), (0, 0), (height, width))
    batch, conditioning = encoded.guides(1, guided), None
    latents = _noise(base, height, width, generators, encoded.rows(batch).states.dtype)
    latents = latents * scheduler.init_noise_sigma
    count = len(scheduler.timesteps)
    for number, timestep in enumerate(scheduler.timesteps):
        wanted = encoded.guides(number * steps // count + 1, guided)
        if conditioning is None or wanted != batch:
            batch, conditioning = wanted, encoded.rows(wanted)
        inputs = scheduler.scale_model_input(latents[[guide.picture for guide in batch]], timestep)
        predicted = base.family.predict(base, inputs, timestep, conditioning, [size] * len(batch))
        if guided:
            predicted = _guide(predicted, batch[len(plans) :], len(plans), guidance_scale)
        dtype = latents.dtype
        latents = scheduler.step(predicted, timestep, latents, **options, return_dict=False)[0].to(dtype)
        after_step(number + 1, count)
    return latents


def _guide(predicted: torch.Tensor, prompts: Sequence[_Guide], pictures: int, scale: float) -> torch.Tensor:
    """Return what the prompts make of each picture together, [pictures,4,h,w]."""
    without = predicted[:pictures]
    guided = list(without)
    for guide, row in zip(prompts, predicted[pictures:], strict=True):
        guided[guide.picture] = guided[guide.picture] + scale * guide.weight * (row - without[guide.picture])
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

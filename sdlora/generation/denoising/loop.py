"""From noise to latents: the steps of a sampler, guided by what each picture's prompts are at that step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sdlora.families.base import Conditioning, LoadedBase, PictureSize
from sdlora.families.samplers.evaluations import evaluations_of
from sdlora.families.traits import LATENT_CHANNELS
from sdlora.generation.denoising.besides import NOTHING, Besides, Rows
from sdlora.generation.denoising.noise import drawing_noise
from sdlora.generation.denoising.start import Start
from sdlora.generation.encoded import Guide

AfterStep = Callable[[int, int, torch.Tensor], None]
"""Called with (steps done, steps, latents)."""
Act = Callable[[Sequence[int], int], None]
"""Called with the number of the picture that each row of the UNet's next batch belongs to, and the step of the plan."""


class PromptRows(Protocol):
    """What a batch of pictures is guided by."""

    @property
    def dtype(self) -> torch.dtype:
        """What the latents are computed in."""
        ...

    def step(self, step: int) -> int:
        """Return the step of the prompts' plan that belongs to a step of this pass."""
        ...

    def guides(self, step: int, guided: bool) -> list[Guide]:
        """Return the rows of the UNet's batch at a step of the plan."""
        ...

    def rows(self, guides: Sequence[Guide]) -> Conditioning:
        """Return their conditioning."""
        ...


@dataclass(frozen=True)
class Guidance:
    """How strongly a picture's prompts pull, and how far its contrast is brought back afterwards (0 to 1)."""

    scale: float
    rescale: float = 0.0


@dataclass(frozen=True)
class Course:
    """What a pass over a batch of pictures is."""

    size: tuple[int, int]
    """Width and height in pixels."""
    steps: int
    """That the sampler is set to."""
    guided: bool
    """Whether negative prompts take part."""
    start: Start | None = None
    """Where it begins, and with which of the steps; None: at noise, with the first."""
    besides: Besides = NOTHING
    """What else the UNet is given."""


def denoise(
    base: LoadedBase,
    scheduler: Any,
    course: Course,
    encoded: PromptRows,
    generators: Sequence[torch.Generator],
    guidance: Sequence[Guidance],
    act: Act,
    after_step: AfterStep,
) -> torch.Tensor:
    """Return the latents [B,4,h,w] of pictures, one generator and one guidance each.

    A guided picture follows n + scale * sum over its prompts p of weight * (p - n), n its negative prompt (Ho and
    Salimans 2022; Liu et al. 2022 for several); one that is not, its one prompt only. With a start the last steps
    alone run, and prompts that change begin with it, as in AUTOMATIC1111.
    """
    (width, height), steps, start = course.size, course.steps, course.start
    scheduler.set_timesteps(steps, device=base.device)
    if hasattr(scheduler, "set_begin_index"):
        # Else a sampler looks the first timestep up, and of two equal ones, as many small steps have, takes the second.
        scheduler.set_begin_index(0)
    options = _step_options(scheduler, generators)
    size = PictureSize((height, width), (0, 0), (height, width))
    batch: list[Guide] = []
    noise = _noise(base, height, width, generators, encoded.dtype)
    predict = course.besides.begun(base, generators)
    latents, timesteps = noise * scheduler.init_noise_sigma, scheduler.timesteps
    planned = len(timesteps)
    if start:
        latents, timesteps = start.begun(scheduler, noise, steps)
    evaluations = evaluations_of(scheduler, timesteps, steps, planned)
    for evaluation in evaluations:
        step, timestep = encoded.step(evaluation.step), evaluation.timestep
        wanted = encoded.guides(step, course.guided)
        if wanted != batch:
            batch, conditioning = wanted, encoded.rows(wanted)
        pictures = [guide.picture for guide in batch]
        act(pictures, step)
        inputs = scheduler.scale_model_input(latents[pictures], timestep)
        predicted = predict(Rows(inputs, timestep, conditioning, [size] * len(batch), pictures, evaluation.span))
        if course.guided:
            predicted = _guide(predicted, batch, guidance)
        dtype = latents.dtype
        with drawing_noise():
            latents = scheduler.step(predicted, timestep, latents, **options, return_dict=False)[0].to(dtype)
        if start:
            latents = start.kept(scheduler, latents, noise, evaluations.following)
        after_step(*evaluations.done, latents)
    return latents


def _guide(predicted: torch.Tensor, batch: Sequence[Guide], guidance: Sequence[Guidance]) -> torch.Tensor:
    """Return what the prompts make of each picture together, [B,4,h,w]; its negative prompt's row is its first."""
    guided, plain = list[torch.Tensor](), list[torch.Tensor]()
    for guide, row in zip(batch, predicted, strict=True):
        if guide.weight is None:
            without = row
            guided.append(row)
            plain.append(row)
        else:
            difference = guide.weight * (row - without)
            guided[-1] = guided[-1] + guidance[guide.picture].scale * difference
            plain[-1] = plain[-1] + difference
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

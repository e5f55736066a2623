"""One batch of pictures: their prompts encoded, their noise taken away, their latents decoded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image

from sdlora.adapters.inject import has_float32_adapter
from sdlora.errors import GenerationError
from sdlora.families.base import LoadedBase, PromptStyle, autocast
from sdlora.families.samplers import make_sampler
from sdlora.generation.asked import Asked
from sdlora.generation.batches import wants_zero_snr
from sdlora.generation.denoise import AfterStep, Guidance, denoise
from sdlora.generation.encoded import EncodedPrompts
from sdlora.generation.noise import noise_generators
from sdlora.generation.prompt_plan import encoder_emphasis
from sdlora.generation.recipes import PRECISION_NAMES, recipe_of
from sdlora.generation.request import Recipe
from sdlora.generation.resident import Acting, ResidentAdapters


class Renderer:
    """Makes the pictures of batches, in each of which all are alike but for prompts, seeds, guidance and adapters."""

    def __init__(self, base: LoadedBase, adapters: ResidentAdapters) -> None:
        self._base = base
        self._adapters = adapters
        self._samplers: dict[tuple[str, str, bool], Any] = {}

    def render(
        self, batch: Sequence[Asked], acting: Sequence[Acting], after_step: AfterStep
    ) -> list[tuple[Image.Image, Recipe]]:
        """Return the pictures, each with its recipe. Raises GenerationError for NaN."""
        request = batch[0].request
        zero_snr = wants_zero_snr(self._base, request, acting[0].zero_snr)
        scheduler = self._sampler(request.sampler, request.schedule, zero_snr)
        with torch.no_grad(), self._autocast():
            latents = self._denoise(batch, acting, scheduler, after_step)
            return [
                (self._decode(row, asked), recipe_of(self._base, asked, one.used, scheduler))
                for asked, one, row in zip(batch, acting, latents, strict=True)
            ]

    def _sampler(self, name: str, schedule: str, zero_snr: bool) -> Any:
        """Return the sampler, made once: some take longer to make than a step. Each picture begins it anew."""
        wanted = (name, schedule, zero_snr)
        if wanted not in self._samplers:
            self._samplers[wanted] = make_sampler(self._base, *wanted)
        return self._samplers[wanted]

    def _denoise(
        self, batch: Sequence[Asked], acting: Sequence[Acting], scheduler: Any, after_step: AfterStep
    ) -> torch.Tensor:
        request = batch[0].request
        width, height = batch[0].size(self._base)
        style = PromptStyle(encoder_emphasis(request.emphasis), request.clip_skip)
        latents = denoise(
            self._base,
            scheduler,
            EncodedPrompts(self._base, self._adapters, [asked.plan for asked in batch], acting, style),
            # Noise is drawn on the CPU, so that a seed means the same picture on every device.
            noise_generators(request.noise, [asked.seed for asked in batch]),
            [Guidance(asked.request.guidance_scale, asked.request.guidance_rescale) for asked in batch],
            width=width,
            height=height,
            steps=request.steps,
            guided=batch[0].guided,
            act=lambda rows: self._adapters.act([acting[number] for number in rows]),
            after_step=after_step,
        )
        for asked, row in zip(batch, latents, strict=True):
            if not row.isfinite().all():
                raise GenerationError(
                    f"the UNet gave NaN for {asked.request.prompt!r} in {PRECISION_NAMES[self._base.dtype]}; "
                    "use fp32 or bf16, or a lower adapter weight"
                )
        return latents

    def _decode(self, latents: torch.Tensor, asked: Asked) -> Image.Image:
        """Return the picture of latents [4,h,w]. Raises GenerationError for NaN."""
        (picture,) = self._base.family.decode_latents(self._base, latents[None])
        if not picture.isfinite().all():
            raise GenerationError(f"the VAE gave NaN for {asked.request.prompt!r}; use fp32 or bf16")
        return Image.fromarray((picture * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy())

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._base.dtype != torch.float32 and has_float32_adapter(self._base):
            return autocast(self._base)
        return nullcontext()

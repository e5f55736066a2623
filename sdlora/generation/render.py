"""One batch of pictures: their prompts encoded, their noise taken away, their latents decoded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image

from sdlora.adapters.inject import has_float32_adapter
from sdlora.errors import ConfigError, GenerationError
from sdlora.families.base import LoadedBase, PromptStyle, autocast
from sdlora.families.samplers.make import make_sampler
from sdlora.families.samplers.partway import last_steps, levels_fall
from sdlora.generation.asked import Asked
from sdlora.generation.batches import wants_zero_snr
from sdlora.generation.controls import ResidentControls, controls_at_work
from sdlora.generation.denoising.besides import Besides
from sdlora.generation.denoising.loop import AfterStep, Course, Guidance, PromptRows, denoise
from sdlora.generation.denoising.noise import drawing_noise, noise_generators
from sdlora.generation.denoising.start import Start
from sdlora.generation.encoded import EncodedPrompts
from sdlora.generation.img2img.inpaint import Canvas, canvas_of
from sdlora.generation.img2img.latents import masked_pictures, picture_of, start_at, steps_run
from sdlora.generation.memory import CompiledUnet, Placement
from sdlora.generation.prompts.plan import encoder_emphasis
from sdlora.generation.recipe import Recipe
from sdlora.generation.resident import Acting, ResidentAdapters
from sdlora.generation.upscaling.second_pass import AtTheEnd, second_start
from sdlora.generation.vae import Vae
from sdlora.generation.what_ran import PRECISION_NAMES, recipe_of


class Renderer:
    """Makes the pictures of batches, in each of which all are alike but for prompts, seeds, guidance and adapters."""

    def __init__(
        self, base: LoadedBase, adapters: ResidentAdapters, placement: Placement, compiled: CompiledUnet | None = None
    ) -> None:
        self._base = base
        self._adapters = adapters
        self._placement = placement
        self._compiled = compiled
        self._controls = ResidentControls(base, placement.resting_place)
        self._samplers: dict[tuple[str, str, bool], Any] = {}

    def render(
        self, batch: Sequence[Asked], acting: Sequence[Acting], after_step: AfterStep
    ) -> list[tuple[Image.Image, Recipe]]:
        """Return the pictures, each with its recipe. Raises GenerationError for NaN."""
        request = batch[0].request
        zero_snr = wants_zero_snr(self._base, request, acting[0].zero_snr)
        scheduler = self._sampler(request.sampler, request.schedule, zero_snr)
        vaes = [
            Vae(self._base, asked.request.vae_tiling, asked.texts.prompt, math.prod(asked.final_size(self._base)))
            for asked in batch
        ]
        canvases = [_canvas(asked, self._base) for asked in batch]
        with torch.no_grad(), self._autocast():
            latents = self._denoise(batch, acting, scheduler, vaes, canvases, after_step)
            with self._placement.using("vae"):
                pictures = [picture_of(vae.decode(row)) for vae, row in zip(vaes, latents, strict=True)]
        return [
            (
                canvas.finished(picture) if canvas else picture,
                recipe_of(self._base, asked, one.used, scheduler, vae.tiled, vae.notes),
            )
            for asked, one, vae, canvas, picture in zip(batch, acting, vaes, canvases, pictures, strict=True)
        ]

    def _sampler(self, name: str, schedule: str, zero_snr: bool) -> Any:
        """Return the sampler, made once: some take longer to make than a step. Each picture begins it anew."""
        wanted = (name, schedule, zero_snr)
        if wanted not in self._samplers:
            self._samplers[wanted] = make_sampler(self._base, *wanted)
        return self._samplers[wanted]

    def _denoise(
        self,
        batch: Sequence[Asked],
        acting: Sequence[Acting],
        scheduler: Any,
        vaes: Sequence[Vae],
        canvases: Sequence[Canvas | None],
        after_step: AfterStep,
    ) -> torch.Tensor:
        """Return the latents of the pictures, after a second pass where they have one."""
        request, hires, size, guided = batch[0].request, batch[0].hires, batch[0].size(self._base), batch[0].guided
        style = PromptStyle(encoder_emphasis(request.emphasis), request.clip_skip)
        with self._placement.using("text encoders"):
            encoded = EncodedPrompts(self._base, self._adapters, [asked.plan for asked in batch], acting, style)
        guidance = [Guidance(asked.request.guidance_scale, asked.request.guidance_rescale) for asked in batch]
        counts = self._step_counts(scheduler, batch[0])

        def act(rows: Sequence[int], step: int) -> None:
            self._adapters.act([acting[row] for row in rows], step, request.steps)

        def one_pass(
            course: Course, prompts: PromptRows, generators: Sequence[torch.Generator], passed: int = 0
        ) -> torch.Tensor:
            checked = _checked(batch, self._base.dtype, passed, sum(counts), after_step)
            nets = [control.net for control in course.besides.controls]
            with self._placement.using("unet", nets), self._fast_unet(acting, course):
                return denoise(self._base, scheduler, course, prompts, generators, guidance, act, checked)

        generators = _generators(batch)
        start = self._start(batch, vaes, canvases, generators, encoded.dtype)
        course = Course(size, request.steps, guided, start, self._besides(batch, vaes, canvases, size))
        latents = one_pass(course, encoded, generators)
        if hires:
            larger = hires.size(size)
            with self._placement.using("vae"):
                start = second_start(self._base, hires, vaes, latents, larger)
            course = Course(larger, hires.scheduled_steps, guided, start, self._besides(batch, vaes, canvases, larger))
            # The noise of the second pass is the seed's first draw again, as in AUTOMATIC1111.
            latents = one_pass(course, AtTheEnd(encoded, request.steps), _generators(batch), passed=counts[0])
        return latents

    def _start(
        self,
        batch: Sequence[Asked],
        vaes: Sequence[Vae],
        canvases: Sequence[Canvas | None],
        generators: Sequence[torch.Generator],
        dtype: torch.dtype,
    ) -> Start | None:
        """Return where pictures that start from others begin, None for those that begin at noise.

        An inpainting UNet that makes all under a mask anew begins there too: it is shown the rest.
        """
        request = batch[0].request
        if not request.image or (self._base.inpaints and request.mask and request.strength == 1):
            return None
        contents = [asked.request.masked_content for asked in batch]
        shown = [canvas for canvas in canvases if canvas]
        run = steps_run(request.steps, request.strength)
        with self._placement.using("vae"), drawing_noise():
            return start_at(
                vaes,
                shown,
                contents,
                generators,
                dtype,
                steps=run,
                from_noise=request.strength == 1,
                keeps=not self._base.inpaints,
            )

    def _besides(
        self, batch: Sequence[Asked], vaes: Sequence[Vae], canvases: Sequence[Canvas | None], size: tuple[int, int]
    ) -> Besides:
        """Return what the UNet is given besides in a pass of that width and height."""
        masked = None
        if self._base.inpaints:
            with self._placement.using("vae"):
                masked = masked_pictures(vaes, canvases, size)
        asked = [picture.controls for picture in batch]
        nets = self._controls.gather(asked[0])
        return Besides(masked, controls_at_work(nets, asked, canvases, size))

    def _step_counts(self, scheduler: Any, asked: Asked) -> list[int]:
        """Return how many steps each pass will report."""
        first = asked.request
        passes = [(first.steps, steps_run(first.steps, first.strength) if asked.source else first.steps)]
        if asked.hires:
            passes.append((asked.hires.scheduled_steps, asked.hires.run_steps))
        counts = []
        for steps, run in passes:
            _plan(scheduler, steps)
            counts.append(len(last_steps(scheduler, steps, run)))
        return counts

    def _fast_unet(self, acting: Sequence[Acting], course: Course) -> AbstractContextManager[None]:
        """Inside, the UNet runs compiled where that is wanted and neither adapter nor ControlNet acts on it."""
        adapted = any(weight.weight for one in acting for weight in one.unet.values())
        if self._compiled is None or adapted or course.besides.controls:
            return nullcontext()
        return self._compiled.used()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._base.dtype != torch.float32 and has_float32_adapter(self._base):
            return autocast(self._base)
        return nullcontext()


def _plan(scheduler: Any, steps: int) -> None:
    """The sampler is set to so many steps. Raises ConfigError where it has no timesteps or levels for so many."""
    try:
        scheduler.set_timesteps(steps)
        fits = float(scheduler.timesteps.max()) < scheduler.config.num_train_timesteps and levels_fall(scheduler)
    except ValueError:  # of LCM, whose steps are some of those that it was distilled with
        fits = False
    if not fits:
        raise ConfigError(f"the sampler {type(scheduler).__name__} cannot make {steps} steps; choose fewer")


def _generators(batch: Sequence[Asked]) -> Sequence[torch.Generator]:
    """Return one generator a picture, on the CPU, so that a seed means the same picture on every device."""
    return noise_generators(batch[0].request.noise, [asked.seed for asked in batch])


def _canvas(asked: Asked, base: LoadedBase) -> Canvas | None:
    return canvas_of(asked.source, asked.size(base)) if asked.source else None


def _checked(
    batch: Sequence[Asked], dtype: torch.dtype, done_before: int, steps: int, after_step: AfterStep
) -> AfterStep:
    """Return what is called after each step of a pass: it refuses NaN at once, and counts steps over all passes."""

    def check(step: int, count: int, latents: torch.Tensor) -> None:
        for asked, row in zip(batch, latents, strict=True):
            if not row.isfinite().all():
                raise GenerationError(
                    f"the UNet gave NaN for {asked.texts.prompt!r} in {PRECISION_NAMES[dtype]} at step "
                    f"{done_before + step} of {steps}; use fp32 or bf16, or a lower adapter weight or guidance scale"
                )
        after_step(done_before + step, steps, latents)

    return check

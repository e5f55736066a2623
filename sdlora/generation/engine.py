"""The Engine: one resident base, adapters as side branches, requests in, pictures with recipes out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from PIL import Image

from sdlora.adapters.file import adapter_family
from sdlora.adapters.fit import refuse_other_family
from sdlora.config import BaseSection
from sdlora.errors import GenerationError
from sdlora.families.base import LoadedBase
from sdlora.families.detect import family_of
from sdlora.families.sources import find_base
from sdlora.generation.asked import Asked, FindAdapter, asked_pictures, read_folder
from sdlora.generation.batches import Made, in_order, regrouped, split_alike
from sdlora.generation.denoising.preview import latent_colours
from sdlora.generation.denoising.progress import OnStep, ShouldStop, StepProgress, Watch
from sdlora.generation.memory import CompiledUnet, Offload, Placement, lay_channels_last, load_for
from sdlora.generation.recipe import Recipe
from sdlora.generation.render import Renderer
from sdlora.generation.request import GenerationRequest
from sdlora.generation.resident import ResidentAdapters

__all__ = ["Engine", "OnStep", "StepProgress", "refuse_foreign_adapters"]

_RESIDENT_ADAPTERS = 8
_AfterStep = Callable[[int, int, int, int, torch.Tensor], None]
"""As `Watch.after_step`."""


def refuse_foreign_adapters(base: BaseSection, adapters: Sequence[str]) -> None:
    """Raise ModelError or FormatError for an adapter that says it is for another family, before anything is loaded."""
    theirs = [adapter_family(path) for path in adapters]
    if not theirs:
        return
    family = family_of(find_base(base))
    for name in theirs:
        refuse_other_family(name, family, base.path)


class Engine:
    """Makes pictures with one base.

    `base` is "tiny", a folder, a .safetensors file, a hub id, a `BaseSection`, or a base already loaded.
    `live_adapters` are adapters that are in that loaded base already and act in every picture, such as
    the one being trained; new words that the base knows stay known too. `find_adapter` returns the file of the
    adapter that a prompt calls <lora:NAME>, or raises SdloraError. Of adapters loaded from files, the
    `resident_adapters` used last stay in memory. Base weights are never written.

    With `offload` "model" text encoders, UNet and VAE are on the device only while they work. `channels_last` lays weights of
    convolutions as GPUs read them best. `compile` compiles the UNet for each size, for pictures without adapters and ControlNets.
    """

    def __init__(
        self,
        base: str | BaseSection | LoadedBase,
        *,
        device: str | None = None,
        live_adapters: Mapping[str, float] | None = None,
        find_adapter: FindAdapter | None = None,
        resident_adapters: int = _RESIDENT_ADAPTERS,
        offload: Offload = "none",
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        if isinstance(base, str):
            base = BaseSection(path=base)
        self.base = load_for(base, device, offload) if isinstance(base, BaseSection) else base
        if channels_last:
            lay_channels_last(self.base)
        placement = Placement(self.base, offload)
        placement.rest()
        with placement.using("vae"):
            self._colours = latent_colours(self.base)
        compiled = CompiledUnet(self.base) if compile and not live_adapters else None
        self._stops_in_unet = compiled is None
        self._find_adapter = find_adapter
        self._adapters = ResidentAdapters(self.base, live_adapters or {}, resident_adapters)
        self._renderer = Renderer(self.base, self._adapters, placement, compiled)

    def generate(
        self,
        request: GenerationRequest,
        *,
        batch_size: int = 1,
        on_step: OnStep | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Iterator[tuple[Image.Image, Recipe]]:
        """Yield the pictures of `request`, in the order of their seeds, each with its recipe.

        With the default `batch_size` of 1 a picture depends on nothing but its recipe, bit for bit; in
        larger batches, whose pictures may have different adapters, it may differ in the last bits. `on_step` is
        called after every denoising step and ends the request by raising `GenerationCancelled`; so does `should_stop`
        by returning true, which is asked many times within a step. Raises FormatError or ModelError for an adapter that
        cannot be used or a ControlNet, DataError for a picture to start from or a map that cannot, GenerationError for a picture that came out as
        NaN or needs more memory than there is.
        """
        asked = list(asked_pictures(request, 0, self._find_adapter))
        watch = Watch(self.base, self._colours, len(asked), on_step, should_stop, in_unet=self._stops_in_unet)
        for _, picture, recipe in self._make_all(in_order(asked, batch_size), watch):
            yield picture, recipe

    def generate_all(
        self,
        requests: Sequence[GenerationRequest],
        *,
        batch_size: int = 1,
        on_step: OnStep | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Iterator[tuple[int, Image.Image, Recipe]]:
        """Yield (number of its request, picture, recipe) for every picture of the requests, in the order they are made.

        Pictures are regrouped into full batches whatever their prompts, seeds, guidance and adapters; what they
        must have in common, such as size and steps, is in `batches.Likeness`. All else is as with `generate`.
        """
        read = functools.cache(read_folder)
        asked = [
            picture
            for number, request in enumerate(requests)
            for picture in asked_pictures(request, number, self._find_adapter, read)
        ]
        watch = Watch(self.base, self._colours, len(asked), on_step, should_stop, in_unet=self._stops_in_unet)
        yield from self._make_all(regrouped(self.base, asked, batch_size), watch)

    def weights_sha256(self) -> str:
        """SHA-256 over the base weights as they are in memory now; equal before and after any request."""
        return self.base.weights_sha256()

    def _make_all(self, batches: Iterator[list[Asked]], watch: Watch) -> Iterator[Made]:
        for batch in batches:
            # Nothing stays active across a yield: the caller may abandon this request or begin another.
            try:
                with watch.batch(len(batch)):
                    made = self._make_fitting(batch, watch.after_step)
            finally:
                self._adapters.rest()
            yield from made

    def _make_fitting(self, batch: Sequence[Asked], after_step: _AfterStep) -> list[Made]:
        """Return the pictures of a batch, made in halves where the memory is too small for all at once."""
        try:
            return self._make(batch, after_step)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise GenerationError(
                    "the GPU's memory is too small for this; choose a smaller width or height"
                ) from error
        middle = len(batch) // 2  # out of the handler, whose traceback holds the memory
        return [made for half in (batch[:middle], batch[middle:]) for made in self._make_fitting(half, after_step)]

    def _make(self, batch: Sequence[Asked], after_step: _AfterStep) -> list[Made]:
        """Return the pictures of a batch, in its order; parts that cannot be made together are made one by one."""
        acting = self._adapters.gather([asked.adapters for asked in batch])
        made: dict[int, Made] = {}
        for part in split_alike(self.base, batch, acting):
            pictures = self._renderer.render(
                [batch[number] for number in part],
                [acting[number] for number in part],
                partial(after_step, len(made), len(part)),
            )
            for number, (picture, recipe) in zip(part, pictures, strict=True):
                made[number] = (batch[number].number, picture, recipe)
        return [made[number] for number in range(len(batch))]

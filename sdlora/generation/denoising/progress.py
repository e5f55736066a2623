"""How far a request is, and how it is ended from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import nn

from sdlora.errors import GenerationCancelled
from sdlora.families.base import LoadedBase
from sdlora.generation.denoising.preview import LatentColours


@dataclass(frozen=True)
class StepProgress:
    """How far a request is: pictures already finished, and the denoising step of the current ones."""

    pictures_done: int
    pictures: int
    step: int
    steps: int
    """Of all passes."""
    seconds_left: float = 0.0
    """To the last picture, at the pace so far."""
    preview: Callable[[], list[Image.Image]] | None = None
    """Returns the current pictures as they are now, each an eighth as wide and high; valid until the next step."""


OnStep = Callable[[StepProgress], None]
ShouldStop = Callable[[], bool]


class Watch:
    """Tells `on_step` of each step of a request, and ends the request where `should_stop` says so.

    The time that passes between batches, while the caller has the pictures, is not counted.
    """

    def __init__(
        self,
        base: LoadedBase,
        colours: LatentColours,
        pictures: int,
        on_step: OnStep | None,
        should_stop: ShouldStop | None,
        *,
        in_unet: bool = True,
    ) -> None:
        self._base = base
        self._colours = colours
        self._pictures = pictures
        self._on_step = on_step
        self._should_stop = should_stop
        self._in_unet = in_unet
        self._done = 0
        self._seconds = 0.0
        self._since = 0.0

    @contextmanager
    def batch(self, pictures: int) -> Iterator[None]:
        """Inside, a batch of so many pictures is made; it can be stopped within a step."""
        self._since = time.monotonic()
        with stoppable(self._base, self._should_stop, in_unet=self._in_unet):
            yield
        self._seconds += time.monotonic() - self._since
        self._done += pictures

    def after_step(self, finished: int, together: int, step: int, steps: int, latents: torch.Tensor) -> None:
        """A step of `together` pictures is done, `finished` ones of the batch were ready before."""
        if self._should_stop and self._should_stop():
            raise GenerationCancelled("cancelled")
        if self._on_step:
            done = self._done + finished
            share = (done + together * step / steps) / self._pictures
            spent = self._seconds + time.monotonic() - self._since
            left = spent / share * (1 - share)
            preview = partial(self._colours.pictures, latents)
            self._on_step(StepProgress(done, self._pictures, step, steps, left, preview))


@contextmanager
def stoppable(base: LoadedBase, should_stop: ShouldStop | None, *, in_unet: bool = True) -> Iterator[None]:
    """Inside, GenerationCancelled is raised within a step, before any block of a model, once `should_stop` says so.

    Not `in_unet`: before blocks of the others only, as a compiled UNet would keep asking the first one that it saw.
    """
    if should_stop is None:
        yield
        return

    def check(module: nn.Module, inputs: object) -> None:
        if should_stop():
            raise GenerationCancelled("cancelled")

    models = [model for name, model in base.components() if in_unet or name != "unet"]
    handles = [block.register_forward_pre_hook(check) for model in models for block in _blocks(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of a model's lists of layers: its blocks, and their resnets, attentions and transformer layers."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    yield from dict.fromkeys(block for members in lists for block in members)

"""ControlNets of a request: read before anything is made, kept beside the base, and at work in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdlora.config import BaseSection
from sdlora.families.base import LoadedBase
from sdlora.families.control_weights import load_control
from sdlora.families.controls import ControlFacts, find_control, refuse_control_of_another_family
from sdlora.families.detect import family_of
from sdlora.families.sources import find_base
from sdlora.generation.denoising.besides import Control
from sdlora.generation.img2img.inpaint import Canvas
from sdlora.generation.img2img.source import fitted, upright_picture, used_picture
from sdlora.generation.recipe import UsedControl
from sdlora.generation.request import ControlChoice, GenerationRequest, ResizeMode


@dataclass(frozen=True)
class AskedControl:
    """A ControlNet of a request with its map, whose pixels are decoded when needed."""

    choice: ControlChoice
    facts: ControlFacts
    used: UsedControl
    resize: ResizeMode

    def fitted(self, size: tuple[int, int], canvas: Canvas | None) -> Image.Image:
        """Return its map in that width and height; with a canvas, the part of it that the canvas is of the picture."""
        picture, mode = upright_picture(self.choice.image), self.resize
        if canvas is None or canvas.around is None or canvas.box is None:
            return fitted(picture, size, mode)
        part = fitted(picture, canvas.around.size, mode).crop(canvas.box)
        return part if part.size == size else part.resize(size, Image.Resampling.LANCZOS)


def read_controls(request: GenerationRequest) -> tuple[AskedControl, ...]:
    """Return the ControlNets of a request, in its order.

    Raises ModelError or FormatError for a model that is none, DataError for a map that cannot be read.
    """
    found = []
    for choice in request.control:
        facts = find_control(choice.model)
        upright_picture(choice.image)
        picture = used_picture(choice.image)
        used = UsedControl(facts.name, facts.sha256, picture, choice.strength, choice.start, choice.end, request.resize)
        found.append(AskedControl(choice, facts, used, request.resize))
    return tuple(found)


def refuse_foreign_controls(base: BaseSection, request: GenerationRequest) -> None:
    """Raise ModelError or FormatError for a ControlNet of another family than the base's, before that is loaded."""
    if request.control:
        family = family_of(find_base(base))
        for choice in request.control:
            refuse_control_of_another_family(find_control(choice.model), family, base.path)


class ResidentControls:
    """The ControlNets beside one base: those of the last batch, so that a series loads each once."""

    def __init__(self, base: LoadedBase, device: torch.device) -> None:
        """`device` is where they rest."""
        self._base = base
        self._device = device
        self._nets: dict[str, Any] = {}
        """By SHA-256."""

    def gather(self, wanted: Sequence[AskedControl]) -> Mapping[str, Any]:
        """Return the ControlNets of a batch by their SHA-256; all others are gone. Raises ModelError as `load_control`."""
        facts = {one.used.sha256: one.facts for one in wanted}
        self._nets = {sha256: net for sha256, net in self._nets.items() if sha256 in facts}
        for sha256, one in facts.items():
            if sha256 not in self._nets:
                self._nets[sha256] = load_control(one, self._base, self._device)
        return self._nets


def controls_at_work(
    nets: Mapping[str, Any],
    asked: Sequence[Sequence[AskedControl]],
    canvases: Sequence[Canvas | None],
    size: tuple[int, int],
) -> tuple[Control, ...]:
    """Return the ControlNets of a batch at work in a pass of that width and height; all pictures have the same ones."""
    together = []
    for place, first in enumerate(asked[0]):
        rows = [controls[place] for controls in asked]
        maps = [_pixels(row.fitted(size, canvas)) for row, canvas in zip(rows, canvases, strict=True)]
        choices = [row.choice for row in rows]
        spans = [(choice.start, choice.end) for choice in choices]
        strengths = [choice.strength for choice in choices]
        together.append(Control(nets[first.used.sha256], torch.cat(maps), strengths, spans))
    return tuple(together)


def _pixels(picture: Image.Image) -> torch.Tensor:
    """Return a map as ControlNets take it, [1,3,H,W] float32 in [0,1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255

"""From requests to single pictures: choices made, tags read, prompts planned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sdlora.config import validated
from sdlora.errors import ConfigError
from sdlora.families.base import LoadedBase
from sdlora.generation.controls import AskedControl, read_controls
from sdlora.generation.img2img.source import Source, read_source, work_size
from sdlora.generation.prompts import Tag, parse_tags
from sdlora.generation.prompts.plan import PicturePrompts, PromptPlan, picture_prompts, plan_prompt
from sdlora.generation.prompts.wildcards import NO_WILDCARDS, Wildcards, read_wildcards
from sdlora.generation.request import AdapterChoice, GenerationRequest
from sdlora.generation.upscaling.hires import Hires, read_hires
from sdlora.storage import user_path

FindAdapter = Callable[[str], Path]
"""Returns the file of the adapter that prompts call <lora:NAME>, or raises SdloraError."""


@dataclass(frozen=True)
class Asked:
    """One picture of a request."""

    request: GenerationRequest
    number: int
    """Which of the requests it is of."""
    seed: int
    texts: PicturePrompts
    adapters: tuple[AdapterChoice, ...]
    plan: PromptPlan
    source: Source | None = None
    """The picture that it starts from."""
    hires: Hires | None = None
    """Its second pass."""
    controls: tuple[AskedControl, ...] = ()
    """Its ControlNets."""

    @property
    def guided(self) -> bool:
        """Whether a negative prompt takes part: not at a scale of 1 or less, but for several prompts or a weighted one."""
        return self.request.guidance_scale > 1 or not self.plan.is_plain

    def size(self, base: LoadedBase) -> tuple[int, int]:
        """Return width and height in pixels, as the model works at them; a second pass is larger."""
        return work_size(self.request, self.source.size if self.source else None, base.resolution)

    def final_size(self, base: LoadedBase) -> tuple[int, int]:
        """Return width and height in pixels of the last pass."""
        return self.hires.size(self.size(base)) if self.hires else self.size(base)


def check_pictures(request: GenerationRequest) -> None:
    """Raise SdloraError for a picture, mask, upscaler or ControlNet that cannot be used, before a base is loaded."""
    read_source(request)
    read_hires(request)
    read_controls(request)


def read_folder(folder: str) -> Wildcards:
    """Return the wildcards of a folder, none of "". Raises ConfigError where it cannot be read."""
    return read_wildcards(user_path(folder)) if folder else NO_WILDCARDS


def asked_pictures(
    request: GenerationRequest,
    number: int,
    find_adapter: FindAdapter | None,
    read: Callable[[str], Wildcards] = read_folder,
) -> Iterator[Asked]:
    """Yield the pictures of a request in the order of their seeds.

    Raises ConfigError for a tag that names no adapter, DataError, FormatError and ModelError for a picture, upscaler or
    ControlNet that cannot be used. Whoever asks for many requests may have `read` remember the folders of wildcards.
    """
    source, hires, controls = read_source(request), read_hires(request), read_controls(request)
    wildcards = read(request.wildcards)

    @functools.cache
    def find(name: str) -> str:
        if find_adapter is None:
            raise ConfigError(f"the prompt asks for <lora:{name}>; name that adapter's file instead")
        return str(find_adapter(name))

    for seed in range(request.seed, request.seed + request.count):
        texts, adapters = _choose(request, seed, wildcards, find)
        plan = plan_prompt(texts.prompt, texts.negative_prompt, request.steps, request.emphasis)
        yield Asked(request, number, seed, texts, adapters, plan, source, hires, controls)


def _choose(
    request: GenerationRequest, seed: int, wildcards: Wildcards, find: Callable[[str], str]
) -> tuple[PicturePrompts, tuple[AdapterChoice, ...]]:
    """Return the prompts of the picture with that seed without their tags, and all its adapters."""
    texts = picture_prompts(request.prompt, request.negative_prompt, seed, wildcards, request.emphasis)
    if request.emphasis == "none":
        return texts, request.adapters
    tagged = parse_tags(texts.prompt)
    if not tagged.tags and tagged.text == texts.prompt:
        return texts, request.adapters
    choices = {choice.path: choice for choice in request.adapters}
    for tag in tagged.tags:
        path = find(tag.name)
        if path in choices:
            raise ConfigError(f"the adapter {tag.name!r} is named twice; give it once with the sum of the weights")
        choices[path] = _choice(tag, path)
    return replace(texts, prompt=tagged.text), tuple(choices.values())


def _choice(tag: Tag, path: str) -> AdapterChoice:
    """Return the adapter that a tag asks for."""
    values = {"path": path, "weight": tag.unet, "text_encoder_weight": tag.text_encoder}
    return validated(AdapterChoice, {**values, "blocks": tag.blocks, "steps": tag.steps}, f"<lora:{tag.name}>")

"""Pictures of other programs: what their metadata say, as a request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.errors import ConfigError, FormatError, first_line
from sdlora.generation.foreign.a1111 import foreign_infotext
from sdlora.generation.foreign.comfy import foreign_comfy
from sdlora.generation.foreign.others import foreign_invoke, foreign_novel
from sdlora.generation.foreign.recipe import ForeignAdapter, ForeignRecipe, parse_object
from sdlora.generation.foreign.stealth import hidden_text
from sdlora.generation.pictures.texts import INFOTEXT, PictureTexts, read_texts
from sdlora.generation.request import GenerationRequest, make_request

__all__ = ["ForeignAdapter", "ForeignRecipe", "ForeignRequest", "foreign_request", "read_foreign"]

FindAdapter = Callable[[ForeignAdapter], Path | None]
"""Where an adapter that another program used lies here; None: nowhere."""
_SIZES = ("width", "height")
_SAMPLING = ("sampler", "schedule")
_HIRES = ("hires_scale", "hires_steps", "hires_strength", "hires_upscaler")


@dataclass(frozen=True)
class ForeignRequest:
    """A foreign recipe as a request, and what of it could not be carried over."""

    request: GenerationRequest
    left_out: tuple[str, ...]


def read_foreign(path: Path) -> ForeignRecipe:
    """Return what a picture of AUTOMATIC1111, Forge, ComfyUI, InvokeAI or NovelAI tells of how it was made.

    Read are PNG's texts, EXIF's UserComment and what is hidden in pixels. Raises FormatError, with one sentence, where
    there is nothing, or nothing that can be read.
    """
    try:
        return foreign_recipe(read_texts(path), lambda: hidden_text(path))
    except FormatError as error:
        told = str(error)
        raise FormatError(told if told.startswith(str(path)) else f"{path}: {told}") from error


def foreign_recipe(carried: PictureTexts, hidden: Callable[[], str] = lambda: "") -> ForeignRecipe:
    """Return what a picture's texts say; `hidden` is asked where they say nothing. Raises FormatError."""
    said = _said_by(carried.texts, _hidden_texts(hidden))
    # Whoever says no size made the picture as large as it is; a finished one may have been enlarged since.
    if not said.settings.keys() & set(_SIZES) and carried.width % 8 == carried.height % 8 == 0:
        size = {"width": carried.width, "height": carried.height}
        return ForeignRecipe(**{**vars(said), "settings": {**said.settings, **size}})
    return said


def _said_by(texts: Mapping[str, str], hidden: Iterator[Mapping[str, str]]) -> ForeignRecipe:
    problem: FormatError | None = None
    readers: dict[str, Callable[[str], ForeignRecipe]] = {
        "invokeai_metadata": foreign_invoke,
        INFOTEXT: foreign_infotext,
        "prompt": foreign_comfy,
        "Comment": foreign_novel,
    }
    for found in _each(texts, hidden):
        for key, reader in readers.items():
            try:
                if key in found:
                    return reader(found[key])
            except FormatError as error:
                problem = problem or error
    if problem:
        raise problem
    if "workflow" in texts:
        raise FormatError("holds a workflow of ComfyUI but not the prompt that ran, which alone says what was made")
    raise FormatError(
        "tells nothing of how it was made; known are sdlora, AUTOMATIC1111, Forge, ComfyUI, InvokeAI and NovelAI"
    )


def _each(texts: Mapping[str, str], hidden: Iterator[Mapping[str, str]]) -> Iterator[Mapping[str, str]]:
    yield texts
    yield from hidden


def _hidden_texts(hidden: Callable[[], str]) -> Iterator[Mapping[str, str]]:
    """Yield what is hidden as the texts that a PNG would have: NovelAI hides all of these as JSON, Forge the infotext."""
    text = hidden()
    if text.startswith("{"):
        yield {key: value for key, value in parse_object(text, "its hidden text").items() if isinstance(value, str)}
    elif text:
        yield {INFOTEXT: text}


def foreign_request(recipe: ForeignRecipe, find: FindAdapter) -> ForeignRequest:
    """Return the request that a foreign recipe comes nearest to; what has no place in one is named as left out."""
    left_out = list(recipe.left_out)
    values: dict[str, Any] = {"prompt": recipe.prompt, "negative_prompt": recipe.negative_prompt}
    values["adapters"] = list(_choices(recipe.adapters, find, left_out))
    together = (_SIZES, _SAMPLING, _HIRES)
    alone = [(name,) for name in recipe.settings if not any(name in group for group in together)]
    for group in (*together, *alone):
        more = {name: recipe.settings[name] for name in group if name in recipe.settings}
        try:
            make_request(prompt="", **more)
            values |= more
        except ConfigError as error:
            left_out.append(_refused(more, error))
    return ForeignRequest(make_request(**values), tuple(left_out))


def _choices(adapters: tuple[ForeignAdapter, ...], find: FindAdapter, left_out: list[str]) -> Iterator[dict[str, Any]]:
    used = set[Path]()
    for adapter in adapters:
        kind = "embedding" if adapter.embedding else "adapter"
        path = find(adapter)
        if path is None or path in used:
            left_out.append(
                f"{kind} {adapter.name[:100]}, which is {'not in the library' if path is None else 'named twice'}"
            )
            continue
        choice = {"path": str(path), "weight": adapter.weight, "text_encoder_weight": adapter.text_encoder_weight}
        if not _is_choice(choice):
            left_out.append(f"{kind} {adapter.name[:100]} with the weight {adapter.weight:g}")
            continue
        for name, text in (("blocks", adapter.blocks), ("steps", adapter.steps)):
            if _is_choice({**choice, name: text}):
                choice[name] = text
            else:
                left_out.append(f"{name} {text[:60]!r} of {kind} {adapter.name[:100]}")
        used.add(path)
        yield choice


def _is_choice(choice: Mapping[str, Any]) -> bool:
    try:
        make_request(prompt="", adapters=[choice])
    except ConfigError:
        return False
    return True


def _refused(values: Mapping[str, Any], error: ConfigError) -> str:
    """Return what is left out and why, in few words."""
    shown = " ".join(f"{name} {str(value)[:40]}" for name, value in values.items())
    reason = first_line(error).removeprefix("request: ")
    return shown if reason.startswith("unknown key") else f"{shown} ({reason})"

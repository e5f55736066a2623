"""Replay: a picture made again from its recipe, compared pixel by pixel, with a name for whatever was not the same."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdlora.config import BaseSection, validated
from sdlora.diffusion import Prediction
from sdlora.errors import PICTURE_DAMAGE, ConfigError, FormatError, GenerationError, first_line
from sdlora.families.registry import default_device
from sdlora.generation.engine import Engine, OnStep
from sdlora.generation.foreign.recipe import without_choices
from sdlora.generation.memory import Offload
from sdlora.generation.pictures.files import Compression, pixel_options, read_recipe
from sdlora.generation.pictures.texts import SAVED_AS, read_texts
from sdlora.generation.recipe import Recipe, UsedAdapter
from sdlora.generation.replay.find_base import FindBase
from sdlora.generation.replay.find_input import FindInput, input_finder, input_settings
from sdlora.generation.request import AdapterChoice, GenerationRequest, make_request
from sdlora.storage import user_path

FindAdapter = Callable[[UsedAdapter], Path]
"""Where the adapter of that SHA-256 lies, or of that tensors' SHA-256; raises SdloraError where it is not there."""
_PROMPTS = ("prompt", "negative_prompt", "template", "negative_template")
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}
_NOT_SAID = object()


@dataclass(frozen=True)
class Comparison:
    """How two pictures of one size differ."""

    pixels: int
    differing: int
    """Pixels of which any channel is another one."""
    largest: int
    """The largest difference of a channel, of 255."""

    @property
    def identical(self) -> bool:
        """Whether no pixel differs."""
        return self.differing == 0


@dataclass(frozen=True)
class Replayed:
    """A picture made again."""

    picture: Image.Image
    recipe: Recipe
    """What ran now, with the prompts as they were written."""
    comparison: Comparison
    differences: tuple[str, ...]
    """What was not as the recipe says, a few words each."""
    notes: tuple[str, ...] = ()
    """What should be known of the base, a sentence each."""


def replay(
    path: Path | str,
    find_base: FindBase,
    find_adapter: FindAdapter,
    find_input: FindInput | None = None,
    *,
    device: str | None = None,
    offload: Offload = "none",
    on_step: OnStep | None = None,
) -> Replayed:
    """Return the picture of a file made again from its recipe, and how it differs.

    Pictures that it was made from are looked for beside it, unless `find_input` says where. It is made on the kind of
    device, in the precision and by every setting that the recipe names; `offload` is as of `Engine`. A lossy file's picture
    is compared after the same compression. Raises FormatError for a file without recipe, ModelError or FormatError for a base
    or an adapter that is not there, GenerationError where it cannot be made.
    """
    path = user_path(path)
    then, kept = read_recipe(path), read_pixels(path)
    base = find_base(then)
    places = {item.sha256: find_adapter(item) for item in then.adapters}
    request = request_of(then, places, find_input or input_finder([path.parent]))
    engine = Engine(base_section(then, base), device=device or _device_of(then), offload=offload)
    (picture, now), *_ = engine.generate(request, on_step=on_step)
    comparison = compare(kept, _as_saved(picture, path))
    shown = replace(now, **{name: getattr(then, name) for name in _PROMPTS})
    return Replayed(picture, shown, comparison, tuple(differences(then, shown)), tuple(engine.base.notes))


# --- from a recipe to what makes it again -----------------------------------------------------------


def request_of(recipe: Recipe, places: Mapping[str, Path], find_input: FindInput) -> GenerationRequest:
    """Return the request for one picture, exactly as the recipe says; `places` has adapters' files by SHA-256.

    Every setting that recipes and requests have in common is the recipe's. Choices of the prompts were made. Raises
    GenerationError for a recipe that no request says.
    """
    common = GenerationRequest.model_fields.keys() & {item.name for item in fields(Recipe)}
    values = {name: getattr(recipe, name) for name in common} | {"noise": recipe.noise_device}
    values |= input_settings(recipe, find_input)
    if recipe.emphasis != "none":  # where everything is text, nothing is chosen
        values |= {name: without_choices(values[name]) for name in ("prompt", "negative_prompt")}
    values["adapters"] = [_choice(item, places[item.sha256]) for item in recipe.adapters]
    try:
        return make_request(**values)
    except ConfigError as error:
        raise GenerationError(f"the recipe cannot be followed: {first_line(error)}") from error


def _choice(item: UsedAdapter, path: Path) -> dict[str, Any]:
    common = AdapterChoice.model_fields.keys() & {known.name for known in fields(UsedAdapter)}
    return {name: getattr(item, name) for name in common} | {"path": str(path)}


def base_section(recipe: Recipe, found: BaseSection) -> BaseSection:
    """Return how a base is loaded as the recipe says."""
    prediction = _PREDICTIONS.get(str(recipe.scheduler_config.get("prediction_type")), "auto")
    more = {"precision": recipe.precision, "quantize": recipe.quantize, "prediction": prediction}
    return validated(BaseSection, found.model_dump() | more, "base")


def _device_of(recipe: Recipe) -> str:
    """Return the kind of device that a recipe names, as far as there is one here."""
    return recipe.device if recipe.device in ("cpu", "mps") else str(default_device())


# --- comparing ---------------------------------------------------------------------------------------


def read_pixels(path: Path) -> np.ndarray:
    """Return a picture's pixels [H,W,3]. Raises FormatError where they cannot be decoded."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (*PICTURE_DAMAGE, Image.DecompressionBombError) as error:
        raise FormatError(f"{path}: cannot be read as a picture ({first_line(error)})") from error


def compare(one: np.ndarray, other: np.ndarray) -> Comparison:
    """Return how two pictures [H,W,3] differ. Raises GenerationError for two sizes."""
    if one.shape != other.shape:
        sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (one, other)]
        raise GenerationError(
            f"the file has {sizes[0]} pixels, its recipe makes {sizes[1]}: it was scaled or cut since"
        )
    difference = np.abs(one.astype(np.int16) - other.astype(np.int16)).max(axis=2)
    return Comparison(difference.size, int(np.count_nonzero(difference)), int(difference.max(initial=0)))


def _as_saved(picture: Image.Image, path: Path) -> np.ndarray:
    """Return a picture's pixels after the compression that a file went through."""
    carried = read_texts(path)
    if SAVED_AS not in carried.texts:
        return np.asarray(picture.convert("RGB"))
    try:
        said = json.loads(carried.texts[SAVED_AS])
        options = pixel_options(carried.format, Compression(int(said["quality"]), bool(said["lossless"])))
        stream = io.BytesIO()
        picture.save(stream, format=carried.format, **options)
        with Image.open(stream) as saved:
            return np.asarray(saved.convert("RGB"))
    except (*PICTURE_DAMAGE, RecursionError):
        return np.asarray(picture.convert("RGB"))


def differences(then: Recipe, now: Recipe) -> Iterator[str]:
    """Yield what two recipes say differently, prompts aside: "torch: 2.12.0 then, 2.13.0 now"."""
    before, after = asdict(then), asdict(now)
    for name in (item.name for item in fields(Recipe) if item.name not in (*_PROMPTS, "adapters")):
        if isinstance(before[name], dict):
            yield from _different_keys("" if name == "versions" else f"{name}.", before[name], after[name])
        elif before[name] != after[name]:
            yield f"{name}: {before[name]} then, {after[name]} now"
    for number, (old, new) in enumerate(zip(before["adapters"], after["adapters"], strict=False)):
        yield from _different_keys(f"adapter {then.adapters[number].name}: ", old, new)


def _different_keys(where: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*before, *after]):
        old, new = (_plain(said.get(key, _NOT_SAID)) for said in (before, after))
        if old != new:
            yield f"{where}{key}: {_shown(old)} then, {_shown(new)} now"


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value  # JSON knows no tuples


def _shown(value: object) -> str:
    text = "not said" if value is _NOT_SAID else str(value)
    return text if len(text) <= 64 else f"{text[:61]}..."

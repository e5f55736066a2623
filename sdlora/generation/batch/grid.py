"""Grids: axes with the values that a setting takes in turn, and the product of several."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from sdlora.errors import ConfigError
from sdlora.generation.batch.job_fields import field_of, over, place_of
from sdlora.storage import user_path

MOST_PICTURES = 1_000_000
"""Of a batch: a larger product is a mistake."""
REPLACE = "replace"
"""Search and replace in prompts: the first value is looked for, and each takes its place, the first too."""
_REPLACE_NAMES = ("replace", "prompt_sr", "prompt_s/r", "sr", "s/r")
_NUMBERS = {
    "seed", "count", "steps", "guidance_scale", "width", "height", "clip_skip", "weight",
    "guidance_rescale", "strength", "hires_scale", "hires_steps", "hires_strength", "mask_blur", "masked_padding",
}  # fmt: skip
"""Settings of which 1..8 is a range; of others it is text."""
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*\.\.\s*({_NUMBER})\s*(?::\s*({_NUMBER}))?\s*")


@dataclass(frozen=True)
class Axis:
    """A setting and the values that it takes in turn."""

    name: str
    """The setting's, as people named it; of search and replace with what is looked for."""
    field: str
    values: tuple[Any, ...]

    def put(self, values: Mapping[str, Any], place: int) -> dict[str, Any]:
        """Return a job's values with this axis at one of its places. Raises ConfigError where nothing can be replaced."""
        chosen = self.values[place]
        if self.field != REPLACE:
            return over(values, {self.field: chosen})
        searched = self.values[0]
        texts = {key: str(values[key]) for key in ("prompt", "negative_prompt") if values.get(key)}
        if not any(searched in text for text in texts.values()):
            raise ConfigError(f"the prompt does not hold {searched!r}, which {self.name!r} is to replace")
        return {**values, **{key: text.replace(searched, chosen) for key, text in texts.items()}}


Together = tuple[Axis, ...]
"""Axes that advance together, equally long; most often one."""
Point = tuple[tuple[str, str], ...]
"""((axis, label), ...): where in a grid a picture is."""


def parse_axis(text: str) -> Axis:
    """Return the axis of "seed=1..8", "steps=20,30", 'prompt="a cat, big",a dog', "prompt=@file", "replace=cat,dog".

    Values are parted by commas, quoted where they hold some; 1..8 and 0.2..1.0:0.2 are ranges, ends included. Raises
    ConfigError for anything else.
    """
    name, equals, values = text.partition("=")
    if not equals or not name.strip() or not values.strip():
        raise ConfigError(f"--grid {text!r} is no axis; expected for example 'seed=1..8' or 'steps=20,30'")
    if values.strip().startswith("@"):
        return make_axis(name.strip(), _lines(Path(values.strip()[1:])))
    try:
        (cells,) = csv.reader([" ".join(values.splitlines())], skipinitialspace=True)
    except csv.Error as error:
        raise ConfigError(
            f"--grid {name.strip()}: its values cannot be told apart ({error}); put them into a file"
        ) from error
    return make_axis(name.strip(), [cell.strip() for cell in cells])


def make_axis(name: str, values: Sequence[Any], folder: Path | None = None) -> Axis:
    """Return the axis of a setting, ranges and "@file" among its values written out; files are looked for as `place_of` says.

    Raises ConfigError for an unknown setting, a range that is none, and too many values.
    """
    if name.strip().lower().replace(" ", "_") in _REPLACE_NAMES:
        texts = tuple(str(value) for value in values)
        if len(texts) < 2 or not texts[0]:
            raise ConfigError(f"{name} has nothing to put in; expected for example 'replace=red,green,blue'")
        return Axis(f"{REPLACE} {texts[0]}", REPLACE, texts)
    field = field_of(name)
    made: list[Any] = []
    for value in values:
        if isinstance(value, str) and value.startswith("@") and field in ("prompt", "negative_prompt"):
            made += _lines(Path(place_of(value[1:], folder or Path())))
        elif isinstance(value, str) and field in _NUMBERS and ".." in value:
            made += _range(name, value)
        else:
            made.append(value)
    if not made:
        raise ConfigError(f"{name} has no values")
    return Axis(name, field, tuple(made))


def product_size(axes: Sequence[Together]) -> int:
    """Return how many points a grid has."""
    return math.prod(len(group[0].values) for group in axes)


def grid_points(axes: Sequence[Together], values: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Point]]:
    """Yield a job's values at every point of the grid, with the point; the first axis changes least often.

    What is replaced in prompts is replaced last. Raises ConfigError as `Axis.put`.
    """
    for places in itertools.product(*(range(len(group[0].values)) for group in axes)):
        placed = [(axis, place) for group, place in zip(axes, places, strict=True) for axis in group]
        made = dict(values)
        for axis, place in sorted(placed, key=lambda item: item[0].field == REPLACE):
            made = axis.put(made, place)
        yield made, tuple((axis.name, label(axis.values[place])) for axis, place in placed)


def refuse_doubles(axes: Sequence[Together]) -> None:
    """Raise ConfigError where two axes change one setting, or some that advance together have other lengths."""
    names: set[str] = set()
    for group in axes:
        for axis in group:
            key = axis.name if axis.field == REPLACE else axis.field
            if key in names:
                raise ConfigError(f"{axis.name} is an axis twice; put all its values into one")
            names.add(key)
        lengths = {axis.name: len(axis.values) for axis in group}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ConfigError(f"axes that advance together must have equally many values; {told}")


def _range(name: str, text: str) -> list[int | float]:
    match = _RANGE.fullmatch(text)
    step = abs(Decimal(match[3])) if match and match[3] else Decimal(1)
    if match is None or step == 0:
        raise ConfigError(f"{name}: {text!r} is no range; expected for example 1..8 or 0.2..1.0:0.2")
    first, last = Decimal(match[1]), Decimal(match[2])
    count = int(abs(last - first) / step) + 1
    if count > MOST_PICTURES:
        raise ConfigError(f"{name}: {text!r} has {count:,} values; a batch has at most {MOST_PICTURES:,} pictures")
    step = step if last >= first else -step
    numbers = [first + place * step for place in range(count)]
    whole = all(number == number.to_integral_value() for number in numbers)
    return [int(number) if whole else float(number) for number in numbers]


def _lines(file: Path) -> list[str]:
    """Return the lines of a text file; empty ones and those that begin with # do not count."""
    try:
        text = user_path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as a text file ({error})") from error
    lines = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
    if not lines:
        raise ConfigError(f"{file}: holds no lines")
    return lines


def label(value: Any) -> str:
    """Return what is written beside the pictures of a value; of adapters their names and weights."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        name = Path(str(value.get("path", value.get("name", "")))).stem
        weight = f":{value['weight']}" if "weight" in value else ""
        return f"{name}{weight}" + "".join(f" {key} {value[key]}" for key in ("blocks", "steps") if value.get(key))
    if isinstance(value, list | tuple):
        return ", ".join(map(label, value)) or "none"
    text = str(value)
    return re.sub(r"[^;]*[/\\]", "", text).replace(".safetensors", "") if ".safetensors" in text else text

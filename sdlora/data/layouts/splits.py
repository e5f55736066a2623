"""The parts that a data set comes in: for training, validation and test."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath

from sdlora.errors import DataError

_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {name: split for split, names in _NAMES.items() for name in names}


def plain_split(name: str) -> str:
    """Return the usual name of a split: "val" is "validation"."""
    return _SPLIT_OF.get(name.lower(), name)


def split_of_folder(path: PurePath, wanted: str) -> str:
    """Return the split of a file by the first folder on its way, "train" where that names none."""
    first = path.parts[0] if len(path.parts) > 1 else ""
    return plain_split(first) if first == wanted or first.lower() in _SPLIT_OF else "train"


def split_of_name(path: PurePath, wanted: str) -> str:
    """Return the split of a shard by a word in its folders' names or its own, "train" where there is none."""
    for part in path.parts:
        for word in re.split(r"[-._ 0-9]+", part):
            if word.lower() in _SPLIT_OF:
                return _SPLIT_OF[word.lower()]
        if wanted and re.match(rf"{re.escape(wanted)}(?![a-zA-Z])", part):
            return wanted
    return "train"


def choose_split(wanted: str, found: Iterable[str], where: str) -> str:
    """Return the one of the found splits that data.split means. Raises DataError, which names them."""
    found = list(dict.fromkeys(found))
    for name in (wanted, plain_split(wanted)):
        if name in found:
            return name
    names = ", ".join(f'"{name}"' for name in found)
    raise DataError(f'{where}: has no split "{wanted}"; data.split must be one of {names}')


def left_out(counts: Mapping[str, int], chosen: str, unit: str) -> list[str]:
    """Return a note of what the other splits hold, where there are any."""
    others = [f"{name} ({count} {unit}{'s' * (count != 1)})" for name, count in counts.items() if name != chosen]
    return [f'only the split "{chosen}" is used; data.split can name another: {", ".join(others)}'] if others else []

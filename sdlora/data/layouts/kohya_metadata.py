"""Fine-tune metadata of kohya's trainer: one JSON file with the caption and tags of every picture.

{"name or path": {"caption": "...", "tags": "...", "train_resolution": [width, height]}}, or JSON lines with
the path as "image_path". Read as FineTuningDataset in library/train_util.py of kohya-ss/sd-scripts does,
with one difference: tags are added to every line of a caption of several lines, and are the caption
where there is no other, whether or not wildcards are on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdlora.config import ConceptSection
from sdlora.data.layouts.listing import Group, Listed, Listing, is_picture, pictures_in
from sdlora.errors import DataError, first_line

NAME = "kohya-metadata"
_LOOKED_AT_BYTES = 1 << 16
_FIRST_ENTRY = re.compile(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{')
_ENTRY_KEY = re.compile(r'"(caption|tags|train_resolution)"\s*:')
_USED = {"caption", "tags", "train_resolution"}
# Sizes that are measured anew, and traces of encoded pictures, which are encoded anew.
_NOT_NEEDED = {"image_size", "resolution", "abs_path", "latents", "latents_npz", "latents_npz_flipped", "bucket_reso"}


def recognises(path: Path) -> bool:
    """Return whether it is a .json file of entries with captions, or a .jsonl file with "image_path"."""
    suffix = path.suffix.lower()
    if suffix not in {".json", ".jsonl"} or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT_BYTES).decode("utf-8-sig", errors="replace")
    if suffix == ".jsonl":
        return '"image_path"' in start.partition("\n")[0]
    return bool(_FIRST_ENTRY.match(start) and _ENTRY_KEY.search(start))


def read(settings: ConceptSection, problems: list[str]) -> Listing:
    """Return the pictures of the file as one concept; relative names are looked for beside it."""
    file = Path(settings.folder).expanduser()
    folder = file.absolute().parent
    pictures, notes = list_entries(file, folder, settings.captions.separator, problems)
    return Listing("kohya metadata", [Group(settings.model_copy(update={"folder": str(folder)}), pictures)], notes)


def list_entries(file: Path, folder: Path, separator: str, problems: list[str]) -> tuple[list[Listed], list[str]]:
    """Return the pictures of a metadata file, in its order, and notes; relative names are looked for in `folder`.

    Raises DataError when the file cannot be read, or not one of its pictures is found.
    """
    entries = _load(file)
    finder = _Finder(folder)
    pictures: list[Listed] = []
    missing: list[str] = []
    unknown: dict[str, str] = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            problems.append(f'{file}: entry "{name}" is not an object with "caption" or "tags"; correct or remove it')
            continue
        for key in entry.keys() - _USED - _NOT_NEEDED:
            unknown.setdefault(key, name)
        path = finder.find(name)
        if path is None:
            missing.append(name)
            continue
        where = f'{file}: entry "{name}"'
        lines = _lines(entry, where, separator, problems)
        pictures.append(Listed(path, lines, train_size=_train_size(entry, where, problems)))
    if missing and not pictures:
        raise DataError(
            f'{file}: none of its {len(entries)} pictures is found, such as "{missing[0]}" in {folder}; '
            "put the file beside its pictures, or correct its paths"
        )
    problems += [
        f'{file}: entry "{name}" has no picture in {folder}; restore it or remove the entry' for name in missing
    ]
    return pictures, list(_notes(file, pictures, unknown))


def _notes(file: Path, pictures: list[Listed], unknown: Mapping[str, str]) -> list[str]:
    notes = [f'{file}: "{key}" is not used (first in entry "{unknown[key]}")' for key in sorted(unknown)]
    if sized := sum(picture.train_size is not None for picture in pictures):
        notes.append(
            f"{file}: train_resolution gives the size at which {sized} of {len(pictures)} pictures are trained"
        )
    return notes


def _load(file: Path) -> dict[str, Any]:
    """Return {name: entry}. Raises DataError."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            entries = {row.pop("image_path"): row for row in rows}
        else:
            entries = json.loads(text)
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror or error}); restore it or correct its path"
        ) from error
    except (KeyError, AttributeError, TypeError) as error:
        raise DataError(
            f'{file}: holds lines that are not objects with "image_path"; correct or remove them'
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is not valid JSON ({first_line(error)}); correct it") from error
    if not isinstance(entries, dict) or not entries:
        raise DataError(f'{file}: has no entries; expected {{"picture": {{"caption": "..."}}}}')
    return entries


class _Finder:
    """Finds the pictures that entries are named after: by path, or by name without its suffix."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_stem: dict[Path, dict[str, Path]] = {}

    def find(self, name: Any) -> Path | None:
        """Return the picture. An absolute path is taken as it is, others are below the folder."""
        if not isinstance(name, str) or not name:
            return None
        path = self._folder / name
        try:
            if is_picture(path):
                return path
            if path.parent not in self._by_stem:
                # The first of several suffixes counts, as in kohya's trainer.
                inside = reversed(pictures_in(path.parent)) if path.parent.is_dir() else ()
                self._by_stem[path.parent] = {picture.stem: picture for picture in inside}
        except (OSError, ValueError):  # no path that a file could have
            return None
        return self._by_stem[path.parent].get(path.name)


def _lines(entry: Mapping[str, Any], where: str, separator: str, problems: list[str]) -> tuple[str, ...] | None:
    """Return the lines of caption and tags together; None where there is neither."""
    texts = {}
    for key in ("caption", "tags"):
        value = entry.get(key)
        if isinstance(value, str):
            texts[key] = [line.strip() for line in value.splitlines() if line.strip()]
        elif value is not None:
            problems.append(f"{where}: {key} is {json.dumps(value)[:60]}; expected a text in quotes")
    if not texts:
        return None
    captions, tags = texts.get("caption", []), texts.get("tags", [])
    if captions and tags:
        return tuple(f"{line}{separator}{separator.join(tags)}" for line in captions)
    return tuple(captions or tags) or ("",)


def _train_size(entry: Mapping[str, Any], where: str, problems: list[str]) -> tuple[int, int] | None:
    value = entry.get("train_resolution")
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        width, height = value
        if width % 8 == 0 and height % 8 == 0:
            return width, height
    problems.append(
        f"{where}: train_resolution is {json.dumps(value)[:60]}; expected [width, height], both multiples of 8"
    )
    return None

"""What the columns and cells of a table mean: which holds the captions, and which file a name leads to."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from sdlora.config import ConceptSection
from sdlora.errors import DataError

Kind = Literal["text", "picture", "bytes", "other"]
"""text: strings, or lists of them; picture: known to hold pictures; bytes: may hold them."""

NEEDS_EXTRA = 'needs a package that is not installed: pip install "sdlora[datasets]"'

_CAPTION_NAMES = ("text", "caption", "captions", "prompt", "prompts", "description", "txt")
_PICTURE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")


def caption_column(kinds: Mapping[str, Kind], settings: ConceptSection, where: str) -> str | None:
    """Return the column of captions; None where there is no text, and none is needed.

    Raises DataError, which names the columns, where the setting names a wrong one or the choice is open.
    """
    if settings.caption_from in {"filename", "instance"}:
        return None
    texts = [name for name, kind in kinds.items() if kind == "text"]
    if wanted := settings.caption_column:
        if wanted not in texts:
            fault = "holds no text" if wanted in kinds else "does not exist"
            raise DataError(f'{where}: column "{wanted}" {fault}; data.caption_column must be {_choice(texts, kinds)}')
        return wanted
    found = _known(texts, _CAPTION_NAMES)
    if found or len(texts) == 1:
        return found or texts[0]
    if texts:
        raise DataError(f"{where}: has several columns of text; data.caption_column must be {_choice(texts, kinds)}")
    if settings.caption:
        return None
    raise DataError(f"{where}: has no column of text ({_columns(kinds)}); add one, or set data.caption")


def picture_column(kinds: Mapping[str, Kind], settings: ConceptSection, where: str) -> str:
    """Return the column of pictures. Raises DataError, which names the columns, where there is not just one."""
    if wanted := settings.image_column:
        if wanted not in kinds:
            raise DataError(
                f'{where}: column "{wanted}" does not exist; data.image_column must be {_choice([], kinds)}'
            )
        if kinds[wanted] == "other":
            raise DataError(f'{where}: column "{wanted}" holds no pictures; data.image_column must name one that does')
        return wanted
    for kind in ("picture", "bytes"):
        columns = [name for name, its_kind in kinds.items() if its_kind == kind]
        found = _known(columns, _PICTURE_NAMES)
        if found or len(columns) == 1:
            return found or columns[0]
        if columns:
            raise DataError(
                f"{where}: has several columns of pictures; data.image_column must be {_choice(columns, kinds)}"
            )
    raise DataError(f"{where}: has no column of pictures ({_columns(kinds)}); data.image_column can name one")


def file_name_column(kinds: Mapping[str, Kind], settings: ConceptSection, where: str) -> str:
    """Return the column that names the picture files, "file_name" or "image_file_name" unless the setting names it.

    Raises DataError, which names the columns, where there is none.
    """
    if wanted := settings.image_column:
        names = [name for name in (wanted, f"{wanted}_file_name") if name in kinds]
        if not names:
            raise DataError(
                f'{where}: column "{wanted}" does not exist; data.image_column must be {_choice([], kinds)}'
            )
        return names[0]
    for name in ("file_name", "image_file_name"):
        if name in kinds:
            return name
    raise DataError(
        f'{where}: has no column "file_name" or "image_file_name" ({_columns(kinds)}); '
        "rename the one that names the pictures, or set data.image_column"
    )


def caption_lines(value: object) -> tuple[str, ...] | None:
    """Return the caption in a cell, on one line; of a list, each as an alternative; None for null and an empty list.

    Raises TypeError for anything that is not text.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return (" ".join(line.strip() for line in value.splitlines() if line.strip()),)
    if isinstance(value, list) and all(isinstance(item, str | None) for item in value):
        lines = [line for item in value for line in caption_lines(item) or ()]
        return (tuple(line for line in lines if line) or ("",)) if lines else None
    raise TypeError(type(value).__name__)


def file_below(folder: Path, name: str) -> Path | None:
    """Return the path that a table means by `name`; None where it would lead out of the folder."""
    name = name.replace("\\", "/")
    outside = name.startswith("/") or "://" in name or name[1:2] == ":" or ".." in name.split("/")
    if not name or outside or "\0" in name:
        return None
    return folder / name


def same_name(path: Path) -> str:
    """Return a form of the path that is equal for the two ways of writing accents in file names."""
    return unicodedata.normalize("NFC", str(path))


def _known(columns: list[str], names: tuple[str, ...]) -> str | None:
    """Return the column whose name comes first among the usual ones."""
    by_name = {column.lower(): column for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)


def _choice(columns: list[str], kinds: Mapping[str, Kind]) -> str:
    return "one of " + ", ".join(f'"{name}"' for name in columns or kinds) if kinds else "empty, as there are none"


def _columns(kinds: Mapping[str, Kind]) -> str:
    return "its columns: " + (", ".join(f'"{name}"' for name in kinds) or "none")

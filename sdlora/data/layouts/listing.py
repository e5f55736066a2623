"""What every layout gives: groups of pictures, each group under the settings of its concept."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sdlora.config import CaptionsSection, ConceptSection, MasksSection
from sdlora.data.sample import RowReader

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".avif", ".gif", ".tif", ".tiff"}
MASK_ENDING = "-masklabel"
"""How the name of a mask beside its picture ends, before the suffix."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One picture as a layout lists it."""

    path: Path
    lines: tuple[str, ...] | None
    """Its caption, or several to draw from; an empty one is ("",). None: the layout has none for it."""
    mask: Path | None = None
    train_size: tuple[int, int] | None = None
    """Width and height that the layout prescribes, in pixels."""
    rows: RowReader | None = None
    row: int = 0


@dataclass(frozen=True)
class Group:
    """The pictures of one concept, in order, and the settings that hold for them."""

    settings: ConceptSection
    pictures: Sequence[Listed]
    prior: bool = False
    """Whether they show other things, for prior preservation."""


@dataclass(frozen=True)
class Listing:
    """All that a layout found in one place."""

    title: str
    """What the layout is called in the summary: "kohya folders"."""
    groups: Sequence[Group]
    notes: Sequence[str] = ()
    """What a person should know about how it was read; one sentence each."""


class Layout(Protocol):
    """One way of keeping pictures; a module of this package is one."""

    NAME: str
    """As in data.layout."""

    def recognises(self, path: Path) -> bool:
        """Return whether what lies at `path` is of this layout; looks at names and first bytes, reads no picture."""
        ...

    def read(self, settings: ConceptSection, problems: list[str]) -> Listing:
        """Return what is at `settings.folder`; every fault of a file is a sentence more in `problems`.

        Raises DataError when nothing can be read there at all.
        """
        ...


def prior_settings(settings: ConceptSection) -> ConceptSection:
    """Return the settings for pictures of other things: cut as the others are, but nothing of the subject's text."""
    own = {
        "caption": settings.class_prompt,
        "caption_from": "auto" if settings.caption_from == "instance" else settings.caption_from,
        "captions": CaptionsSection(dropout=settings.captions.dropout),
        "masks": MasksSection(source="none"),
        "held_out": 0.0,
        "weight": 1.0,
    }
    return settings.model_copy(update=own)


def pictures_below(folder: Path, problems: list[str] | None = None) -> list[Path]:
    """Return the sorted picture files in `folder` and its subfolders, hidden ones and masks left out.

    Linked folders are followed, each once. A folder that cannot be read is a problem.
    """

    def refuse(error: OSError) -> None:
        if problems is not None:
            problems.append(f"{error.filename}: cannot be read ({error.strerror}); make it readable, or move it away")

    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [path for name in files if not name.startswith(".") and is_picture(path := Path(place, name))]
    return sorted(found)


def pictures_in(folder: Path) -> list[Path]:
    """Return the sorted picture files in `folder` itself, hidden ones and masks left out."""
    return sorted(path for path in folder.iterdir() if is_picture(path) and not path.name.startswith("."))


def is_picture(path: Path) -> bool:
    """Return whether the name is that of a picture, and not of a mask, and a file is there."""
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.stem.endswith(MASK_ENDING) and path.is_file()


def caption_beside(picture: Path, suffixes: Iterable[str], problems: list[str]) -> tuple[str, ...] | None:
    """Return the lines of the caption file beside a picture, ("",) of an empty one, None where there is none."""
    for suffix in suffixes:
        file = picture.with_suffix(suffix if suffix.startswith(".") else f".{suffix}")
        if file.is_file():
            return read_lines(file, problems)
    return None


def read_lines(file: Path, problems: list[str]) -> tuple[str, ...]:
    """Return the lines of a text file that are not blank, stripped; ("",) where there are none."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        problems.append(f"{file}: cannot be read ({error.strerror or error}); make it readable, or remove it")
        return ("",)
    except UnicodeDecodeError as error:
        problems.append(f"{file}: cannot be read as UTF-8 text ({error}); save it as UTF-8")
        return ("",)
    return tuple(line for line in lines if line) or ("",)

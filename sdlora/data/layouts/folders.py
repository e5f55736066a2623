"""A folder of pictures with its subfolders: captions in files beside them, or in one file of a folder."""

from __future__ import annotations

from pathlib import Path

from sdlora.config import ConceptSection
from sdlora.data.layouts.listing import (
    PICTURE_SUFFIXES,
    Group,
    Listed,
    Listing,
    caption_beside,
    pictures_below,
    read_lines,
)
from sdlora.errors import DataError

NAME = "folder"
_COMMON_CAPTION = "default.txt"


def recognises(path: Path) -> bool:
    """Return True for every folder: this is how one is read that is nothing else."""
    return path.is_dir()


def read(settings: ConceptSection, problems: list[str]) -> Listing:
    """Return all pictures below the folder as one concept."""
    folder = Path(settings.folder).expanduser()
    pictures = pictures_below(folder, problems)
    if not pictures:
        raise DataError(explain_empty(folder))
    common: dict[Path, tuple[str, ...] | None] = {}
    listed = []
    for path in pictures:
        lines = caption_beside(path, settings.caption_suffixes, problems)
        if lines is None:
            if path.parent not in common:
                common[path.parent] = _common_caption(path.parent, problems)
            lines = common[path.parent]
        listed.append(Listed(path, lines))
    used = sum(lines is not None for lines in common.values())
    note = f"{_COMMON_CAPTION} gives the caption of pictures without their own in {used} folder{'s' * (used != 1)}"
    nested = any(path.parent != folder for path in pictures)
    return Listing(f"folder{' with subfolders' * nested}", [Group(settings, listed)], [note] if used else [])


def explain_empty(folder: Path) -> str:
    """Return the sentence for a folder without pictures."""
    others = sorted({path.suffix.lower() or "no suffix" for path in folder.rglob("*") if path.is_file()})
    seen = f"it holds files of type {', '.join(others[:5])}" if others else "it is empty"
    return f"{folder}: holds no pictures ({seen}); expected {', '.join(sorted(PICTURE_SUFFIXES))}"


def _common_caption(folder: Path, problems: list[str]) -> tuple[str, ...] | None:
    """Return the lines of the folder's default.txt, if it is not itself the caption of a picture."""
    file = folder / _COMMON_CAPTION
    if not file.is_file() or any(file.with_suffix(suffix).exists() for suffix in PICTURE_SUFFIXES):
        return None
    return read_lines(file, problems)

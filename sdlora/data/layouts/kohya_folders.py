"""Folders of kohya's trainer: "10_token class" gives repeats and, for pictures without one, the caption.

As in library/config_util.py of kohya-ss/sd-scripts: the name is split at "_", what stands before the
first is the number of repeats, the rest are the class tokens, and only pictures directly in such a
folder count. Two things are settled here: data.repeats multiplies the number, and data.caption, where
it is set, goes before the class tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sdlora.config import ConceptSection
from sdlora.data.layouts.listing import (
    Group,
    Listed,
    Listing,
    caption_beside,
    is_picture,
    pictures_in,
    prior_settings,
)
from sdlora.errors import DataError

NAME = "kohya-folders"
# A number that is no year and no place in a list: "2023_summer" and "01_front" are left to other layouts.
_CLEAR_NAME = re.compile(r"\s*(0|[1-9]\d{0,2})\s*_")
_IMAGES, _REGULARISATION = "img", "reg"
_NOT_PICTURES = {"log", "model"}
"""Folders in which kohya's page keeps what training made."""
PRIOR_NOTE = (
    "regularisation pictures are trained as data.prior says; kohya's trainer does it as with "
    'data.prior.target = "picture" and data.prior.ratio = 1'
)


def recognises(path: Path) -> bool:
    """Return whether it is a folder "10_name" of pictures, or holds some, itself or in img/."""
    return _is_numbered(path) or _holds_numbered(path) or _holds_numbered(path / _IMAGES)


def read(settings: ConceptSection, problems: list[str]) -> Listing:
    """Return one concept a folder; those in reg/ are for prior preservation.

    Pictures that kohya's trainer would leave out are a fault, and a note where the layout was asked for
    by name. Raises DataError where there are no such folders.
    """
    folder = Path(settings.folder).expanduser()
    reading = _Reading(settings, problems)
    faults = len(problems)
    if reading.repeats_of(folder) is not None and _holds_pictures(folder):
        reading.read_numbered(folder, prior=False)
    elif any(reading.repeats_of(inner) is not None for inner in _folders_in(folder)):
        reading.read_parent(folder, prior=False)
    elif (folder / _IMAGES).is_dir():
        reading.read_project(folder)
    if not reading.groups and len(problems) == faults:
        raise DataError(
            f'{folder}: holds no pictures in folders named like "10_token class"; name them so, '
            'or set data.layout to "folder"'
        )
    return Listing("kohya folders", reading.groups, reading.notes)


def list_folder(folder: Path, settings: ConceptSection, problems: list[str]) -> list[Listed]:
    """Return the pictures directly in a folder, each with the caption beside it."""
    return [Listed(path, caption_beside(path, settings.caption_suffixes, problems)) for path in pictures_in(folder)]


class _Reading:
    """The groups and notes found so far, in one place."""

    def __init__(self, settings: ConceptSection, problems: list[str]) -> None:
        self.settings = settings
        self.problems = problems
        self.asked_for = settings.layout == NAME
        self.groups: list[Group] = []
        self.notes: list[str] = []

    def repeats_of(self, folder: Path) -> int | None:
        """Return the number in the folder's name: as kohya reads it, or, where nobody asked for that, a clear one."""
        name = folder.absolute().name
        if self.asked_for:
            try:
                return max(0, int(name.split("_")[0]))
            except ValueError:
                return None
        match = _CLEAR_NAME.match(name)
        return int(match[1]) if match else None

    def read_project(self, folder: Path) -> None:
        """The folders in img/ and reg/ are groups; log/ and model/ are what training made."""
        self.read_parent(folder / _IMAGES, prior=False)
        if (folder / _REGULARISATION).is_dir():
            self.read_parent(folder / _REGULARISATION, prior=True)
            self.notes.append(PRIOR_NOTE)
        for inner in _folders_in(folder):
            if inner.name not in {_IMAGES, _REGULARISATION} | _NOT_PICTURES and self._is_overlooked(inner):
                self.notes.append(f"{inner}: is left out; of a project only {_IMAGES} and {_REGULARISATION} are read")

    def read_parent(self, parent: Path, *, prior: bool) -> None:
        """Every numbered folder in `parent` is a group."""
        if _holds_pictures(parent):
            self._leave_out(parent, "holds pictures beside its numbered folders", "move them into one")
        for folder in _folders_in(parent):
            if self.repeats_of(folder) is not None:
                self.read_numbered(folder, prior=prior)
            elif self._is_overlooked(folder):
                name = f'"10_{folder.name}"'
                self._leave_out(folder, f"holds pictures, but its name has no repeats as in {name}", "rename it")

    def read_numbered(self, folder: Path, *, prior: bool) -> None:
        """The pictures in `folder` are a group, with what its name says."""
        name = folder.absolute().name
        number, tokens = self.repeats_of(folder), name.partition("_")[2].strip()
        if not number:
            self.notes.append(f"{folder}: is left out, as its name says 0 repeats")
            return
        for inner in _folders_in(folder):
            if self._is_overlooked(inner):
                self._leave_out(inner, f"holds pictures, but below {name} no subfolders are read", "move them up")
        pictures = list_folder(folder, self.settings, self.problems)
        if not pictures:
            self.problems.append(f"{folder}: holds no pictures; put them directly into it, or remove it")
            return
        base = prior_settings(self.settings) if prior else self.settings
        repeats = number * base.repeats
        own = {"folder": str(folder.absolute()), "repeats": repeats, "caption": base.caption or tokens}
        self.groups.append(Group(base.model_copy(update=own), pictures, prior))
        self.notes.append(
            f"{name}: each picture comes {repeats} time{'s' * (repeats != 1)} in an epoch, as its name says"
        )

    def _is_overlooked(self, folder: Path) -> bool:
        """Return whether pictures lie below, other than masks that are named as such."""
        masks = self.settings.masks.folder
        if masks and folder.absolute() == Path(masks).expanduser().absolute():
            return False
        return any(
            is_picture(path) and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            for path in folder.rglob("*")
        )

    def _leave_out(self, folder: Path, what: str, fix: str) -> None:
        if self.asked_for:
            self.notes.append(f"{folder}: {what}; they are left out, as kohya's trainer does")
        else:
            self.problems.append(
                f'{folder}: {what}; {fix}, or set data.layout to "{NAME}" to leave them out as kohya\'s trainer '
                'does, or to "folder" to read all alike'
            )


def _is_numbered(path: Path) -> bool:
    return _CLEAR_NAME.match(path.absolute().name) is not None and _holds_pictures(path)


def _holds_numbered(path: Path) -> bool:
    return any(_is_numbered(inner) for inner in _folders_in(path))


def _holds_pictures(folder: Path) -> bool:
    return folder.is_dir() and any(is_picture(path) and not path.name.startswith(".") for path in folder.iterdir())


def _folders_in(folder: Path) -> Iterator[Path]:
    """Yield the folders in `folder`, sorted, hidden ones left out."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    yield from (path for path in inside if not path.name.startswith(".") and path.is_dir())

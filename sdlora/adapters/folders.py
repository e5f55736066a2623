"""Which adapters lie below a folder, and whether they changed. Needs no torch, so that listing is quick."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdlora.adapters.formats import peft
from sdlora.adapters.formats.places import COMPONENTS

SUFFIX = ".safetensors"
_SKIPPED_FOLDERS = {"checkpoints"}  # a run's training state, which is no adapter
_LATEST_NS = 2**63 - 1


@dataclass(frozen=True)
class AdapterState:
    """By what a changed adapter is known without being read."""

    signature: str
    """Size and time of change of each of its files."""
    modified_ns: int
    inode: str
    """What the system calls the file, which renaming does not change; "" of a folder."""
    changed: str
    """When the system last changed anything about each of its files, which no program can set."""


def adapters_below(folder: Path) -> list[Path]:
    """Return every .safetensors file below the folder, in place of those that PEFT wrote their folder, by name.

    Hidden files and folders are left out, and training states in `checkpoints`. Folders that are links are followed,
    each folder is looked into once, so that a loop of links ends.
    """
    return sorted({_adapter_of(file, folder) for file in _files(folder)})


def state_of(adapter: Path) -> AdapterState:
    """Return the state of a file, or of a folder of PEFT's. Raises OSError where it is gone."""
    if not adapter.is_dir():
        state = adapter.stat()
        own = f"{state.st_dev}:{state.st_ino}"
        return AdapterState(
            f"{state.st_size}:{state.st_mtime_ns}", _kept(state.st_mtime_ns), own, str(state.st_ctime_ns)
        )
    places = [adapter / name / file for name in ("", *COMPONENTS) for file in (peft.CONFIG, peft.WEIGHTS)]
    states = {str(place.relative_to(adapter)): place.stat() for place in places if place.is_file()}
    signature = ",".join(f"{name}:{state.st_size}:{state.st_mtime_ns}" for name, state in states.items())
    modified = max((state.st_mtime_ns for state in states.values()), default=0)
    changed = ",".join(f"{state.st_dev}:{state.st_ino}:{state.st_ctime_ns}" for state in states.values())
    return AdapterState(signature, _kept(modified), "", changed)


def _kept(nanoseconds: int) -> int:
    """Return the time as 64 bits hold it, which a file from after 2262 does not fit into."""
    return max(-_LATEST_NS - 1, min(nanoseconds, _LATEST_NS))


def _adapter_of(file: Path, folder: Path) -> Path:
    try:
        place = peft.folder_of(file) or file
    except OSError:  # its configuration is not ours to read
        return file
    return place if place.is_relative_to(folder) else file.parent  # the folder itself is a component of PEFT's


def _files(folder: Path) -> Iterator[Path]:
    waiting, linked = [folder], list[Path]()
    seen: set[tuple[int, int]] = set()
    while waiting or linked:
        place = waiting.pop() if waiting else linked.pop()  # links last, so that what they lead to goes by its own name
        try:
            state = place.stat()
            entries = list(os.scandir(place)) if (state.st_dev, state.st_ino) not in seen else []
        except OSError:  # gone, or not ours to read
            continue
        seen.add((state.st_dev, state.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                if entry.name not in _SKIPPED_FOLDERS:
                    (linked if entry.is_symlink() else waiting).append(Path(entry.path))
            elif entry.name.lower().endswith(SUFFIX) and _is_file(entry):
                yield Path(entry.path)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link into a folder that is not ours to read
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False

"""Where the files of a large data set lie, and what is listed of each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple


@dataclass(frozen=True)
class Origin:
    """One file of a data set, on this machine or elsewhere."""

    name: str
    """For messages."""
    open: Callable[[int], BinaryIO]
    """Opens it for reading at any place; from elsewhere, so many bytes are fetched at once."""
    path: Path | None = None
    """Where it lies on this machine."""
    version: str = ""
    """A text that is another one once the file's content is; "" where nothing tells."""
    errors: tuple[type[Exception], ...] = (OSError,)
    """What reading may fail with where the place is to blame."""

    @property
    def folder(self) -> Path | None:
        """The folder of the pictures that a table only names."""
        return self.path.parent if self.path else None


def local_origin(path: Path) -> Origin:
    """Return the origin of a file on this machine."""
    state = path.stat()
    version = f"{path.resolve()} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_size} {state.st_ino}"
    return Origin(str(path), lambda ahead: path.open("rb"), path, version)


class Row(NamedTuple):
    """One row that has a picture."""

    row: int
    """Its number in the file, from 0."""
    mark: str
    """What names it in messages."""
    lines: tuple[str, ...] | None
    """As in `Listed`."""

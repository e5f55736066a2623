"""The cache of encoded data as a whole: where it lies, how large it is, what of it may go."""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from sdlora.config import DataSection
from sdlora.data.store import SECONDS_IN_USE, shards_in
from sdlora.storage import cache_folder

Kind = Literal["pictures", "captions"]
"""What is encoded; each kind has a folder, in which each encoder has a store."""
_STORE_NAME = re.compile(r"[0-9a-f]{16}")
_CLASS_PICTURES = "class-pictures"
_SECONDS_ABANDONED = 3600.0
_HALF_WRITTEN = ".writing-"
"""How names of files begin that storage.atomic_path has not finished."""


def data_cache(section: DataSection) -> Path:
    """Return the folder of encoded pictures and captions."""
    return Path(section.cache.folder).expanduser() if section.cache.folder else cache_folder() / "data"


def index_file(cache: Path) -> Path:
    """Return the file in which it is remembered what is known of picture files."""
    return cache / "files.sqlite3"


def store_folder(cache: Path, kind: Kind, encoder: Sequence[object]) -> Path:
    """Return the folder for what an encoder makes; `encoder` is all that its results depend on."""
    return cache / kind / hashlib.sha256(repr(tuple(encoder)).encode()).hexdigest()[:16]


def class_pictures_folder(cache: Path, name: str) -> Path:
    """Return the folder of the pictures that a base made of one class prompt."""
    return cache / _CLASS_PICTURES / name


@dataclass(frozen=True)
class CacheSize:
    """How many files of a cache, and their bytes."""

    files: int
    bytes: int


def measure_cache(cache: Path) -> CacheSize:
    """Return how much encoded pictures, captions and class pictures take."""
    return _total([*_shards(cache), *_entries(_class_pictures(cache))])


def trim_cache(cache: Path, limit_bytes: int, keep: Collection[Path] = ()) -> CacheSize:
    """Return what was removed so that encoded pictures and captions take at most `limit_bytes`.

    Those used least recently go first; those in `keep`, and those that any process used in the last half
    hour, stay whatever the limit.
    """
    kept = set(keep)
    entries = sorted(_shards(cache))
    excess = sum(entry.size for entry in entries) - limit_bytes
    removed = []
    for entry in entries:
        if excess <= 0:
            break
        if entry.path not in kept and not entry.in_use:
            excess -= entry.size
            removed.append(entry)
    return _remove(removed)


def clear_cache(cache: Path, *, force: bool = False) -> CacheSize:
    """Return what was removed: encoded pictures and captions, class pictures, and what killed processes left.

    What a run used in the last half hour stays, unless `force` is set. Nothing else in the folder is touched.
    """
    half_written = _entries(path for store in _stores(cache) for path in store.glob(f"{_HALF_WRITTEN}*"))
    abandoned = [entry for entry in half_written if time.time() - entry.used > _SECONDS_ABANDONED]
    idle = [entry for entry in [*_shards(cache), *_entries(_class_pictures(cache))] if force or not entry.in_use]
    return _remove([*idle, *abandoned])


class _Entry(NamedTuple):
    used: float
    size: int
    path: Path

    @property
    def in_use(self) -> bool:
        """Whether a process may still read it."""
        return time.time() - self.used < SECONDS_IN_USE


def _shards(cache: Path) -> list[_Entry]:
    return _entries(path for store in _stores(cache) for path in shards_in(store))


def _entries(paths: Iterable[Path]) -> list[_Entry]:
    """Return the files that are still there."""
    entries = []
    for path in paths:
        with contextlib.suppress(OSError):
            state = path.stat()
            entries.append(_Entry(state.st_mtime, state.st_size, path))
    return entries


def _remove(entries: Iterable[_Entry]) -> CacheSize:
    """Return which of the files could be removed."""
    removed = []
    for entry in entries:
        with contextlib.suppress(OSError):
            entry.path.unlink()
            removed.append(entry)
    return _total(removed)


def _total(entries: Sequence[_Entry]) -> CacheSize:
    return CacheSize(len(entries), sum(entry.size for entry in entries))


def _class_pictures(folder: Path) -> Iterator[Path]:
    return (path for path in (folder / _CLASS_PICTURES).glob("*/*.png") if re.fullmatch(r"\d+", path.stem))


def _stores(cache: Path) -> Iterator[Path]:
    """Yield the folders of a cache that stores are in."""
    for kind in get_args(Kind):
        yield from (path for path in (cache / kind).glob("*") if _STORE_NAME.fullmatch(path.name) and path.is_dir())

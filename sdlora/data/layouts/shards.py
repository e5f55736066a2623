"""Large data sets in files of many pictures each: parquet, Arrow (`Dataset.save_to_disk`), and WebDataset archives."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from sdlora.config import ConceptSection
from sdlora.data.layouts.listing import PICTURE_SUFFIXES, Group, Listed, Listing
from sdlora.data.layouts.origin import Origin, Row, local_origin
from sdlora.data.layouts.splits import choose_split, left_out, split_of_name
from sdlora.data.layouts.tables import Table
from sdlora.data.layouts.tars import Archive
from sdlora.errors import DataError

NAME = "shards"

_SUFFIXES = {".parquet", ".arrow", ".tar"}
_STATE, _DICT = "state.json", "dataset_dict.json"
"""What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write beside their Arrow files."""
_OPEN_AT_ONCE = 2


def recognises(path: Path) -> bool:
    """Return whether this is a shard, or a folder of shards without single pictures."""
    if path.is_file():
        return path.suffix.lower() in _SUFFIXES
    found = False
    for _, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(Path(name).suffix.lower() in PICTURE_SUFFIXES for name in files):
            return False
        found = found or any(_is_shard(name) for name in files)
    return found


def read(settings: ConceptSection, problems: list[str]) -> Listing:
    """Return the rows of the chosen split's shards; their pictures are read when they are asked for."""
    path = Path(settings.folder).expanduser()
    if path.is_file():
        return list_shards([local_origin(path)], settings, problems, ())
    splits = dict(_shards_below(path, settings.split))
    if not splits:
        raise DataError(f"{path}: holds no {', '.join(sorted(_SUFFIXES))} files, which data.layout = {NAME!r} needs")
    split = choose_split(settings.split, sorted(set(splits.values())), str(path))
    origins = [local_origin(file) for file, its_split in splits.items() if its_split == split]
    return list_shards(origins, settings, problems, left_out(Counter(splits.values()), split, "file"))


def list_shards(
    origins: Sequence[Origin], settings: ConceptSection, problems: list[str], notes: Sequence[str]
) -> Listing:
    """Return the rows of these files in their order.

    A file that cannot be read is a problem. Raises DataError where none can.
    """
    reader = _Rows()
    listed: list[Listed] = []
    faults: list[str] = []
    for origin in origins:
        try:
            is_archive = Path(origin.name).suffix.lower() == ".tar"
            shard: _Shard = Archive(origin, settings) if is_archive else Table(origin, settings)
        except DataError as error:
            faults.append(str(error))
            continue
        first = reader.add(shard, origin.version)
        listed += (
            Listed(Path(f"{origin.name}#{row.mark}"), row.lines, rows=reader, row=first + row.row)
            for row in shard.list_rows(problems)
        )
        reader.end(first + shard.rows)
    if len(faults) == len(origins):
        raise DataError(faults[0])
    problems += faults
    if not listed and not problems:
        raise DataError(f"{origins[0].name}: holds no rows")
    kinds = sorted({Path(origin.name).suffix[1:] for origin in origins})
    return Listing(f"shards ({', '.join(kinds)})", [Group(settings, listed)], notes)


class _Shard(Protocol):
    """One file of many pictures."""

    @property
    def rows(self) -> int:
        """How many rows it has, once they are listed."""
        ...

    def list_rows(self, problems: list[str]) -> Iterator[Row]: ...

    def picture(self, row: int) -> bytes: ...

    def close(self) -> None: ...


class _Rows:
    """The `RowReader` of several shards; any thread may read."""

    def __init__(self) -> None:
        self._shards: list[_Shard] = []
        self._versions: list[str] = []
        self._starts = [0]
        self._open: list[_Shard] = []
        self._lock = Lock()

    def add(self, shard: _Shard, version: str) -> int:
        """Take up one shard more, and return the number of its first row."""
        self._shards.append(shard)
        self._versions.append(version)
        return self._starts[-1]

    def end(self, row: int) -> None:
        """Say where the last shard ends."""
        self._starts.append(row)

    def read(self, row: int) -> bytes:
        """Return the picture file in row `row`. Raises DataError."""
        with self._lock:
            index = bisect_right(self._starts, row) - 1
            shard = self._shards[index]
            self._keep_open(shard)
            return shard.picture(row - self._starts[index])

    def stamp(self, row: int) -> str:
        """Return the shard's version and the row in it."""
        index = bisect_right(self._starts, row) - 1
        return f"{self._versions[index]}#{row - self._starts[index]}" if self._versions[index] else ""

    def _keep_open(self, shard: _Shard) -> None:
        """Close what was not read from lately; threads may still be at the shard before."""
        if shard not in self._open:
            self._open.append(shard)
            if len(self._open) > _OPEN_AT_ONCE:
                self._open.pop(0).close()


def _is_shard(name: str) -> bool:
    """Return whether a file's name is that of a shard, and not of a table or of what `datasets` caches."""
    others = name.startswith((".", "cache-", "indices")) or name == "metadata.parquet"
    return Path(name).suffix.lower() in _SUFFIXES and not others


def _shards_below(root: Path, wanted: str) -> Iterator[tuple[Path, str]]:
    """Yield the shards in the folder and those below, in order, each with its split."""
    named = _split_folders(root)
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        folder = Path(place)
        saved = _saved_files(folder / _STATE) if _STATE in files else None
        for name in saved if saved is not None else sorted(filter(_is_shard, files)):
            path = (folder / name).relative_to(root)
            yield root / path, path.parts[0] if path.parts[0] in named else split_of_name(path, wanted)


def _split_folders(root: Path) -> list[str]:
    """Return the folders of a saved DatasetDict, none where it is something else."""
    file = root / _DICT
    return [str(name) for name in _json(file).get("splits", [])]


def _saved_files(state: Path) -> list[str] | None:
    """Return the files of a saved Dataset in their order; others beside them are not part of it."""
    entries = _json(state).get("_data_files")
    if not isinstance(entries, list):
        return None
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    return [Path(name).name for name in names if isinstance(name, str)]


def _json(file: Path) -> dict[str, Any]:
    """Return what such a file says, nothing where it is of somebody else."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

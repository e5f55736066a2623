"""Tensors on disk under names, in safetensors shards that many processes may read and add to at once.

A shard's file name is the hash of its content, so a damaged one is told by its name and removed; what it held
counts as missing and is made again. Nothing is ever changed in place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from sdlora.errors import DataError, FormatError, OutputError
from sdlora.headers import read_header
from sdlora.storage import check_writable, serialize_tensors, sha256_of_file, write_bytes

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHARD_BYTES = 16 << 20
_SHARD_TENSORS = 1024
"""A shard is written at so many bytes or tensors: while it is, it is in memory several times."""
_SECONDS_UNTIL_WRITTEN = 30.0
_NAME_LENGTH = 32
_SECONDS_BETWEEN_TOUCHES = 600.0
SECONDS_IN_USE = 3 * _SECONDS_BETWEEN_TOUCHES
"""A shard whose time of change is no older may be in use by some process."""
_SHARD_NAME = re.compile(r"[0-9a-f]{32}")
_CHECKING_THREADS = 4


Item = TypeVar("Item")


@dataclass(frozen=True)
class Together:
    """Processes that fill one store together."""

    rank: int = 0
    processes: int = 1
    wait: Callable[[], object] = lambda: None
    """Returns once every process has called it."""

    def part(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's part of items that all processes have alike.

        Not of what each finds missing: while one looks, another may have written already.
        """
        return items[self.rank :: self.processes]


ALONE = Together()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor's bytes lie."""

    shard: int
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorStore:
    """The tensors of one folder; each name belongs to one content for ever."""

    def __init__(self, folder: Path) -> None:
        """Raises OutputError where the folder cannot be used."""
        try:
            check_writable(folder)
        except OutputError as error:
            raise OutputError(
                f"{folder}: encoded pictures and captions cannot be kept there; set data.cache.folder to a folder that "
                "can be written"
            ) from error
        self.folder = folder
        self._shards: list[Path] = []
        self._touched = time.monotonic()
        self._places: dict[str, _Place] = {}
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.damaged = 0
        """How many shards were found damaged and removed."""

    def find(self, names: Collection[str]) -> set[str]:
        """Return those of `names` that are there, whole; only these can be read afterwards."""
        wanted = set(names) - self._places.keys()
        if wanted:
            known = set(self._shards)
            candidates = [path for path in sorted(shards_in(self.folder)) if path not in known]
            with ThreadPoolExecutor(_CHECKING_THREADS) as pool:
                for path, places in zip(
                    candidates, pool.map(lambda p: self._inspect(p, wanted), candidates), strict=True
                ):
                    if new := {name: place for name, place in places.items() if name not in self._places}:
                        self._add_shard(path, new)
        return set(names) & self._places.keys()

    def require(self, names: Collection[str]) -> None:
        """All of `names` can be read. Raises DataError where the processes do not see each other's files."""
        if missing := len(set(names) - self.find(names)):
            raise DataError(
                f"{self.folder}: {missing} entries that another process should have written are not there; "
                "data.cache.folder must be a folder that all processes share"
            )

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor, on the CPU. Raises DataError when its file is gone."""
        place = self._places[name]
        path = self._shards[place.shard]
        count = torch.Size(place.shape).numel() * place.dtype.itemsize
        data = bytearray(count)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(place.start)
                if file.readinto(data) != count:
                    raise EOFError
        except (OSError, EOFError) as error:
            raise DataError(
                f"{path}: was removed or cut short while it was in use; start again, and what is missing is encoded anew"
            ) from error
        self._touch()
        return torch.frombuffer(data, dtype=place.dtype).reshape(place.shape)

    @contextmanager
    def writing(self) -> Iterator[ShardWriter]:
        """Yield a writer; when the block ends, for whatever reason, all that it was given is on disk."""
        writer = ShardWriter(self)
        try:
            yield writer
        finally:
            writer.flush()

    def paths_in_use(self) -> set[Path]:
        """Return the shards that hold anything asked for."""
        return set(self._shards)

    def write_shard(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """One shard more is on disk, and what it holds can be read."""
        data = serialize_tensors(tensors, {})
        path = self.folder / f"{hashlib.sha256(data).hexdigest()[:_NAME_LENGTH]}.safetensors"
        write_bytes(path, data)
        self._add_shard(path, self._places_of(path, set(tensors)))

    def _inspect(self, path: Path, wanted: set[str]) -> dict[str, _Place]:
        """Return where the shard holds wanted tensors; a damaged shard is removed and holds nothing."""
        try:
            path.open("rb").close()  # one that cannot be opened now, or is gone, is not damaged
            places = self._places_of(path, wanted)
            if not places or sha256_of_file(path)[:_NAME_LENGTH] == path.stem:
                return places
        except OSError:
            return {}
        except FormatError:
            if not path.exists():
                return {}
        self.damaged += 1
        with contextlib.suppress(OSError):
            path.unlink()
        return {}

    def _places_of(self, path: Path, wanted: set[str]) -> dict[str, _Place]:
        """Return where the shard holds wanted tensors; `shard` is the number it gets when it is added."""
        header = read_header(path)
        return {
            name: _Place(0, header.data_offset + entry.start, self._shared(entry.shape), _DTYPES[entry.dtype])
            for name, entry in header.tensors.items()
            if name in wanted and entry.dtype in _DTYPES
        }

    def _shared(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self._shapes.setdefault(shape, shape)

    def _add_shard(self, path: Path, places: Mapping[str, _Place]) -> None:
        number = len(self._shards)
        self._shards.append(path)
        with contextlib.suppress(OSError):
            os.utime(path)
        for name, place in places.items():
            self._places[name] = _Place(number, place.start, place.shape, place.dtype)

    def _touch(self) -> None:
        """The shards' times say that they are in use, to within a few minutes, also those that wait for their turn."""
        now = time.monotonic()
        if now - self._touched > _SECONDS_BETWEEN_TOUCHES:
            self._touched = now
            for path in self._shards:
                with contextlib.suppress(OSError):
                    os.utime(path)


class ShardWriter:
    """Collects tensors and writes a shard when there are enough, or when the last one is a while ago."""

    def __init__(self, store: TensorStore) -> None:
        self._store = store
        self._tensors: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._written = time.monotonic()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """The tensor is on disk soon; it can be read once it is."""
        self._tensors[name] = tensor
        self._bytes += tensor.numel() * tensor.element_size()
        full = self._bytes >= _SHARD_BYTES or len(self._tensors) >= _SHARD_TENSORS
        if full or time.monotonic() - self._written > _SECONDS_UNTIL_WRITTEN:
            self.flush()

    def flush(self) -> None:
        """All that was added is on disk."""
        tensors, self._tensors, self._bytes = self._tensors, {}, 0
        if tensors:
            self._store.write_shard(tensors)
        self._written = time.monotonic()


def shards_in(store: Path) -> Iterator[Path]:
    """Yield the shards of one store, without what is being written right now or is somebody else's."""
    return (path for path in store.glob("*.safetensors") if _SHARD_NAME.fullmatch(path.stem))

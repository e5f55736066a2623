"""Files: written whole or not at all, named by their content, read without trust."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdlora.errors import FormatError, OutputError

if TYPE_CHECKING:
    import torch

_HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library itself
_MOST_DIMENSIONS = 8
_REMEMBERED_FROM_BYTES = 64 << 20
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


# --- writing -----------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; what was written there becomes `path` when the block ends well.

    The data reach the disk before the rename, so a crash leaves the old file or the new one, never a
    part. Raises OutputError where the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A short prefix: the temporary name must not exceed the length that `path` itself may have.
        handle, name = tempfile.mkstemp(prefix=".writing-", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes private files; results are ordinary ones
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; it becomes `path`, in place of a folder there, when the block ends well.

    Raises OutputError where the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        _exchange(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(folder: Path, path: Path) -> None:
    """`folder` is at `path`; what was there is gone, or there again where that fails."""
    earlier = folder.with_name(f"{folder.name}-earlier")
    if path.exists():
        path.replace(earlier)
    try:
        folder.replace(path)
    except OSError:
        if earlier.exists():
            earlier.replace(path)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """`path` holds exactly `data`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """`path` holds `text` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`path` holds `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def user_path(path: Path | str) -> Path:
    """Return the path with ~ as the user's folder; a ~name that nobody has stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_there(path: Path) -> bool:
    """Return whether something is there; nothing is where the system refuses the path."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, a loop of links, a zero byte
        return False


def check_writable(folder: Path) -> None:
    """`folder` exists and takes files. Raises OutputError with the reason where it does not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be used as output folder ({error.strerror or error}); choose another"
        ) from error


# --- hashes ------------------------------------------------------------------------------------------


def sha256_of_file(path: Path, offset: int = 0) -> str:
    """SHA-256 of the file's bytes from `offset` on, 64 hex digits."""
    with path.open("rb") as file:
        file.seek(offset)
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes; of a large file it is remembered until its size or time of change differs.

    The memory is one JSON file in the user's cache folder (`SDLORA_CACHE` names another). Where it cannot be
    read or written, the file is hashed anew.
    """
    known = remembered_sha256(path)
    if known:
        return known
    digest = sha256_of_file(path)
    state = path.stat()
    if state.st_size >= _REMEMBERED_FROM_BYTES:
        entries = {name: entry for name, entry in _remembered_hashes().items() if Path(name).exists()}
        entries[str(path.resolve())] = [state.st_size, state.st_mtime_ns, digest]
        with contextlib.suppress(OutputError, OSError):
            write_json(cache_folder() / "hashes.json", entries)
    return digest


def remembered_sha256(path: Path) -> str:
    """SHA-256 of a file that was hashed before and has not changed since, else ""."""
    state = path.stat()
    entry = _remembered_hashes().get(str(path.resolve()))
    return str(entry[2]) if entry and entry[:2] == [state.st_size, state.st_mtime_ns] else ""


def _remembered_hashes() -> dict[str, list[Any]]:
    try:
        entries = json.loads((cache_folder() / "hashes.json").read_text(encoding="utf-8"))
        return {str(name): entry for name, entry in entries.items() if isinstance(entry, list) and len(entry) == 3}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def cache_folder() -> Path:
    """Return the user's cache folder for sdlora; `SDLORA_CACHE` names another."""
    if named := os.environ.get("SDLORA_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "sdlora"


def sha256_of_tensor_data(path: Path) -> str:
    """SHA-256 of everything after the safetensors header, 64 hex digits.

    The first 12 are what other programs call AutoV3, the hash of a LoRA that renaming and editing its
    metadata do not change.
    """
    return sha256_of_file(path, offset=read_header(path).data_offset)


# --- safetensors -------------------------------------------------------------------------------------


class TensorEntry(NamedTuple):
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says about itself in its first bytes."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_offset: int


def read_header(path: Path) -> SafetensorsHeader:
    """Return the header of a safetensors file without reading its tensors.

    Raises FormatError with one sentence that says what the file is, when it is not a whole and sound
    safetensors file: missing, empty, a web page, a pickle, truncated, overlapping or oversized.
    """
    if path.is_dir():
        raise FormatError(f"{path}: is a folder; name a .safetensors file in it")
    try:
        size = path.stat().st_size
        if not path.is_file():  # opening a pipe would wait for a writer
            raise FormatError(f"{path}: is not an ordinary file")
        with path.open("rb") as file:
            start = file.read(512)
            _refuse_foreign(path, start, size)
            (length,) = struct.unpack("<Q", start[:8])
            if length > min(size - 8, _HEADER_LIMIT_BYTES):
                raise FormatError(
                    f"{path}: not a safetensors file, or a truncated one "
                    f"(its header should be {length} bytes, the file has {size}); download or export it again"
                )
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    return _parse_header(path, raw, size)


def _refuse_foreign(path: Path, start: bytes, size: int) -> None:
    text = start.lstrip().lower()
    if size == 0:
        raise FormatError(f"{path}: is empty; download or export it again")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise FormatError(
            f"{path}: is a web page saved under this name, not a model file; "
            "open the download link in a browser and sign in there if it asks, then download again"
        )
    # A safetensors header of 640 bytes begins with a pickle's first bytes too, but has its "{" at 8.
    archive = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    if start.startswith(archive) and start[8:9] != b"{":
        raise FormatError(
            f"{path}: is a pickle or zip archive, which could run code when opened; get the .safetensors version"
        )
    if start.startswith(b"version https://git-lfs"):
        raise FormatError(f"{path}: is a Git LFS pointer, not the file itself; run 'git lfs pull'")
    if size < 10:
        raise FormatError(f"{path}: is only {size} bytes; download or export it again")


def _parse_header(path: Path, raw: bytes, size: int) -> SafetensorsHeader:
    tensors: dict[str, TensorEntry] = {}
    data_offset, expected = 8 + len(raw), 0
    try:
        entries = json.loads(raw, parse_float=_refuse_fraction)
        metadata = entries.pop("__metadata__", {}) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata values must be text")
        for name, entry in sorted(entries.items(), key=_data_offsets):
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            bytes_each = _DTYPE_BYTES.get(dtype) if isinstance(dtype, str) else None
            if bytes_each is None or len(shape) > _MOST_DIMENSIONS or (shape and min(shape) < 0):
                raise FormatError(f"{path}: tensor {name!r} has unknown type {dtype!r} or shape {str(shape)[:80]}")
            if start != expected or end - start != math.prod(shape) * bytes_each:
                raise FormatError(f"{path}: tensor {name!r} does not lie where the header says; the file is damaged")
            expected = end
            tensors[name] = TensorEntry(dtype, shape, start, end)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(f"{path}: is not a safetensors file (its header does not parse)") from error
    if data_offset + expected != size:
        raise FormatError(
            f"{path}: is truncated or damaged (its header promises {data_offset + expected} bytes, "
            f"the file has {size}); download or export it again"
        )
    return SafetensorsHeader(tensors, metadata, data_offset)


def _refuse_fraction(text: str) -> float:
    raise ValueError(f"{text}: sizes must be whole numbers")


def _data_offsets(item: tuple[str, Any]) -> list[int]:
    return list(item[1]["data_offsets"])


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return all tensors of a safetensors file, on the CPU, and its metadata. Raises FormatError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path)
    try:
        return load_file(path), header.metadata
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # the library's reader is stricter
        raise FormatError(f"{path}: is damaged ({error}); download or export it again") from error


def serialize_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file's bytes; the same input gives the same bytes in every process.

    The library writes the metadata in the order of a randomly seeded hash map, so the header is written
    anew here with sorted keys; the tensor data behind it are the library's.
    """
    from safetensors.torch import save

    # Copies, because the library refuses tensors that share memory.
    data = save({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()})
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    header |= sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + data[8 + length :]

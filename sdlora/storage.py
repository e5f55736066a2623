"""Files: written whole or not at all, named by their content, read without trust."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.errors import FormatError, OutputError
from sdlora.headers import DTYPE_BYTES, HEADER_LIMIT_BYTES, data_offsets, read_header

if TYPE_CHECKING:
    import torch

_TEXT = "__metadata__"
_REMEMBERED_FROM_BYTES = 64 << 20
_COPIED_AT_ONCE = 4 << 20
_AUTOV1_AT, _AUTOV1_BYTES = 1 << 20, 64 << 10
_DEVICES = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³])(?:\.|$)", re.IGNORECASE)


# --- writing -----------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; what was written there becomes `path` when the block ends well.

    The data reach the disk before the rename, so a crash leaves the old file or the new one, never a
    part. Raises OutputError where the folder cannot be written.
    """
    with _beside(path) as temporary:
        yield temporary
        _finish(temporary)
        temporary.replace(path)


def write_new(path: Path, write: Callable[[Path], None]) -> Path:
    """Return the new file of what `write` put into the one that it was given: `path`, or NAME-2, NAME-3 where that is taken.

    What others put there at the same moment is not replaced either. The data reach the disk before the file has its name.
    Raises OutputError where the folder cannot be written.
    """
    with _beside(path) as temporary:
        write(temporary)
        _finish(temporary)
        for number in itertools.count(1):
            target = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
            try:
                _link(temporary, target)
            except FileExistsError:
                continue
            return target
    raise AssertionError("numbers do not end")


def _link(temporary: Path, target: Path) -> None:
    """What lies at `temporary` lies at `target` too, or there alone. Raises FileExistsError where something is there."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links, such as a memory card's
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # the name is ours
        try:
            temporary.replace(target)
        except OSError:
            target.unlink(missing_ok=True)
            raise


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield an empty file in the folder of `path`, which is gone afterwards. Raises OutputError for what the system refuses."""
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
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _finish(temporary: Path) -> None:
    """What was written is on the disk, in a file as others are."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.chmod(0o644)  # mkstemp makes private files; results are ordinary ones


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; it becomes `path`, in place of what is there, when the block ends well.

    What was written there reaches the disk first, so a crash leaves the old folder or the new one, whole. Where `path` is
    a link, it stays one and the folder that it leads to is replaced. Raises OutputError where the folder cannot be
    written.
    """
    place = Path(os.path.realpath(path))  # unlike Path.resolve, never raises for a loop of links
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=place.parent))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        _sync_below(temporary)
        _exchange(temporary, place)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_below(folder: Path) -> None:
    """All files and folders below `folder`, itself too, are on the disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            with Path(place, name).open("rb+") as file:
                os.fsync(file.fileno())
        _sync_names(Path(place))


def _sync_names(folder: Path) -> None:
    """What lies in `folder`, by name, is on the disk, where the system lets that be asked for: Windows does not."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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
    _sync_names(path.parent)  # else a power cut could bring back neither name
    if earlier.is_dir():
        shutil.rmtree(earlier, ignore_errors=True)
    else:
        earlier.unlink(missing_ok=True)


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


def past_devices(stem: str) -> str:
    """Return a file's name without suffix, with _ before what Windows takes for a device whatever suffix follows."""
    return f"_{stem}" if _DEVICES.match(stem) else stem


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


def sha256_while_unchanged(path: Path) -> str:
    """SHA-256 of the file's bytes; this process reads them again only where size or time of change differ."""
    state = path.stat()
    return _sha256_of_state(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=100_000)
def _sha256_of_state(path: Path, changed_ns: int, length: int) -> str:
    return sha256_of_file(path)


@dataclass(frozen=True)
class FileHashes:
    """The hashes by which programs call a safetensors file."""

    sha256: str
    """Of the whole file; its first 10 digits are AutoV2."""
    data_sha256: str
    """Of what lies behind the header; its first 12 digits are AutoV3."""
    autov1: str
    """8 digits of SHA-256 of 64 KiB at 1 MiB; "" of a file that ends before, where it would be the hash of nothing."""


def hashes_of_file(path: Path, data_offset: int) -> FileHashes:
    """Return all hashes of a safetensors file, read once."""
    whole, data, position, autov1 = hashlib.sha256(), hashlib.sha256(), 0, ""
    with path.open("rb") as file:
        while block := memoryview(file.read(_AUTOV1_AT)):
            whole.update(block)
            data.update(block[max(0, data_offset - position) :])
            if position == _AUTOV1_AT:
                autov1 = hashlib.sha256(block[:_AUTOV1_BYTES]).hexdigest()[:8]
            position += len(block)
    return FileHashes(whole.hexdigest(), data.hexdigest(), autov1)


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


def folder_sha256(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 of these files' names below a folder and their SHA-256s."""
    digests = {file.relative_to(folder).as_posix(): cached_sha256(file) for file in files}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


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

    Raises FormatError for text or names that UTF-8 cannot hold. The library writes the metadata in the order of a randomly seeded hash map, so the header is written
    anew here with sorted keys; the tensor data behind it are the library's.
    """
    from safetensors.torch import save

    _first_bytes(metadata, dict.fromkeys(tensors).items())  # refuses names that the library would stumble over
    # Copies, because the library refuses tensors that share memory.
    data = save({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()})
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    return _first_bytes(metadata, sorted(entries.items(), key=data_offsets)) + data[8 + length :]


def write_tensors(
    path: Path,
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
    data: Callable[[str], bytes],
    metadata: Mapping[str, str],
) -> None:
    """`path` is a safetensors file of more tensors than fit into memory: `data` gives the bytes of one at a time.

    `entries` are {name: (type as headers call it, shape)}. The widest types lie first, as with the library. Raises
    FormatError, before anything is written, for text or names that UTF-8 cannot hold.
    """
    names = sorted(entries, key=lambda name: -DTYPE_BYTES[entries[name][0]])
    described, end = {}, 0
    for name in names:
        dtype, shape = entries[name]
        start, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    first = _first_bytes(metadata, described.items())
    with path.open("wb") as file:
        file.write(first)
        for name in names:
            file.write(data(name))


def rewrite_metadata(
    source: Path, target: Path, metadata: Mapping[str, str], keys: Mapping[str, str] | None = None
) -> None:
    """`target` holds the tensors of `source`, byte for byte, under that text; both may be one file.

    `keys` gives tensors other names. Only the header is written anew, so the hash of what lies behind it, AutoV3, stays.
    Raises FormatError where the source is no sound file, where two tensors would have one name, or where
    text or a name is none that UTF-8 can hold; OutputError where the target cannot be written.
    """
    header = read_header(source)
    renamed = dict(keys or {})
    if missing := renamed.keys() - header.tensors.keys():
        raise FormatError(f"{source}: holds no tensor {min(missing)!r}")
    names = [renamed.get(name, name) for name in header.tensors]
    if taken := [name for name, count in Counter(names).items() if count > 1 or name == _TEXT]:
        raise FormatError(f"{source}: a tensor cannot be called {taken[0]!r}, which is taken; choose another name")
    entries = [
        (name, {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.start, entry.end]})
        for name, entry in zip(names, header.tensors.values(), strict=True)
    ]
    try:
        first = _first_bytes(metadata, entries)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error
    if len(first) - 8 > HEADER_LIMIT_BYTES:
        raise OutputError(f"{target}: a header of {len(first) - 8} bytes is more than readers take; give less text")
    with source.open("rb") as stored, atomic_path(target) as temporary, temporary.open("wb") as file:
        file.write(first)
        stored.seek(header.data_offset)
        shutil.copyfileobj(stored, file, _COPIED_AT_ONCE)


def _first_bytes(metadata: Mapping[str, str], entries: Iterable[tuple[str, Any]]) -> bytes:
    """Return what stands before the tensor data: sorted text, then the entries, padded to a multiple of 8.

    Raises FormatError, without a file's name, for text or names with half a surrogate pair, which JSON can say and UTF-8
    cannot hold.
    """
    header: dict[str, Any] = {_TEXT: dict(sorted(metadata.items()))} if metadata else {}
    header |= entries
    try:
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FormatError("its header holds half a character, which cannot be written; remove it") from error
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw

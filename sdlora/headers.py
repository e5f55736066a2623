"""Headers of safetensors files, read without trust and, for files that list the same tensors, once."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from sdlora.errors import FormatError

HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library itself
_MOST_DIMENSIONS = 8
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_METADATA = '"__metadata__"'
_METADATA_FIRST = re.compile(r"\s*\{\s*" + _METADATA + r"\s*:\s*")
_FOLLOWING = re.compile(r'\s*(,\s*(?=")|(?=\}))')
_LONGEST_KNOWN, _MOST_USUAL_TENSORS = 1 << 20, 10_000  # more may be hostile, and is not kept


def _refuse_fraction(text: str) -> float:
    raise ValueError(f"{text}: sizes must be whole numbers")


_DECODER = json.JSONDecoder(parse_float=_refuse_fraction)


class TensorEntry(NamedTuple):
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorKind(NamedTuple):
    """Of what type, shape and length a tensor is."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, eq=False)
class TensorLayout:
    """The tensors of a file as its header lists them; compared by identity, so that a table by layout is quick."""

    kinds: Mapping[str, TensorKind]
    """By name, in the order in which they lie side by side."""
    shapes: Mapping[str, tuple[int, ...]]
    bytes: int

    @property
    def is_usual(self) -> bool:
        """Whether it is no larger than models and adapters are, so that what is told of it may be kept in memory."""
        return len(self.kinds) <= _MOST_USUAL_TENSORS


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says about itself in its first bytes."""

    layout: TensorLayout
    """One object for all files that list their tensors in the same words, as those of one trainer and rank do."""
    metadata: dict[str, str]
    data_offset: int

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """What the header says of each tensor, by name."""
        ends = accumulate(kind.bytes for kind in self.layout.kinds.values())
        return {
            name: TensorEntry(kind.dtype, kind.shape, end - kind.bytes, end)
            for (name, kind), end in zip(self.layout.kinds.items(), ends, strict=True)
        }


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
            if length > min(size - 8, HEADER_LIMIT_BYTES):
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
    try:
        metadata, layout = _metadata_and_layout(raw.decode(json.detect_encoding(raw), "surrogatepass"))
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata values must be text")
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(f"{path}: is not a safetensors file (its header does not parse)") from error
    data_offset = 8 + len(raw)
    if data_offset + layout.bytes != size:
        raise FormatError(
            f"{path}: is truncated or damaged (its header promises {data_offset + layout.bytes} bytes, "
            f"the file has {size}); download or export it again"
        )
    return SafetensorsHeader(layout, metadata, data_offset)


def _metadata_and_layout(text: str) -> tuple[dict[str, str], TensorLayout]:
    """Return both parts of a header. Raises FormatError for odd tensors and, for odd JSON, others.

    The JSON behind the metadata, which mostly stand first, is a layout's name: files of one trainer share it.
    """
    metadata, rest = None, text
    if first := _METADATA_FIRST.match(text):
        metadata, end = _DECODER.raw_decode(text, first.end())
        following = _FOLLOWING.match(text, end)
        rest = "{" + text[following.end() :] if following else text
    if _METADATA not in rest and len(rest) <= _LONGEST_KNOWN:
        return metadata or {}, _known_layout(rest.rstrip())  # padded by as much as the metadata need
    entries = _DECODER.decode(text)
    metadata = entries.pop("__metadata__", {})
    return metadata or {}, _layout(entries)


@lru_cache(maxsize=32)
def _known_layout(text: str) -> TensorLayout:
    return _layout(_DECODER.decode(text))


def _layout(entries: Mapping[str, Any]) -> TensorLayout:
    """Return the layout of a header's entries; equal kinds are one object, as few are kept for many tensors."""
    offsets = [entry["data_offsets"] for entry in entries.values()]
    in_order = entries.items() if offsets == sorted(offsets) else sorted(entries.items(), key=data_offsets)
    known: dict[tuple[str, tuple[int, ...]], TensorKind] = {}
    kinds: dict[str, TensorKind] = {}
    end_before = 0
    for name, entry in in_order:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        kind = known.get((dtype, shape)) if isinstance(dtype, str) else None
        if kind is None:
            kind = known[dtype, shape] = TensorKind(dtype, shape, _byte_count(name, dtype, shape))
        if start != end_before or end - start != kind.bytes:
            raise FormatError(f"tensor {name!r} does not lie where the header says; the file is damaged")
        end_before = end
        kinds[name] = kind
    return TensorLayout(kinds, {name: kind.shape for name, kind in kinds.items()}, end_before)


def _byte_count(name: str, dtype: Any, shape: tuple[int, ...]) -> int:
    bytes_each = DTYPE_BYTES.get(dtype) if isinstance(dtype, str) else None
    if bytes_each is None or len(shape) > _MOST_DIMENSIONS or (shape and min(shape) < 0):
        raise FormatError(f"tensor {name!r} has unknown type {dtype!r} or shape {str(shape)[:80]}")
    return math.prod(shape) * bytes_each


def data_offsets(item: tuple[str, Any]) -> list[int]:
    """Return where the data of a header's entry (name, what is said of it) lie."""
    return list(item[1]["data_offsets"])

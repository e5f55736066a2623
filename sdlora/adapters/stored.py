"""An adapter as it lies on the disk: its files and what their headers say. Needs no torch, so that listing is quick."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.adapters.formats import peft
from sdlora.adapters.formats.detect import Contents, contents_of, telling
from sdlora.adapters.formats.parts import Shape
from sdlora.errors import FormatError
from sdlora.headers import SafetensorsHeader, TensorLayout, read_header
from sdlora.storage import (
    is_there,
    read_tensors,
    sha256_of_file,
    sha256_of_tensor_data,
    user_path,
)

if TYPE_CHECKING:
    import torch

PICKLES = (".pt", ".bin")
"""How embeddings that are pickles are called."""
_LONGEST_SHOWN, _LONGEST_KNOWN = 300, 1 << 20


@dataclass(frozen=True)
class Stored:
    """The weights of an adapter on the disk: one file, or of PEFT one for each component."""

    path: Path
    files: Mapping[str, Path]
    """By the component that every layer of the file is for, "" where the keys tell."""
    headers: Mapping[str, SafetensorsHeader]
    layout: TensorLayout
    """Of all tensors, keys as `contents` has them."""
    contents: Contents
    """The same object, and the same layout, for files that differ only in numbers and other text."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Of all tensors, keys as `contents` has them."""
        return self.layout.shapes

    @property
    def metadata(self) -> dict[str, str]:
        """The text of the first file's header."""
        return next(iter(self.headers.values())).metadata

    @property
    def words_folder(self) -> Path:
        """The folder in which, or in whose `embeddings/`, the adapter's new words lie."""
        return self.path if self.path.is_dir() else peft.folder_of(self.path) or self.path.parent

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors, on the CPU, keys as `contents` has them. Raises FormatError."""
        found: dict[str, torch.Tensor] = {}
        for component, file in self.files.items():
            found |= {_key(component, key): tensor for key, tensor in read_tensors(file)[0].items()}
        return found

    def sha256(self) -> str:
        """Return SHA-256 of the file, or of the list of several files' names and hashes."""
        return self._digest([sha256_of_file(file) for file in self.files.values()])

    def tensor_sha256(self) -> str:
        """Return SHA-256 of what lies behind the file's header, of which the first 12 digits are AutoV3."""
        return self._digest([sha256_of_tensor_data(file) for file in self.files.values()])

    def _digest(self, hashes: list[str]) -> str:
        if len(hashes) == 1:
            return hashes[0]
        named = [[component, digest] for component, digest in zip(self.files, hashes, strict=True)]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def adapter_hashes(path: Path) -> tuple[str, str]:
    """Return SHA-256 of an adapter as it lies there, and of its weights alone, which other text does not change.

    Of an embedding that is a pickle both are those of the file. Raises FormatError.
    """
    if is_pickle(path):
        return (digest := sha256_of_file(path)), digest
    found = stored(path)
    return found.sha256(), found.tensor_sha256()


def is_pickle(path: Path) -> bool:
    """Return whether the file is called as embeddings that are pickles are."""
    return path.suffix.lower() in PICKLES and is_there(path) and path.is_file()


def stored(path: Path | str) -> Stored:
    """Return the adapter at `path`: a .safetensors file, or a folder that PEFT has written.

    Raises FormatError, with one sentence that says what it is, where it is no adapter.
    """
    place = user_path(path)
    if not is_there(place):
        raise FormatError(f"{str(place)[:_LONGEST_SHOWN]}: there is no such adapter file")
    files = peft.weight_files(place) if place.is_dir() else {peft.component_of(place): place}
    headers = {component: read_header(file) for component, file in files.items()}
    layout = _layout(headers)
    try:
        if place.is_dir() or peft.folder_of(place):
            contents = peft.contents_of({name: (files[name], header) for name, header in headers.items()})
        else:
            contents = _contents(layout, headers[""].metadata)
            if contents.format == peft.NAME:  # scale 1 would be a guess
                raise FormatError(f"is PEFT's, without the {peft.CONFIG} that holds its scale; put it beside the file")
    except FormatError as error:
        raise FormatError(f"{place}: {error}") from error
    return Stored(place, files, headers, layout, contents)


def _contents(layout: TensorLayout, metadata: Mapping[str, str]) -> Contents:
    entries = frozenset(telling(metadata).items())
    usual = layout.is_usual and sum(len(text) for _, text in entries) <= _LONGEST_KNOWN
    return _known_contents(layout, entries) if usual else contents_of(layout.shapes, metadata)


@lru_cache(maxsize=32)
def _known_contents(layout: TensorLayout, entries: frozenset[tuple[str, str]]) -> Contents:
    return contents_of(layout.shapes, dict(entries))


def _layout(headers: Mapping[str, SafetensorsHeader]) -> TensorLayout:
    """Return the layout of the only file, or of several one that has their tensors' keys behind components."""
    if headers.keys() == {""}:
        return headers[""].layout
    layouts = {component: header.layout for component, header in headers.items()}
    kinds = {_key(component, key): kind for component, own in layouts.items() for key, kind in own.kinds.items()}
    shapes = {key: kind.shape for key, kind in kinds.items()}
    return TensorLayout(kinds, shapes, sum(own.bytes for own in layouts.values()))


def _key(component: str, key: str) -> str:
    """Return the key of a tensor among those of several files."""
    return f"{component}/{key}" if component else key

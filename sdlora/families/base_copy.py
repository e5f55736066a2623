"""Copies of a base on the disk in which some weights are changed, one tensor in memory at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from sdlora.errors import FormatError, ModelError
from sdlora.families.detect import BaseFacts, read_json
from sdlora.families.stored_base import WEIGHT, StoredBase
from sdlora.families.weights import Place
from sdlora.headers import read_header
from sdlora.storage import atomic_folder, atomic_path, write_json, write_tensors

Change = Callable[[str, torch.Tensor, torch.dtype], torch.Tensor]
"""From the path of a layer, its weight in float32 and the type that is written, to another weight, in float32."""
FLOATS: Mapping[str, tuple[str, torch.dtype]] = {
    "fp32": ("F32", torch.float32),
    "fp16": ("F16", torch.float16),
    "bf16": ("BF16", torch.bfloat16),
}
_CAST = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_EMA = "model_ema."
_INDEX = "model_index.json"
_OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".pb", ".h5")
_OPTIONAL = ("safety_checker", "image_encoder")
"""Components of a pipeline that pictures can be made without."""


def write_changed(
    base: StoredBase,
    target: Path,
    paths: Iterable[str],
    change: Change,
    *,
    precision: str = "",
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """`target` is a copy of the base in its own layout, in which the weights of the layers `paths` are changed.

    They are changed in float32 and rounded once, to the type they are stored in, or with all others to `precision`
    ("fp32", "fp16", "bf16"). `metadata` is added to the header of a checkpoint, whose averaged (EMA) weights, now those of
    another model, are left out. Raises OutputError, and ModelError for numbers that the type cannot hold; nothing is
    left behind then.
    """
    work = _Copy(base, paths, change, precision)
    if base.facts.path.is_file():
        with atomic_path(target) as temporary:
            work.write(base.facts.path, temporary, metadata)
        return
    with atomic_folder(target) as temporary:
        weights = {file for files in base.facts.files.values() for file in files}
        for file in _files_below(base.facts.path):
            place = temporary / file.relative_to(base.facts.path)
            if file in weights:
                place.parent.mkdir(parents=True, exist_ok=True)
                work.write(file, place, {})
                weights.remove(file)
            elif _belongs(file, base.facts):
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
        assert not weights, f"not copied: {weights}"
        _name_what_is_there(temporary)


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in order, through links too, but for those to a folder around them."""
    for place, folders, files in os.walk(folder, followlinks=True):
        here = Path(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not here.is_relative_to(os.path.realpath(Path(place, name))))
        yield from (Path(place, name) for name in sorted(files))


def _belongs(file: Path, base: BaseFacts) -> bool:
    """Return whether a file beside the weights is part of the base: no weights of other programs, nothing hidden."""
    relative = file.relative_to(base.path)
    if not file.is_file() or any(part.startswith(".") for part in relative.parts):
        return False
    if ".index." in file.name and file.suffix == ".json":  # it lists the parts of weights, of these or of others
        listed = read_json(file).get("weight_map", {})
        ours = {weights.name for part in base.files.values() for weights in part if weights.parent == file.parent}
        return isinstance(listed, dict) and {str(name) for name in listed.values()} <= ours
    if file.suffix == ".safetensors":  # of the components that are copied otherwise these are other variants
        return len(relative.parts) > 1 and relative.parts[0] not in base.files
    return not file.name.endswith(_OTHER_WEIGHTS)


def _name_what_is_there(folder: Path) -> None:
    """The folder's index names no optional component whose weights are not there, so that pipelines load."""
    if not (folder / _INDEX).is_file():
        return
    index: dict[str, Any] = read_json(folder / _INDEX)
    missing = [
        name
        for name in _OPTIONAL
        if index.get(name) not in (None, [None, None]) and not list((folder / name).glob("*.safetensors"))
    ]
    if missing:
        index |= {name: [None, None] for name in missing}
        if "safety_checker" in missing:
            index["requires_safety_checker"] = False
        write_json(folder / _INDEX, index)


class _Copy:
    """A base's files written anew, one after the other."""

    def __init__(self, base: StoredBase, paths: Iterable[str], change: Change, precision: str) -> None:
        self._base, self._change, self._precision = base, change, precision
        self._by_key: dict[tuple[Path, str], list[tuple[str, Place]]] = {}
        for path in paths:
            place = base.places[path + WEIGHT]
            self._by_key.setdefault((place.file, place.key), []).append((path, place))

    def write(self, source: Path, target: Path, metadata: Mapping[str, str]) -> None:
        """`target` holds the tensors of `source`, some of them changed."""
        header = read_header(source)
        stored = {key: entry for key, entry in header.tensors.items() if not (self._by_key and key.startswith(_EMA))}
        types: dict[str, tuple[str, torch.dtype | None]] = {
            key: FLOATS[self._precision] if self._precision and entry.dtype in _CAST else (entry.dtype, None)
            for key, entry in stored.items()
        }
        entries = {key: (types[key][0], entry.shape) for key, entry in stored.items()}
        kept = {key: text for key, text in header.metadata.items() if "hash" not in key}  # which they no longer have

        def data(key: str) -> bytes:
            tensor = self._tensor(source, key, types[key][1])
            content: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return content

        try:
            write_tensors(target, entries, data, kept | dict(metadata))
        except FormatError as error:
            raise FormatError(f"{source}: {error}") from error

    def _tensor(self, source: Path, key: str, dtype: torch.dtype | None) -> torch.Tensor:
        stored = self._base.read_at(Place(source, key))
        dtype = dtype or stored.dtype
        result = self._changed(stored, self._by_key.get((source, key), ()), dtype).to(dtype)
        if result.is_floating_point() and not _finite(result) and _finite(stored):
            raise ModelError(
                f"{source}: {key} would hold numbers too large for {str(result.dtype).removeprefix('torch.')}; "
                "take --precision bf16 or fp32"
            )
        return result

    def _changed(self, stored: torch.Tensor, layers: Sequence[tuple[str, Place]], dtype: torch.dtype) -> torch.Tensor:
        if not layers:
            return stored
        result = stored.to(torch.float32, copy=True)
        for path, place in layers:
            part = result if place.rows is None else result[slice(*place.rows)]
            weight = part.T if place.transposed else part
            new = self._change(path, weight.reshape(self._base.shapes[path + WEIGHT]), dtype).reshape(weight.shape)
            part.copy_(new.T if place.transposed else new)
        return result


def _finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.float().isfinite().all())

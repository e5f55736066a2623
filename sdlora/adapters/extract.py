"""An adapter from two bases: what one was tuned to, minus what it was, each layer cut off where its singular values say."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sdlora.adapters.algebra import OnLayer, Truncation, spectrum_of_matrix
from sdlora.adapters.blocks import Energies
from sdlora.adapters.derived import with_network
from sdlora.adapters.file import AdapterFile
from sdlora.adapters.layers import AdapterLayer, LoraLayer
from sdlora.errors import ConfigError, FormatError, ModelError
from sdlora.families.stored_base import WEIGHT, StoredBase
from sdlora.storage import is_there, read_tensors, serialize_tensors, write_bytes

_LINEAR = Truncation(rank=32)


@dataclass(frozen=True)
class ExtractSettings:
    """How much of each difference is kept, and of which layers."""

    linear: Truncation = _LINEAR
    """Of linear layers and 1 x 1 convolutions."""
    convolutions: Truncation | None = _LINEAR
    """Of larger kernels; None: they are left out."""
    only: tuple[str, ...] = ()
    """Beginnings of the paths of layers that are taken, such as "unet" or "unet.up_blocks"; none: all."""
    precision: torch.dtype = torch.float16

    def takes(self, path: str) -> bool:
        """Return whether what lies at `path` is wanted."""
        return not self.only or any(path == start or path.startswith(f"{start}.") for start in self.only)

    def cut(self, shape: Sequence[int]) -> Truncation | None:
        """Return where a weight of that shape is cut off; None: it is left out."""
        return self.convolutions if tuple(shape[2:]) not in ((), (1, 1)) else self.linear


@dataclass(frozen=True)
class Extracted:
    """The adapter, and what it holds of the difference."""

    adapter: AdapterFile
    energy: Mapping[str, float]
    """Share of the squared norm of all layers' differences that is kept, by block, and of all under ""."""
    unchanged: int
    """Layers that are the same in both, but for the type that they are stored in."""
    left_out: tuple[str, ...]
    """Other weights that differ: norms, biases and embeddings, which LoRA cannot hold, and convolutions not wanted."""
    resumed: int
    """Layers that an earlier, interrupted run had done."""
    work: Path
    """Where finished layers lie; to be forgotten when the adapter is written."""


def extract(
    original: StoredBase,
    tuned: StoredBase,
    settings: ExtractSettings,
    target: Path,
    on_layer: OnLayer | None = None,
) -> Extracted:
    """Return `tuned` minus `original` as LoRA. One layer of both is in memory at a time.

    Finished layers lie beside `target`, where the adapter will go, in a folder of these bases and settings, from which an
    interrupted extraction goes on; `forget` removes it. Raises FormatError where nothing differs, ModelError for bases of two
    families or sizes.
    """
    _refuse_different_kinds(original, tuned)
    for start in settings.only:
        if not any(path == start or path.startswith(f"{start}.") for path in original.layers):
            raise ConfigError(f"--only {start}: no layer's path begins so; try unet or text_encoder")
    wanted = [path for path in original.layers if settings.takes(path)]
    cuts = {path: cut for path in wanted if (cut := settings.cut(original.shapes[path + WEIGHT]))}
    if not cuts:
        raise ConfigError(
            "nothing is wanted: the layers that are named are convolutions, which --conv-rank 0 leaves out"
        )
    work = _work_folder(target, original, tuned, settings)
    finished = _Finished(work)
    layers: dict[str, AdapterLayer] = {}
    energies = Energies()
    resumed = 0
    for number, (path, cut) in enumerate(cuts.items(), start=1):
        done = finished.get(path)
        resumed += done is not None
        if done is None:
            done = _extract_layer(path, original, tuned, cut, settings.precision)
            finished.keep(path, done)
        if done.layer is not None:
            layers[path] = done.layer
            energies.add(path, done.total, done.kept)
        if on_layer:
            on_layer(number, len(cuts))
    if not layers:
        forget(work)
        raise FormatError(
            f"{tuned.facts.path}: its layers are those of {original.facts.path}; there is nothing to extract"
        )
    metadata = with_network(tuned.metadata() | _sources(original, tuned), layers)
    adapter = AdapterFile(layers, original.family.name, metadata)
    left_out = tuple(_left_out(original, tuned, settings, cuts.keys()))
    return Extracted(adapter, energies.shares(), len(cuts) - len(layers), left_out, resumed, work)


def forget(work: Path) -> None:
    """What an extraction has kept in `work` is gone."""
    shutil.rmtree(work, ignore_errors=True)


@dataclass(frozen=True)
class _Layer:
    """One finished layer; None where both bases have the same weight."""

    layer: LoraLayer | None
    total: float = 0.0
    kept: float = 0.0


def _extract_layer(
    path: str, original: StoredBase, tuned: StoredBase, cut: Truncation, precision: torch.dtype
) -> _Layer:
    before, after = original.read(path + WEIGHT), tuned.read(path + WEIGHT)
    if _same(before, after):
        return _Layer(None)
    shape = original.shapes[path + WEIGHT]
    difference = (after.float() - before.float()).reshape(shape)
    if not bool(difference.sum().isfinite()):
        raise ModelError(f"layer {path} holds NaN or infinity in {original.facts.path} or {tuned.facts.path}")
    spectrum = spectrum_of_matrix(difference.flatten(1), shape, cut)
    rank = cut.rank_of(spectrum)
    layer = spectrum.layer(rank, precision)
    return _Layer(layer, spectrum.total, spectrum.total * spectrum.energy(rank))


def _same(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Return whether two weights are equal but for the types that they are rounded to."""
    if before.dtype == after.dtype:
        return torch.equal(before, after)
    if torch.equal(before.to(after.dtype), after) or torch.equal(after.to(before.dtype), before):
        return True
    if not (before.is_floating_point() and after.is_floating_point()):
        return False
    # Neither type holds the other, as fp16 and bf16: both may be roundings, half a unit at most, of a third weight.
    types = [torch.finfo(tensor.dtype) for tensor in (before, after)]
    one, other = before.float(), after.float()
    allowed = sum(kind.eps for kind in types) / 2 * torch.maximum(one.abs(), other.abs())
    smallest = max(kind.tiny * kind.eps for kind in types)
    return bool(((one - other).abs() <= allowed + smallest).all())


def _left_out(
    original: StoredBase, tuned: StoredBase, settings: ExtractSettings, taken: Collection[str]
) -> Iterator[str]:
    weights = {path + WEIGHT for path in taken}
    for name in original.places:
        if name in weights or name not in tuned.places or not settings.takes(name):
            continue
        before, after = original.read(name), tuned.read(name)
        if before.is_floating_point() and before.shape == after.shape and not _same(before, after):
            yield name


def _refuse_different_kinds(original: StoredBase, tuned: StoredBase) -> None:
    one, other = original.facts, tuned.facts
    if one.family is not other.family:
        raise ModelError(
            f"{one.path} is {one.family.title}, {other.path} is {other.family.title}; take two of one family"
        )
    for path in original.layers:
        ours, theirs = original.shapes[path + WEIGHT], tuned.shapes.get(path + WEIGHT)
        if ours != theirs:
            raise ModelError(
                f"{path} is {ours} in {one.path} and {theirs or 'not there'} in {other.path}; take two of one size"
            )


def _sources(original: StoredBase, tuned: StoredBase) -> dict[str, str]:
    return {"ss_sd_model_name": original.name, "modelspec.merged_from": f"{tuned.name} minus {original.name}"}


def _work_folder(target: Path, original: StoredBase, tuned: StoredBase, settings: ExtractSettings) -> Path:
    """Return where finished layers lie until `target` is written: another folder where the outcome would be another."""
    files = sorted({place.file for base in (original, tuned) for place in base.places.values()})
    states = [[str(file.resolve()), (state := file.stat()).st_size, state.st_mtime_ns] for file in files]
    paths = [str(base.facts.path.resolve()) for base in (original, tuned)]
    plan = json.dumps([paths, states, asdict(settings)], default=str)
    return target.with_name(f".{target.name}.extracting-{hashlib.sha256(plan.encode()).hexdigest()[:8]}")


class _Finished:
    """The layers that are done, a file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, path: str) -> _Layer | None:
        """Return the layer at `path` where it is done."""
        file = self._file(path)
        if not is_there(file):
            return None
        try:
            tensors, entries = read_tensors(file)
        except FormatError:  # damaged since: it is done again
            return None
        if not tensors:
            return _Layer(None)
        layer = LoraLayer(tensors["down"].clone(), tensors["up"].clone(), float(tensors["down"].shape[0]))
        return _Layer(layer, float(entries["total"]), float(entries["kept"]))

    def keep(self, path: str, done: _Layer) -> None:
        """The layer is on the disk."""
        tensors = {} if done.layer is None else {"down": done.layer.down, "up": done.layer.up}
        entries = {"total": repr(done.total), "kept": repr(done.kept)}
        write_bytes(self._file(path), serialize_tensors(tensors, entries))

    def _file(self, path: str) -> Path:
        return self._folder / f"{hashlib.sha256(path.encode()).hexdigest()[:16]}.safetensors"

"""What an adapter file is: its format, family, layers, ranks and words, and what is wrong with it."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from sdlora.adapters.formats import peft
from sdlora.adapters.formats.detect import EMBEDDING, Contents
from sdlora.adapters.formats.embedding_keys import bundled_word, is_embedding, named_words, word_of
from sdlora.adapters.formats.ordered import words as marked_words
from sdlora.adapters.formats.parts import kinds_of, rank_of
from sdlora.adapters.formats.places import COMPONENTS
from sdlora.adapters.stored import Stored, adapter_hashes, is_pickle, stored
from sdlora.errors import FormatError
from sdlora.headers import TensorLayout
from sdlora.storage import user_path

_HASH = "sshs_model_hash"
_MANY = 200
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class AdapterReport:
    """What is known of an adapter file."""

    path: Path
    format: str
    family: str
    modules: dict[str, int]
    """Layers of each component."""
    kinds: dict[str, int]
    """Layers of each kind: lora, loha, lokr, dense, each with "dora " before it where there are magnitudes."""
    rank: int | list[int] | None
    """One number where all layers have it, else all of them; None where there is none."""
    alpha: float | list[float] | None
    """The same of alpha; None where only the header was read."""
    tokens: list[str]
    unknown_keys: list[str]
    problems: list[str]
    metadata: dict[str, str]
    bytes: int
    sha256: str = ""
    """Of the file; "" where only the header was read."""
    autov3: str = ""
    """First 12 digits of SHA-256 of what lies behind the header, as other programs show it."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "path": str(self.path)}


def inspect_adapter(path: Path | str, *, header_only: bool = False) -> AdapterReport:
    """Return what the adapter at `path` is. Raises FormatError where it is no adapter at all.

    With `header_only` no weight is read: no alpha, no hashes, and no problem that only the numbers show.
    """
    if is_pickle(user_path(path)):
        return _report_of_pickle(user_path(path))
    found = stored(path)
    layers = (_known_layers if found.layout.is_usual else _layers)(found.contents, found.layout)
    problems = list(layers.problems)
    numbers = _Numbers()
    if not header_only:
        numbers = _read_numbers(found)
        problems += numbers.problems
    return AdapterReport(
        path=found.path,
        format=found.contents.format,
        family=found.contents.family,
        modules=dict(layers.modules),
        kinds=dict(layers.kinds),
        rank=_one_or_all(list(layers.ranks)),
        alpha=_one_or_all(sorted(numbers.alphas)),
        tokens=_words(found, layers.bundled),
        unknown_keys=list(found.contents.places.unknown),
        problems=list(dict.fromkeys(problems)),
        metadata=found.metadata,
        bytes=sum(file.stat().st_size for file in found.files.values()),
        sha256=numbers.sha256,
        autov3=numbers.autov3,
    )


@dataclass(frozen=True)
class _Layers:
    """What keys and shapes tell of a file's layers."""

    modules: Mapping[str, int]
    kinds: Mapping[str, int]
    ranks: Sequence[int]
    bundled: Sequence[str]
    """Words inside the file."""
    problems: Sequence[str]


def _layers(contents: Contents, layout: TensorLayout) -> _Layers:
    places = contents.places
    layers = {name: places.shapes_of(name, layout.shapes) for name in places.layers}
    problems = list(places.problems)
    if places.unknown:
        problems.append(f"{len(places.unknown)} tensors are not understood, such as {places.unknown[0]!r}")
    components = Counter(name.partition(".")[0] for name in layers)
    return _Layers(
        modules={name: components[name] for name in COMPONENTS},
        kinds=dict(Counter(_kind(frozenset(parts)) for parts in layers.values())),
        ranks=sorted({rank_of(parts) for parts in layers.values()} - {0}),
        bundled=list(dict.fromkeys(bundled[0] for key in layout.shapes if (bundled := bundled_word(key)))),
        problems=problems,
    )


_known_layers = lru_cache(maxsize=32)(_layers)  # both are the same objects for files of one make


def _report_of_pickle(path: Path) -> AdapterReport:
    """Return what an embedding that is a pickle is; it has no header, so it is read."""
    from sdlora.adapters.file import read_adapter

    adapter = read_adapter(path)
    return AdapterReport(
        path=path,
        format=EMBEDDING,
        family=adapter.family,
        modules=dict.fromkeys(COMPONENTS, 0),
        kinds={},
        rank=None,
        alpha=None,
        tokens=list(adapter.tokens),
        unknown_keys=[],
        problems=[],
        metadata={},
        bytes=path.stat().st_size,
        sha256=adapter_hashes(path)[0],
    )


def inspect_folder(folder: Path) -> list[AdapterReport | FormatError]:
    """Return what each .safetensors file below the folder is by its header, or why it is refused, in order of names.

    Files of one folder of PEFT's are one adapter. With many files, on all processors.
    """
    files = list(dict.fromkeys(peft.folder_of(file) or file for file in sorted(folder.rglob("*.safetensors"))))
    if len(files) < _MANY:
        return [_report_or_error(file) for file in files]
    # Spawned, because a forked process would drag along whatever this one holds; nothing there leaves cycles behind.
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=gc.disable) as pool:
        return list(pool.map(_report_or_error, files, chunksize=_MANY // 4))


def _report_or_error(file: Path) -> AdapterReport | FormatError:
    try:
        return inspect_adapter(file, header_only=True)
    except FormatError as error:
        return error


@dataclass
class _Numbers:
    """What only the weights tell."""

    alphas: set[float] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    sha256: str = ""
    autov3: str = ""


def _read_numbers(found: Stored) -> _Numbers:
    from sdlora.adapters.file import non_finite_keys
    from sdlora.adapters.formats.layer_parts import placed_layer
    from sdlora.adapters.layers import DenseLayer

    tensors, places = found.tensors(), found.contents.places
    digest = found.tensor_sha256()
    numbers = _Numbers(sha256=found.sha256(), autov3=digest[:12])
    zero, broken = [], []
    for path in places.layers:
        try:
            layer = placed_layer(places, path, tensors)
        except FormatError as error:
            broken.append(str(error))
            continue
        if not isinstance(layer.inner, DenseLayer):
            numbers.alphas.add(round(layer.inner.alpha, 6))
        if layer is layer.inner and any(not tensor.any() for tensor in layer.tensors()):
            zero.append(path)
    if broken and not places.problems:
        numbers.problems.append(f"{len(broken)} layers cannot be read, such as: {broken[0]}")
    if bad := non_finite_keys(tensors):
        numbers.problems.append(f"{len(bad)} tensors hold NaN or infinity, such as {bad[0]}")
    if zero:
        numbers.problems.append(f"{len(zero)} of {len(places.layers)} layers change nothing, such as {zero[0]}")
    claimed = found.metadata.get(_HASH, "")
    if claimed and len(found.files) == 1 and claimed.lower() != digest:
        numbers.problems.append(f"its header says {_HASH} {claimed[:12]}, its content has {digest[:12]}")
    return numbers


@lru_cache(maxsize=256)
def _kind(parts: frozenset[str]) -> str:
    kind = next(iter(kinds_of(parts)), "unknown")
    return f"dora {kind}" if "dora_scale" in parts else kind


def words_of(found: Stored) -> list[str]:
    """Return the new words of an adapter: an embedding's own, those inside the file, those that it names beside it."""
    return _words(found, [bundled[0] for key in found.shapes if (bundled := bundled_word(key))])


def _words(found: Stored, bundled: Sequence[str]) -> list[str]:
    shapes, metadata = found.shapes, found.metadata
    if found.contents.format == EMBEDDING and is_embedding(shapes):
        return [word_of(shapes, metadata, found.path.stem)]
    return list(dict.fromkeys([*bundled, *marked_words(shapes, metadata), *named_words(metadata)]))


def _one_or_all(numbers: list[Number]) -> Number | list[Number] | None:
    return (numbers[0] if len(numbers) == 1 else numbers) if numbers else None

"""Whether two adapters do the same: their updates compared layer by layer, and a written file with what it was written from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sdlora.adapters.file import AdapterFile
from sdlora.adapters.layers import AdapterLayer, DeltaLayer, DoraLayer
from sdlora.adapters.write import read_written
from sdlora.errors import FormatError

# What rounding to the stored type may change a product of two factors by, relative to its norm.
_ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Difference:
    """How far one adapter is from another."""

    layers: int
    """Layers that both have."""
    largest: float
    """Over these layers and their parts, the largest |delta-W' - delta-W| / |delta-W| (Frobenius norms)."""
    worst: str
    """The layer where that is."""
    problems: tuple[str, ...]
    """What only one of them has, or has in another shape."""
    allowed: float
    """What rounding to the types of both may come to."""

    @property
    def same(self) -> bool:
        """Whether both do the same, rounding aside."""
        return not self.problems and self.largest <= self.allowed

    def sentence(self) -> str:
        """Return what was found."""
        if self.problems:
            return f"{len(self.problems)} differences, such as: {self.problems[0]}"
        if not self.layers:
            return "words alone, all equal"
        where = f", at {self.worst}" if self.largest else ""
        return f"{self.layers} layers, largest relative difference of delta-W {self.largest:.1e}{where}"


def difference(source: AdapterFile, other: AdapterFile) -> Difference:
    """Return how far `other` is from `source`, one layer in memory at a time."""
    problems = [f"layer {path} is missing" for path in source.layers if path not in other.layers]
    problems += [f"layer {path} is in it besides" for path in other.layers if path not in source.layers]
    common = [path for path in source.layers if path in other.layers]
    largest, worst, allowed = 0.0, "", 0.0
    for path in common:
        first, second = source.layers[path], other.layers[path]
        allowed = max(allowed, *(_ALLOWED.get(tensor.dtype, 0.1) for tensor in (*first.tensors(), *second.tensors())))
        try:
            found = max(_distances(first, second))
        except FormatError as error:
            problems.append(f"layer {path} {error}")
            continue
        if found > largest or found != found:
            largest, worst = found, path
    problems += _different_words(source, other)
    return Difference(len(common), largest, worst, tuple(problems), allowed)


def verify_written(adapter: AdapterFile, path: Path) -> None:
    """What lies at `path`, read by its own format's rules, has this adapter's updates. Raises FormatError where not."""
    found = difference(adapter, read_written(adapter, path))
    if not found.same:
        raise FormatError(f"{path}: was written but does not read back as what was trained: {found.sentence()}")


def _distances(first: AdapterLayer, second: AdapterLayer) -> Iterator[float]:
    if _identical(first, second):
        yield 0.0
        return
    if isinstance(first, DoraLayer) != isinstance(second, DoraLayer):
        raise FormatError(f"is {first.title} in one and {second.title} in the other")
    if isinstance(first, DoraLayer) and isinstance(second, DoraLayer):
        if first.by_column != second.by_column or first.magnitude.numel() != second.magnitude.numel():
            raise FormatError("has magnitudes for other rows or columns")
        yield _relative(first.magnitude.float().flatten(), second.magnitude.float().flatten())
        first, second = first.lora, second.lora
    assert isinstance(first, DeltaLayer) and isinstance(second, DeltaLayer)
    one, other = first.delta_weight().flatten(1), second.delta_weight().flatten(1)
    if one.shape != other.shape:
        raise FormatError(f"is for a weight {first.shape} in one and {second.shape} in the other")
    yield _relative(one, other)


def _identical(first: AdapterLayer, second: AdapterLayer) -> bool:
    """Return whether both are made of the same numbers, so that no product need be formed."""
    if type(first) is not type(second) or _scale(first) != _scale(second):
        return False
    ours, theirs = first.tensors(), second.tensors()
    return len(ours) == len(theirs) and all(
        one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(ours, theirs, strict=True)
    )


def _scale(layer: AdapterLayer) -> tuple[float, int]:
    return getattr(layer.inner, "alpha", 1.0), layer.rank


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    norm, apart = float(one.norm()), float((other - one).norm())
    return apart / norm if norm else (0.0 if apart == 0 else float("inf"))


def _different_words(source: AdapterFile, other: AdapterFile) -> Iterator[str]:
    for word in source.tokens.keys() | other.tokens.keys():
        one, two = source.tokens.get(word, {}), other.tokens.get(word, {})
        same = one.keys() == two.keys() and all(
            one[name].shape == two[name].shape
            and torch.allclose(one[name].float(), two[name].float(), rtol=1.6e-2, atol=1e-4)
            for name in one
        )
        if not same:
            yield f"the word {word!r} has other vectors"

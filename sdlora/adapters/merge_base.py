"""Adapters merged into a copy of the base: each weight changed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sdlora.adapters.algebra import OnLayer
from sdlora.adapters.derived import merged_from
from sdlora.adapters.fit import refuse_misfit
from sdlora.adapters.merge import MergePart, MergeSettings, combined, layers_at, refuse_wrong_parts
from sdlora.errors import FormatError
from sdlora.families.base_copy import write_changed
from sdlora.families.stored_base import WEIGHT, StoredBase


@dataclass(frozen=True)
class MergedBase:
    """What became of a base."""

    layers: int
    """How many were changed."""
    error: float
    """|written - true| / |true sum of updates| over these layers (Frobenius): what rounding to the file's type costs."""
    worst: str
    worst_error: float


def merge_into_base(
    parts: Sequence[MergePart],
    base: StoredBase,
    target: Path,
    settings: MergeSettings,
    *,
    precision: str = "",
    on_layer: OnLayer | None = None,
) -> MergedBase:
    """`target` is a copy of the base, in its own layout, to which the weighted sum of the parts' updates is added.

    Each part's update is that of the bare base, DoRA's too, as when several adapters act beside it. Weights keep their
    type, or get `precision`. Raises ModelError for an adapter that does not fit the base, FormatError where no layer
    is left, and as `merge` and `write_changed` do.
    """
    refuse_wrong_parts(parts)
    shapes = {path: base.shapes[path + WEIGHT] for path in base.layers}
    for part in parts:
        refuse_misfit(part.adapter, shapes, base.name, base.facts.family)
    changed = [path for path in base.layers if layers_at(parts, path)]
    if not changed:
        raise FormatError("nothing is left to merge: no adapter has layers, or all weights are 0")
    errors = _Errors()

    def change(path: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        updates = [strength * layer.update_of(weight).flatten(1) for strength, layer in layers_at(parts, path)]
        update = combined(updates, path, settings).reshape(weight.shape)
        errors.add(path, weight, update, dtype)
        if on_layer:
            on_layer(errors.layers, len(changed))
        return weight + update

    metadata = merged_from([part.adapter.metadata for part in parts], [part.title for part in parts])
    write_changed(base, target, changed, change, precision=precision, metadata=metadata)
    assert errors.layers == len(changed)
    return MergedBase(errors.layers, errors.relative(), errors.worst, errors.worst_error)


class _Errors:
    """What rounding costs, added up over layers."""

    def __init__(self) -> None:
        self.layers, self.worst, self.worst_error = 0, "", 0.0
        self._error = self._total = 0.0

    def add(self, path: str, weight: torch.Tensor, update: torch.Tensor, dtype: torch.dtype) -> None:
        """A weight plus its update was rounded to `dtype`."""
        true = weight.double() + update
        apart = float((true.to(dtype).double() - true).norm())
        size = float(update.double().norm())
        self.layers, self._error, self._total = self.layers + 1, self._error + apart**2, self._total + size**2
        if size and apart / size > self.worst_error:
            self.worst, self.worst_error = path, apart / size

    def relative(self) -> float:
        """Return |rounding| / |updates|."""
        return (self._error / self._total) ** 0.5 if self._total else 0.0

"""What acts beside a base's layers: a forward hook on each adds the adapters' share to its output.

Nothing of the layer itself is wrapped, replaced or written, so its weights stay as they are in any precision,
quantised ones too, and peft may wrap the layer as well. A branch always sees the bare layer's output, so that
the order of adapters does not matter.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from sdlora.adapters.layers import AdapterLayer, DeltaLayer, DenseLayer, DoraLayer, Layer, LoraLayer, with_tensors
from sdlora.adapters.side_by_side import Factors, SideBySide
from sdlora.families.base import LoadedBase
from sdlora.families.quantize import full_weight

Strength = float | torch.Tensor
"""How strongly a branch acts: in all rows of a batch, or [B,1,...] in each."""


BlockStrength = Callable[[str], float]
"""Returns how strongly an adapter acts in a block of the UNet, named as in `blocks.UNET_BLOCKS`."""


class Branch(Protocol):
    """One adapter beside one layer."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors that it holds."""
        ...

    def __call__(self, inputs: torch.Tensor, output: torch.Tensor, strength: Strength) -> torch.Tensor:
        """Return what is added to `output`, which the bare layer gave for `inputs`."""
        ...


def branch_of(layer: nn.Module, adapter: AdapterLayer, base: LoadedBase) -> Branch:
    """Return the branch that acts beside the bare `layer` as `adapter`'s update of its weight.

    Its tensors are on the base's device, in the base's precision.
    """
    if isinstance(adapter, DoraLayer):
        return _DoraBranch(layer, adapter, base)
    assert isinstance(adapter, DeltaLayer)
    if isinstance(adapter, LoraLayer) and adapter.mid is None and getattr(layer, "groups", 1) == 1:
        return _LoraBranch(layer, adapter, base)
    if isinstance(adapter, DenseLayer):
        return DenseBranch(layer, adapter.delta.to(base.device, base.dtype).reshape(_weight_shape(layer)))
    return _DeltaBranch(layer, adapter, base)


def attach(layer: nn.Module, name: str, branch: Branch, block: str = "") -> None:
    """`branch` is in place beside the bare `layer`, which lies in that block, under `name`, not yet active."""
    (_find(layer) or _Branches(layer, block)).members[name] = branch


def detach(base: LoadedBase, name: str) -> None:
    """`name` is gone; a layer without branches has no hook either."""
    for branches in list(_all(base)):
        branches.members.pop(name, None)
        branches.act(branches.strengths, branches.columns)
        if not branches.members:
            branches.handle.remove()


def set_strengths(
    base: LoadedBase, strengths: Mapping[str, float], in_text_encoders: Mapping[str, float] = MappingProxyType({})
) -> None:
    """Exactly the branches of `strengths` act, each times its strength; text encoders may have others of their own."""
    for component, module in base.components():
        own = {**strengths, **in_text_encoders} if component in base.text_encoders else strengths
        for branches in _within(module):
            branches.act(own)


def set_rows(base: LoadedBase, rows: Sequence[Mapping[str, BlockStrength]]) -> None:
    """Exactly the branches of `rows` act on the UNet, in each row of a batch its own ones times their strengths."""
    names = dict.fromkeys(name for row in rows for name in row)

    @functools.cache
    def within(block: str) -> tuple[dict[str, float], list[_Column]]:
        strengths, columns = dict[str, float](), list[_Column]()
        for name in names:
            column = tuple(row[name](block) if name in row else 0.0 for row in rows)
            if len(set(column)) == 1:
                strengths[name] = column[0]
            else:
                columns.append(_Column(name, column, tuple(_Rows.of(column, base.device))))
        return strengths, columns

    for branches in _within(base.unet):
        branches.act(*within(branches.block))


@contextmanager
def branches_off(base: LoadedBase) -> Iterator[None]:
    """Inside, no branch acts; afterwards all do as before."""
    changed = [(branches, branches.strengths, branches.columns) for branches in _all(base)]
    try:
        for branches, _, _ in changed:
            branches.act({})
        yield
    finally:
        for branches, strengths, columns in changed:
            branches.act(strengths, columns)


def branch_tensors(base: LoadedBase) -> Iterator[torch.Tensor]:
    """Yield the tensors of all branches."""
    for branches in _all(base):
        for branch in branches.members.values():
            yield from branch.tensors()


class DenseBranch:
    """Adds what the layer would give with the weight `delta`, of the weight's shape, and without bias."""

    def __init__(self, layer: nn.Module, delta: torch.Tensor) -> None:
        self.layer, self.delta = layer, delta

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.delta,)

    def __call__(self, inputs: torch.Tensor, output: torch.Tensor, strength: Strength) -> torch.Tensor:
        return _apply(self.layer, inputs, self.delta) * strength


class _DeltaBranch:
    """Forms the update from its factors in float32 for each pass, which costs time instead of memory."""

    def __init__(self, layer: nn.Module, adapter: DeltaLayer, base: LoadedBase) -> None:
        self.layer, self.adapter = layer, _cast(adapter, base)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.adapter.tensors()

    def __call__(self, inputs: torch.Tensor, output: torch.Tensor, strength: Strength) -> torch.Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            delta = self.adapter.delta_weight().reshape(_weight_shape(self.layer))
        return _apply(self.layer, inputs, delta.to(self.adapter.tensors()[0].dtype)) * strength


class _LoraBranch:
    """Two narrow products; of a convolution the first has the layer's stride and padding, the second is 1 x 1."""

    def __init__(self, layer: nn.Module, adapter: LoraLayer, base: LoadedBase) -> None:
        out, *inside = _weight_shape(layer)
        adapter = _cast(adapter, base)
        kernel = (1, 1) if isinstance(layer, nn.Conv2d) else ()
        self.layer, self.alpha, self.rank = layer, adapter.alpha, adapter.rank
        self.down = adapter.down.reshape(adapter.rank, *inside)
        self.up = adapter.up.reshape(out, adapter.rank, *kernel)

    @property
    def is_linear(self) -> bool:
        return self.up.ndim == 2

    @property
    def factors(self) -> Factors:
        return Factors(self.down, self.up, self.alpha / self.rank)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.down, self.up)

    def __call__(self, inputs: torch.Tensor, output: torch.Tensor, strength: Strength) -> torch.Tensor:
        # The narrow product is scaled, which is less work than scaling the wide one.
        narrow = _apply(self.layer, inputs, self.down) * (strength * self.alpha / self.rank)
        return functional.conv2d(narrow, self.up) if self.up.ndim == 4 else functional.linear(narrow, self.up)


class _DoraBranch:
    """Adds DoRA(W, delta-W) - W, its norms taken once, at the full weight."""

    def __init__(self, layer: nn.Module, adapter: DoraLayer, base: LoadedBase) -> None:
        weight = full_weight(layer).to(base.device)
        exact = _cast(adapter.lora, base, torch.float32)
        gain = replace(adapter, lora=exact, magnitude=adapter.magnitude.to(base.device)).gain(weight)
        gain = gain.reshape(-1, 1, 1) if isinstance(layer, nn.Conv2d) else gain.flatten()
        self.layer, self.by_column = layer, adapter.by_column
        self.inner = branch_of(layer, adapter.lora, base)
        # Both kept, because gain is near 1 and half precision would lose what it differs by.
        self.gain, self.excess = gain.to(base.dtype), (gain - 1).to(base.dtype)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*self.inner.tensors(), self.gain, self.excess)

    def __call__(self, inputs: torch.Tensor, output: torch.Tensor, strength: Strength) -> torch.Tensor:
        if self.by_column:  # (W + delta-W)(g x) - W x
            layer: Any = self.layer
            without_hooks = self._without_bias(layer.forward(inputs * self.excess))
            return (without_hooks + self.inner(inputs * self.gain, output, 1.0)) * strength
        return (self.excess * self._without_bias(output) + self.gain * self.inner(inputs, output, 1.0)) * strength

    def _without_bias(self, output: torch.Tensor) -> torch.Tensor:
        bias: Any = self.layer.bias
        if bias is None:
            return output
        return output - (bias[:, None, None] if isinstance(self.layer, nn.Conv2d) else bias)


@dataclass(frozen=True)
class _Rows:
    """Neighbouring rows of a batch in which an adapter acts, and how strongly in each."""

    rows: slice
    strengths: float | torch.Tensor

    @staticmethod
    def of(column: Sequence[float], device: torch.device) -> Iterator[_Rows]:
        """Yield those of a strength for each row of the batch, 0 where it does not act."""
        for acts, members in itertools.groupby(enumerate(column), key=lambda row: row[1] != 0):
            if acts:
                rows, strengths = zip(*members, strict=True)
                alike = len(set(strengths)) == 1
                strength = strengths[0] if alike else torch.tensor(strengths, device=device)
                yield _Rows(slice(rows[0], rows[-1] + 1), strength)

    def strength(self, output: torch.Tensor) -> Strength:
        """Return what multiplies its rows of `output`."""
        if isinstance(self.strengths, float):
            return self.strengths
        return self.strengths.to(output.dtype).reshape(-1, *[1] * (output.ndim - 1))


@dataclass(frozen=True)
class _Column:
    """An adapter that acts in some rows of a batch, or not equally in all."""

    name: str
    strengths: tuple[float, ...]
    """In each row."""
    parts: tuple[_Rows, ...]


class _Branches:
    """The hook of one layer: the branches beside it, and how strongly each acts in which rows."""

    def __init__(self, layer: nn.Module, block: str) -> None:
        self.block = block
        self.members: dict[str, Branch] = {}
        self.act({})
        self.handle = layer.register_forward_hook(self)

    def act(self, strengths: Mapping[str, float], columns: Sequence[_Column] = ()) -> None:
        """Exactly these branches act, as far as they are here: alike in all rows, or each in rows of its own."""
        self.strengths = {name: value for name, value in strengths.items() if name in self.members and value}
        self.columns = tuple(column for column in columns if column.name in self.members)
        loras = [
            (column.name, (branch.factors, column.strengths))
            for column in self.columns
            if isinstance(branch := self.members[column.name], _LoraBranch) and branch.is_linear
        ]
        together = SideBySide([acting for _, acting in loras]) if len(loras) > 1 else None
        self._side_by_side = together if together and together.is_small else None
        names = {name for name, _ in loras} if self._side_by_side else ()
        self._others = tuple(column for column in self.columns if column.name not in names)

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        result = output
        for name, strength in self.strengths.items():
            result = result + self.members[name](inputs[0], output, strength).to(output.dtype)
        if self._side_by_side:
            result = self._side_by_side.add_to(result, inputs[0])
        return self._add_rows(inputs[0], output, result) if self._others else result

    def _add_rows(self, inputs: torch.Tensor, output: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        shares = []
        for column in self._others:  # all before any is added, since they are told the bare output
            for part in column.parts:
                own = output[part.rows]
                share = self.members[column.name](inputs[part.rows], own, part.strength(own))
                shares.append((part.rows, share.to(output.dtype)))
        if output.requires_grad and result is output:
            result = output.clone()
        for rows, share in shares:
            result[rows] += share
        return result


def _all(base: LoadedBase) -> Iterator[_Branches]:
    for _, module in base.components():
        yield from _within(module)


def _within(module: nn.Module) -> Iterator[_Branches]:
    return (found for layer in module.modules() if (found := _find(layer)))


def _find(layer: nn.Module) -> _Branches | None:
    return next((hook for hook in layer._forward_hooks.values() if isinstance(hook, _Branches)), None)


def _apply(layer: Any, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return what the layer would give with that weight and without bias."""
    inputs = inputs.to(weight.dtype)
    if isinstance(layer, nn.Conv2d):  # with its stride, padding, dilation and groups
        return layer._conv_forward(inputs, weight, None)
    return functional.linear(inputs, weight)


def _weight_shape(layer: Any) -> tuple[int, ...]:
    """Return the shape of a layer's weight, in whatever form it is held."""
    if isinstance(layer, nn.Conv2d):
        return tuple(layer.weight.shape)
    return (layer.out_features, layer.in_features)


def _cast(adapter: Layer, base: LoadedBase, dtype: torch.dtype | None = None) -> Layer:
    """Return it with all tensors on the base's device, in `dtype` or the base's."""
    return with_tensors(adapter, lambda tensor: tensor.to(base.device, dtype or base.dtype))

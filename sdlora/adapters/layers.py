"""What an adapter does to one layer, one class a kind, and what can be computed of it without a model.

Sources: LoRA (Hu 2106.09685), DoRA (Liu 2402.09353), LoHa (Hyeon-Woo 2108.06098), LoKr (Yeh 2309.14859),
Tucker cores and plain differences as LyCORIS has them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

Pair = tuple[torch.Tensor, torch.Tensor]
Layer = TypeVar("Layer", bound="AdapterLayer")


class AdapterLayer(ABC):
    """The update of one layer's weight, whatever form it is kept in."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The kind's usual name."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Width of the update."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it is for, flattened to [out, in * kh * kw] where the factors do not tell more."""

    @property
    @abstractmethod
    def inner(self) -> Any:
        """The update without DoRA's magnitudes: itself, but of DoRA what they are put around. Of any kind of DeltaLayer."""

    @abstractmethod
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return every tensor that it is made of."""

    @abstractmethod
    def update_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return what is added to the base weight `weight` at strength 1, in its shape, float32."""


class DeltaLayer(AdapterLayer):
    """An update that does not depend on the base weight."""

    @property
    def inner(self) -> Any:
        """Itself."""
        return self

    @abstractmethod
    def delta_weight(self) -> torch.Tensor:
        """Return the update, delta-W, in float32, in `shape`."""

    def delta_norm(self) -> float:
        """Return the Frobenius norm of delta-W."""
        return float(self.delta_weight().norm())

    def update_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return delta-W in the shape of `weight`."""
        return self.delta_weight().reshape(weight.shape)


@dataclass(frozen=True)
class LoraLayer(DeltaLayer):
    """delta-W = alpha / rank * up @ down.

    Linear: down [r,in], up [out,r]. Convolution: down [r,in,kh,kw], up [out,r,1,1]; or, in Tucker form, with a
    core mid [r,r,kh,kw] between down [r,in,1,1] and up [out,r,1,1].
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    mid: torch.Tensor | None = None

    @property
    def title(self) -> str:
        """The kind's usual name."""
        return "LoRA" if self.mid is None else "LoRA in Tucker form"

    @property
    def rank(self) -> int:
        """Width of the update."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product is multiplied with, alpha / rank."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it is for."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return down and up, and mid where there is one."""
        return (self.down, self.up) if self.mid is None else (self.down, self.up, self.mid)

    def delta_weight(self) -> torch.Tensor:
        """Return delta-W in float32, [out,in] or [out,in,kh,kw]."""
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        product = up @ down if self.mid is None else torch.einsum("nmkl,in,mj->ijkl", self.mid.float(), up, down)
        return (self.scale * product).reshape(self.shape)

    def delta_norm(self) -> float:
        """Return the Frobenius norm of delta-W, without a core without forming it: sqrt(trace((B^T B)(A A^T)))."""
        if self.mid is not None:
            return float(self.delta_weight().double().norm())
        up, down = self.up.double().flatten(1), self.down.double().flatten(1)
        squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
        return abs(self.scale) * float(squared.sqrt())


@dataclass(frozen=True)
class LohaLayer(DeltaLayer):
    """delta-W = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), the middle product element by element.

    w1_a, w2_a [out,r]; w1_b, w2_b [r,in], of a convolution [r, in * kh * kw]. In Tucker form, of a convolution:
    t1, t2 [r,r,kh,kw]; w1_a, w2_a [r,out]; w1_b, w2_b [r,in]; each half is then sum over i, j of
    t[i,j] * a[i,out] * b[j,in].
    """

    w1_a: torch.Tensor
    w1_b: torch.Tensor
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    alpha: float
    t1: torch.Tensor | None = None
    t2: torch.Tensor | None = None

    @property
    def title(self) -> str:
        """The kind's usual name."""
        return "LoHa" if self.t1 is None else "LoHa in Tucker form"

    @property
    def rank(self) -> int:
        """Width of each half."""
        return self.w1_b.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it is for, flattened where there are no cores."""
        return _product_shape((self.w1_a, self.w1_b), self.t1)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the four factors, and the cores where there are any."""
        cores = tuple(core for core in (self.t1, self.t2) if core is not None)
        return (self.w1_a, self.w1_b, self.w2_a, self.w2_b, *cores)

    def delta_weight(self) -> torch.Tensor:
        """Return delta-W in float32, in `shape`."""
        first = _product((self.w1_a, self.w1_b), self.t1)
        return self.alpha / self.rank * first * _product((self.w2_a, self.w2_b), self.t2)


@dataclass(frozen=True)
class LokrLayer(DeltaLayer):
    """delta-W = scale * kron(w1, w2), each given whole or as the pair (a, b) with w = a @ b.

    w1 [o1,i1], w2 [o2,i2] or [o2,i2,kh,kw], out = o1 * o2 and in = i1 * i2. Of a convolution the pair of w2 is
    [o2,r] and [r, i2 * kh * kw], or, with the core t2 [r,r,kh,kw], [r,o2] and [r,i2].
    """

    w1: torch.Tensor | Pair
    w2: torch.Tensor | Pair
    alpha: float
    t2: torch.Tensor | None = None

    @property
    def title(self) -> str:
        """The kind's usual name."""
        return "LoKr" if self.t2 is None else "LoKr in Tucker form"

    @property
    def rank(self) -> int:
        """Width of the pairs, that of w2 before that of w1; where both are whole, the smaller side of w2."""
        for factor in (self.w2, self.w1):
            if isinstance(factor, tuple):
                return factor[1].shape[0]
        out, *inside = _factor_shape(self.w2, self.t2)
        return min(out, math.prod(inside))

    @property
    def scale(self) -> float:
        """What the product is multiplied with: alpha / rank, but 1 where neither factor is a pair, as all readers do."""
        return self.alpha / self.rank if isinstance(self.w1, tuple) or isinstance(self.w2, tuple) else 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it is for, flattened where w2 is a pair without a core."""
        (out_1, in_1), (out_2, in_2, *kernel) = _factor_shape(self.w1, None), _factor_shape(self.w2, self.t2)
        return (out_1 * out_2, in_1 * in_2, *kernel)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the factors, and the core where there is one."""
        factors = [*(self.w1 if isinstance(self.w1, tuple) else (self.w1,))]
        factors += self.w2 if isinstance(self.w2, tuple) else (self.w2,)
        return (*factors,) if self.t2 is None else (*factors, self.t2)

    def delta_weight(self) -> torch.Tensor:
        """Return delta-W in float32, in `shape`."""
        # The input channel comes before the kernel, so flattening w2 changes nothing but the shape.
        product = torch.kron(_factor(self.w1, None), _factor(self.w2, self.t2).flatten(1))
        return (self.scale * product).reshape(self.shape)

    def delta_norm(self) -> float:
        """Return the Frobenius norm of delta-W, without forming it: |scale| * |w1| * |w2|."""
        return abs(self.scale) * float(_factor(self.w1, None).norm() * _factor(self.w2, self.t2).norm())


@dataclass(frozen=True)
class DenseLayer(DeltaLayer):
    """delta-W itself, in the weight's shape: the difference that full fine-tuning makes."""

    delta: torch.Tensor

    @property
    def title(self) -> str:
        """The kind's usual name."""
        return "a dense difference"

    @property
    def rank(self) -> int:
        """The largest rank that such a matrix can have."""
        return min(self.delta.shape[0], self.delta[0].numel())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it is for."""
        return tuple(self.delta.shape)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the difference."""
        return (self.delta,)

    def delta_weight(self) -> torch.Tensor:
        """Return delta-W in float32."""
        return self.delta.float()


@dataclass(frozen=True)
class DoraLayer(AdapterLayer):
    """W' = magnitude * (W + delta-W) / |W + delta-W|, the norm of each output row over all other dimensions.

    magnitude [out], or with ones as the other dimensions. One of [1,in] or [1,in,1,1] belongs to input columns
    instead, as older LyCORIS versions and OneTrainer have it; the norm is then that of each column.
    """

    lora: DeltaLayer
    magnitude: torch.Tensor

    @property
    def title(self) -> str:
        """The kind's usual name."""
        return f"DoRA{'' if isinstance(self.lora, LoraLayer) else f' of {self.lora.title}'}{' by input columns' if self.by_column else ''}"

    @property
    def rank(self) -> int:
        """Width of the inner update."""
        return self.lora.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it is for."""
        return self.lora.shape

    @property
    def inner(self) -> Any:
        """The inner update."""
        return self.lora

    @property
    def by_column(self) -> bool:
        """Whether magnitudes belong to input columns instead of output rows."""
        return self.magnitude.ndim > 1 and self.magnitude.shape[0] == 1 < self.magnitude.shape[1]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return those of the inner update, and the magnitudes."""
        return (*self.lora.tensors(), self.magnitude)

    def gain(self, weight: torch.Tensor) -> torch.Tensor:
        """Return what each row or column of W + delta-W is multiplied with, float32, to broadcast against it."""
        changed = weight.float() + self.lora.update_of(weight)
        kept = 1 if self.by_column else 0
        others = [dim for dim in range(changed.ndim) if dim != kept]
        # A row of zeros has no direction; it stays zero.
        norm = torch.linalg.vector_norm(changed, dim=others, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
        return self.magnitude.float().reshape(norm.shape) / norm

    def update_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W' - W in the shape of `weight`."""
        return self.gain(weight) * (weight.float() + self.lora.update_of(weight)) - weight.float()


def with_tensors(layer: Layer, change: Callable[[torch.Tensor], torch.Tensor]) -> Layer:
    """Return the layer with `change` done to each of its tensors."""

    def changed(value: Any) -> Any:
        if isinstance(value, AdapterLayer):
            return with_tensors(value, change)
        if isinstance(value, tuple):
            return tuple(changed(part) for part in value)
        return change(value) if isinstance(value, torch.Tensor) else value

    kind: Any = layer  # every class of layers is a dataclass
    return type(layer)(**{field.name: changed(getattr(kind, field.name)) for field in fields(kind)})


def _product(pair: Pair, core: torch.Tensor | None) -> torch.Tensor:
    a, b = pair[0].float(), pair[1].float()
    return a @ b if core is None else torch.einsum("ijkl,ip,jr->prkl", core.float(), a, b)


def _product_shape(pair: Pair, core: torch.Tensor | None) -> tuple[int, ...]:
    a, b = pair
    return (a.shape[0], b.shape[1]) if core is None else (a.shape[1], b.shape[1], *core.shape[2:])


def _factor(factor: torch.Tensor | Pair, core: torch.Tensor | None) -> torch.Tensor:
    return _product(factor, core) if isinstance(factor, tuple) else factor.float()


def _factor_shape(factor: torch.Tensor | Pair, core: torch.Tensor | None) -> tuple[int, ...]:
    return _product_shape(factor, core) if isinstance(factor, tuple) else tuple(factor.shape)

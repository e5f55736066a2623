"""Updates as products of two factors and as singular values: what merging and resizing are made of.

Every kind but dense differences is U @ V with a width R far below the weight's. The singular values of such a product
are those of a matrix [R,R] that two QR decompositions leave, so that no SVD of a whole weight is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sdlora.adapters.layers import AdapterLayer, DeltaLayer, LohaLayer, LokrLayer, LoraLayer, Pair

OnLayer = Callable[[int, int], None]
"""Called with (layers done, layers)."""
_WIDE_CONVOLUTIONS = (".conv1", ".conv2", ".conv", ".conv_in", ".conv_out")
_CONVOLVED_PROJECTIONS = ("sd1",)
_FIRST_GUESS, _OVERSAMPLING, _POWER_STEPS = 32, 8, 3


@dataclass(frozen=True)
class Product:
    """An update left @ right: left [out,R], right [R, in * kh * kw], for a weight of `shape`."""

    left: torch.Tensor
    right: torch.Tensor
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """R."""
        return self.left.shape[1]

    def matrix(self) -> torch.Tensor:
        """Return the update, [out, in * kh * kw]."""
        return self.left @ self.right


@dataclass(frozen=True)
class Spectrum:
    """left @ diag(values) @ right, the largest singular values of an update first; `total` is its squared norm."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    shape: tuple[int, ...]
    total: float

    def energy(self, rank: int) -> float:
        """Return which share of the squared norm the first `rank` values hold; 1 for an update of nothing."""
        return min(1.0, float(self.values[:rank].square().sum()) / self.total) if self.total else 1.0

    def layer(self, rank: int, dtype: torch.dtype) -> LoraLayer:
        """Return the best update of that rank as LoRA with scale 1, each value shared out evenly over both factors."""
        rank = max(1, min(rank, len(self.values)))
        root = self.values[:rank].sqrt()
        out, inside, *kernel = self.shape
        up = (self.left[:, :rank] * root).reshape(out, rank, *(1 for _ in kernel))
        down = (root[:, None] * self.right[:rank]).reshape(rank, inside, *kernel)
        return LoraLayer(down.to(dtype).contiguous(), up.to(dtype).contiguous(), float(rank))


@dataclass(frozen=True)
class Truncation:
    """Where singular values are cut off: at a rank, at a share of the squared norm, or at whichever comes first."""

    rank: int = 0
    """0: any."""
    energy: float = 1.0

    def rank_of(self, spectrum: Spectrum) -> int:
        """Return how many singular values are kept, at least one."""
        limit = min(self.rank or len(spectrum.values), len(spectrum.values))
        if self.energy >= 1 or not spectrum.total:
            return limit
        shares = spectrum.values.square().cumsum(0) / spectrum.total
        return min(limit, int((shares < self.energy).sum()) + 1)


def product_of(layer: DeltaLayer) -> Product | None:
    """Return a layer's update as a product in float32; None where the factors would be no smaller than the update."""
    if isinstance(layer, LoraLayer):
        left, right = layer.scale * layer.up.float().flatten(1), layer.down.float().flatten(1)
        if layer.mid is not None:
            right = torch.einsum("nmkl,mi->nikl", layer.mid.float(), right).flatten(1)
        return Product(left, right, layer.shape)
    if isinstance(layer, LohaLayer) and layer.t1 is None:
        if layer.rank**2 * 2 > min(layer.shape):
            return None
        left = torch.einsum("oi,oj->oij", layer.w1_a.float(), layer.w2_a.float()).flatten(1)
        right = torch.einsum("ix,jx->ijx", layer.w1_b.float(), layer.w2_b.float()).flatten(0, 1)
        return Product(left * (layer.alpha / layer.rank), right, layer.shape)
    if isinstance(layer, LokrLayer) and layer.t2 is None:
        (left_1, right_1), (left_2, right_2) = _pair(layer.w1), _pair(layer.w2)
        if left_1.shape[1] * left_2.shape[1] * 2 > min(layer.shape[0], math.prod(layer.shape[1:])):
            return None
        return Product(layer.scale * torch.kron(left_1, left_2), torch.kron(right_1, right_2), layer.shape)
    return None


def sum_of(products: list[Product]) -> Product:
    """Return the sum of updates for one weight, exactly: their factors side by side."""
    shape = max((product.shape for product in products), key=len)
    left = torch.cat([product.left for product in products], dim=1)
    return Product(left, torch.cat([product.right for product in products]), shape)


def spectrum_of_product(product: Product) -> Spectrum:
    """Return all singular values of a product, through two QR decompositions, in float64 inside."""
    left, left_core = torch.linalg.qr(product.left.double())
    right, right_core = torch.linalg.qr(product.right.double().T)
    u, values, v = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return _spectrum(left @ u, values, v @ right.T, product.shape, float(values.square().sum()))


def spectrum_of_matrix(matrix: torch.Tensor, shape: tuple[int, ...], wanted: Truncation) -> Spectrum:
    """Return the largest singular values of an update [out, in * kh * kw], enough for `wanted`.

    By randomised SVD (Halko, Martinsson and Tropp 2011, algorithm 4.4) with a width that grows until the share is
    reached; by a whole SVD where that is not much wider.
    """
    matrix = matrix.float()
    total, smallest = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2, min(matrix.shape)
    width = wanted.rank if wanted.energy >= 1 else _FIRST_GUESS
    while width and (width + _OVERSAMPLING) * 3 < smallest and total:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # svd_lowrank draws from the global generator
            u, values, v = torch.svd_lowrank(matrix, q=width + _OVERSAMPLING, niter=_POWER_STEPS)
        found = _spectrum(u[:, :width], values[:width], v.T[:width], shape, total)
        if (wanted.rank and width >= wanted.rank) or found.energy(width) >= wanted.energy < 1:
            return found
        width *= 2
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    return _spectrum(u, values, v, shape, total)


def spectrum_of(layer: DeltaLayer, shape: tuple[int, ...], wanted: Truncation) -> Spectrum:
    """Return the singular values of the update of a weight of `shape`, enough for `wanted`."""
    product = product_of(layer)
    if product is None:
        return spectrum_of_matrix(layer.delta_weight().flatten(1), shape, wanted)
    return replace(spectrum_of_product(product), shape=shape)


def weight_shape(path: str, family: str, layer: AdapterLayer) -> tuple[int, ...]:
    """Return the shape of the weight at `path`, which LoHa and LoKr of a convolution may leave flattened.

    Of Stable Diffusion's convolutions those in resnets, samplers and at both ends are 3 x 3, the others 1 x 1.
    """
    if len(layer.shape) > 2:
        return layer.shape
    out, inside = layer.shape
    if path.endswith(_WIDE_CONVOLUTIONS) and inside % 9 == 0:
        return (out, inside // 9, 3, 3)
    if path.endswith("conv_shortcut") or (family in _CONVOLVED_PROJECTIONS and path.endswith(("proj_in", "proj_out"))):
        return (out, inside, 1, 1)
    return (out, inside)


def _spectrum(
    left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, shape: tuple[int, ...], total: float
) -> Spectrum:
    """Return it in float32, each pair of vectors turned so that the largest number on the left is positive."""
    largest = left.abs().argmax(dim=0, keepdim=True)
    sign = left.gather(0, largest).sign().where(left.gather(0, largest) != 0, 1)
    return Spectrum((left * sign).float(), values.float(), (right * sign.T).float(), shape, total)


def _pair(factor: torch.Tensor | Pair) -> Pair:
    """Return a factor of LoKr, its kernel flattened, as a product of two."""
    if isinstance(factor, tuple):
        return factor[0].float(), factor[1].float()
    matrix = factor.float().flatten(1)
    out, inside = matrix.shape
    return (matrix, torch.eye(inside)) if inside <= out else (torch.eye(out), matrix)

"""Several adapters in one: the weighted sum of their updates, exact where low-rank factors allow it.

Linear: the sum. TIES (Yadav et al. 2023): of each update the largest numbers, then for each number of the weight the
sign that has more behind it, then the mean of those that agree. DARE (Yu et al. 2024): numbers dropped at random, the
others scaled up for it, then the sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from sdlora.adapters.algebra import (
    OnLayer,
    Truncation,
    product_of,
    spectrum_of_matrix,
    spectrum_of_product,
    sum_of,
    weight_shape,
)
from sdlora.adapters.derived import merged_metadata
from sdlora.adapters.file import AdapterFile
from sdlora.adapters.formats.places import COMPONENTS
from sdlora.adapters.layers import AdapterLayer, DeltaLayer, DenseLayer, DoraLayer, LoraLayer, with_tensors
from sdlora.errors import ConfigError, FormatError
from sdlora.families.traits import family_title

Method = Literal["linear", "ties", "dare"]


@dataclass(frozen=True)
class MergePart:
    """One adapter of a merge."""

    name: str
    adapter: AdapterFile
    weight: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)
    """By the beginning of module paths: "text_encoder", "unet.down_blocks.1"; the longest that fits counts."""

    @property
    def title(self) -> str:
        """Its name and weight, as the text of the result has it."""
        return f"{self.name} {self.weight:g}"

    def weight_of(self, path: str) -> float:
        """Return how strongly the layer at `path` counts."""
        fitting = [prefix for prefix in self.weights if path == prefix or path.startswith(f"{prefix}.")]
        return self.weights[max(fitting, key=len)] if fitting else self.weight


@dataclass(frozen=True)
class MergeSettings:
    """How updates of one layer become one."""

    method: Method = "linear"
    keep: Truncation | None = None
    """Where the sum is cut off; None: nowhere."""
    density: float = 0.2
    """TIES: the share of each update's numbers that counts."""
    drop: float = 0.5
    """DARE: the share of each update's numbers that is dropped."""
    seed: int = 0
    """DARE: which."""


@dataclass(frozen=True)
class Merged:
    """One adapter made of several, and how far it is from what it should be."""

    adapter: AdapterFile
    error: float
    """|result - true sum| / |true sum| over all layers, rounding included (Frobenius)."""
    worst: str
    worst_error: float


def merge(parts: Sequence[MergePart], settings: MergeSettings, on_layer: OnLayer | None = None) -> Merged:
    """Return the parts as one adapter. One layer at a time is formed in full.

    Without `keep`, LoRA stays LoRA with all ranks side by side, and what is of full rank becomes a dense difference.
    Raises FormatError for adapters of different families, for DoRA, whose update depends on the base, and for a word
    that two of them know with different vectors; ConfigError for weights of layers that a part does not have.
    """
    refuse_wrong_parts(parts)
    family = next((part.adapter.family for part in parts if part.adapter.family), "")
    paths = list(dict.fromkeys(path for part in parts for path in part.adapter.layers))
    layers: dict[str, AdapterLayer] = {}
    error = total = worst_error = 0.0
    worst = ""
    for number, path in enumerate(paths, start=1):
        found = layers_at(parts, path)
        if found:
            layer, apart, size = _merge_layer(path, family, found, settings)
            layers[path] = layer
            error, total = error + apart**2, total + size**2
            if size and apart / size > worst_error:
                worst, worst_error = path, apart / size
        if on_layer:
            on_layer(number, len(paths))
    if not layers:
        raise FormatError("nothing is left to merge: no adapter has layers, or all weights are 0")
    metadata = merged_metadata([part.adapter.metadata for part in parts], [part.title for part in parts], layers)
    adapter = AdapterFile(layers, family, metadata, words_of(parts))
    return Merged(adapter, (error / total) ** 0.5 if total else 0.0, worst, worst_error)


def _merge_layer(
    path: str, family: str, found: Sequence[tuple[float, AdapterLayer]], settings: MergeSettings
) -> tuple[AdapterLayer, float, float]:
    """Return the layer, the norm of its error, and the norm of the true sum."""
    weighted = [(weight, _plain(path, layer)) for weight, layer in found]
    shapes = {weight_shape(path, family, layer) for _, layer in weighted}
    if len(shapes) > 1:
        raise FormatError(f"layer {path} is for weights of the shapes {' and '.join(map(str, sorted(shapes)))}")
    shape = shapes.pop()
    dtype = max((layer.tensors()[0].dtype for _, layer in weighted), key=lambda dtype: dtype.itemsize)
    true = combined([weight * layer.delta_weight().flatten(1) for weight, layer in weighted], path, settings)
    layer = with_tensors(_as_layer(weighted, true, shape, settings), lambda tensor: tensor.to(dtype).contiguous())
    made = layer.delta_weight().reshape(true.shape)
    return layer, float((made - true).double().norm()), float(true.double().norm())


def _as_layer(
    weighted: Sequence[tuple[float, DeltaLayer]], true: torch.Tensor, shape: tuple[int, ...], settings: MergeSettings
) -> DeltaLayer:
    """Return the layer in float32."""
    out, inside, *kernel = shape
    products = [product_of(layer) for _, layer in weighted]
    exact = settings.method == "linear" and all(product is not None for product in products)
    if exact:
        total = sum_of(
            [
                replace(product, left=product.left * weight, shape=shape)
                for (weight, _), product in zip(weighted, products, strict=True)
                if product is not None
            ]
        )
        if settings.keep is None:
            up = total.left.reshape(out, total.width, *(1 for _ in kernel))
            return LoraLayer(total.right.reshape(total.width, inside, *kernel), up, float(total.width))
        spectrum = spectrum_of_product(total)
    elif settings.keep is None:
        return DenseLayer(true.reshape(shape))
    else:
        spectrum = spectrum_of_matrix(true, shape, settings.keep)
    return spectrum.layer(settings.keep.rank_of(spectrum), torch.float32)


def combined(updates: Sequence[torch.Tensor], path: str, settings: MergeSettings) -> torch.Tensor:
    """Return what weighted updates [out, in * kh * kw] of the layer at `path` are together by the chosen method."""
    if settings.method == "ties":
        return _elected(torch.stack([_trimmed(update, settings.density) for update in updates]))
    if settings.method == "dare":
        updates = [_dropped(update, path, number, settings) for number, update in enumerate(updates)]
    total = updates[0]
    for update in updates[1:]:
        total = total + update
    return total


def _trimmed(update: torch.Tensor, density: float) -> torch.Tensor:
    """Return the update with all but its largest numbers 0."""
    count = max(1, round(density * update.numel()))
    smallest = update.abs().flatten().kthvalue(update.numel() - count + 1).values
    return torch.where(update.abs() >= smallest, update, 0)


def _elected(updates: torch.Tensor) -> torch.Tensor:
    """Return the mean of those numbers that have the sign of their sum, 0 where there are none. [n,out,in] -> [out,in]."""
    sign = updates.sum(dim=0).sign()
    agree = (updates.sign() == sign) & (updates != 0)
    return (updates * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def _dropped(update: torch.Tensor, path: str, number: int, settings: MergeSettings) -> torch.Tensor:
    """Return the update with a random share of its numbers 0 and the others scaled so that the mean stays."""
    digest = hashlib.sha256(f"{settings.seed}/{number}/{path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    kept = torch.rand(update.shape, generator=generator) >= settings.drop
    return update * kept / (1 - settings.drop)


def refuse_wrong_parts(parts: Sequence[MergePart]) -> None:
    """Raise FormatError for adapters of different families, ConfigError for weights of layers that a part lacks."""
    families = {part.adapter.family: part.name for part in parts if part.adapter.family}
    if len(families) > 1:
        (one, first), (two, second), *_ = families.items()
        raise FormatError(
            f"{first} is for {family_title(one)}, {second} for {family_title(two)}; merge adapters of one family"
        )
    for part in parts:
        for prefix, weight in part.weights.items():
            idle = not weight and prefix in COMPONENTS  # "no text encoder" of an adapter that has none
            if not idle and not any(path == prefix or path.startswith(f"{prefix}.") for path in part.adapter.layers):
                raise ConfigError(f"{part.name} has no layer that begins with {prefix!r}; see sdlora adapter inspect")


def layers_at(parts: Sequence[MergePart], path: str) -> list[tuple[float, AdapterLayer]]:
    """Return (weight, layer) of the parts that change the layer at `path`."""
    having = [part for part in parts if path in part.adapter.layers]
    return [(weight, part.adapter.layers[path]) for part in having if (weight := part.weight_of(path))]


def words_of(parts: Sequence[MergePart]) -> dict[str, Mapping[str, torch.Tensor]]:
    """Return the words of all parts. Raises FormatError where two know one word with different vectors."""
    return dict(_words(parts))


def _plain(path: str, layer: AdapterLayer) -> DeltaLayer:
    if isinstance(layer, DoraLayer):
        raise FormatError(f"layer {path} is DoRA, whose update depends on the base; merge it into a base instead")
    assert isinstance(layer, DeltaLayer)
    return layer


def _words(parts: Sequence[MergePart]) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    owners: dict[str, tuple[str, str]] = {}
    for part in parts:
        digests = part.adapter.token_digests()
        for word, vectors in part.adapter.tokens.items():
            owner, digest = owners.setdefault(word, (part.name, digests[word]))
            if digest != digests[word]:
                raise FormatError(f"{owner} and {part.name} know the word {word!r} with different vectors; rename one")
            yield word, vectors

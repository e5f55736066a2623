"""The layer that tensors make, by their names in parts.py, and the tensors of a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from sdlora.adapters.formats.parts import ALPHA, DENSE, KINDS, LOHA, LOKR, LORA, MAGNITUDE, kinds_of
from sdlora.adapters.formats.places import Places
from sdlora.adapters.layers import (
    AdapterLayer,
    DeltaLayer,
    DenseLayer,
    DoraLayer,
    LohaLayer,
    LokrLayer,
    LoraLayer,
    Pair,
)
from sdlora.errors import FormatError

Parts = Mapping[str, torch.Tensor]
_LARGEST_WEIGHT = 1 << 28
"""Numbers; the largest of SDXL has 2^24."""


def layers_of(places: Places, tensors: Parts) -> dict[str, AdapterLayer]:
    """Return the layers by module path. Raises FormatError where some cannot be read."""
    if places.problems:
        raise FormatError(places.problems[0])
    return {path: placed_layer(places, path, tensors) for path in places.layers}


def placed_layer(places: Places, path: str, tensors: Parts) -> AdapterLayer:
    """Return the layer at one path. Raises FormatError where its tensors make none."""
    place = places.layers[path]
    parts = {part: tensors[key] for part, key in place.keys.items()}
    if places.rows and MAGNITUDE in parts:
        parts[MAGNITUDE] = parts[MAGNITUDE].flatten()
    alpha = places.alphas.get(path)
    if alpha is not None:
        parts.setdefault(ALPHA, torch.tensor(alpha, dtype=torch.float64))
    return layer_of(place.name, parts)


def layer_of(name: str, parts: Parts) -> AdapterLayer:
    """Return the layer made of `parts`, its tensors by suffix. Raises FormatError, naming `name`."""
    for suffix, tensor in parts.items():
        if suffix != ALPHA and not tensor.is_floating_point():
            raise FormatError(f"{name}.{suffix} holds {tensor.dtype}; expected floating-point numbers")
    kinds = kinds_of(parts) or ["lora"]
    if len(kinds) > 1:
        first, second = (next(suffix for suffix in KINDS[kind] if suffix in parts) for kind in kinds[:2])
        raise FormatError(f"{name} has both {first} and {second}; a layer is of one kind")
    layer = {"lora": _lora, "loha": _loha, "lokr": _lokr, "dense": _dense}[kinds[0]](name, parts)
    if not 0 < math.prod(layer.shape) <= _LARGEST_WEIGHT:
        raise FormatError(f"{name} is for a weight {layer.shape}; expected one of Stable Diffusion's size")
    return _dora(name, layer, parts[MAGNITUDE]) if MAGNITUDE in parts else layer


def parts_of(layer: AdapterLayer) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer by suffix, alpha as a 0-d tensor of the weights' type."""
    if isinstance(layer, DoraLayer):
        magnitude = layer.magnitude
        if magnitude.ndim == 1:
            magnitude = magnitude.reshape(-1, *(1 for _ in layer.shape[1:]))
        return {**parts_of(layer.lora), MAGNITUDE: magnitude}
    if isinstance(layer, LoraLayer):
        named = zip(LORA, (layer.down, layer.up, layer.mid), strict=True)
    elif isinstance(layer, LohaLayer):
        factors = (layer.w1_a, layer.w1_b, layer.w2_a, layer.w2_b, layer.t1, layer.t2)
        named = zip(LOHA, factors, strict=True)
    elif isinstance(layer, LokrLayer):
        named = zip(LOKR, (*_three(layer.w1), *_three(layer.w2), layer.t2), strict=True)
    else:
        assert isinstance(layer, DenseLayer)
        return {DENSE[0]: layer.delta}
    parts = {suffix: tensor for suffix, tensor in named if tensor is not None}
    alpha = torch.tensor(layer.alpha, dtype=layer.tensors()[0].dtype)
    exact = float(alpha) == layer.alpha
    return {**parts, ALPHA: alpha if exact else torch.tensor(layer.alpha, dtype=torch.float32)}


def _lora(name: str, parts: Parts) -> LoraLayer:
    _require(name, parts, LORA[:2])
    down, up, mid = parts[LORA[0]], parts[LORA[1]], parts.get(LORA[2])
    if not (
        down.ndim in (2, 4) and up.ndim == down.ndim and up.shape[1] == down.shape[0] > 0 and set(up.shape[2:]) <= {1}
    ):
        raise FormatError(f"{name} has shapes down {tuple(down.shape)} and up {tuple(up.shape)}, which make no pair")
    rank = down.shape[0]
    if mid is not None and not (mid.ndim == 4 and mid.shape[:2] == (rank, rank) and set(down.shape[2:]) <= {1}):
        raise FormatError(
            f"{name} has shapes mid {tuple(mid.shape)} and down {tuple(down.shape)}, which do not go together"
        )
    return LoraLayer(down, up, _alpha(name, parts, rank), mid)


def _loha(name: str, parts: Parts) -> LohaLayer:
    has_cores = "hada_t1" in parts or "hada_t2" in parts
    _require(name, parts, LOHA if has_cores else LOHA[:4])
    w1_a, w1_b, w2_a, w2_b = (parts[suffix] for suffix in LOHA[:4])
    t1, t2 = parts.get("hada_t1"), parts.get("hada_t2")
    _check_product(name, "hada_w1", (w1_a, w1_b), t1)
    _check_product(name, "hada_w2", (w2_a, w2_b), t2)
    layer = LohaLayer(w1_a, w1_b, w2_a, w2_b, _alpha(name, parts, w1_b.shape[0]), t1, t2)
    other = LohaLayer(w2_a, w2_b, w1_a, w1_b, layer.alpha, t2, t1)
    if layer.shape != other.shape:
        raise FormatError(f"{name} has halves for {layer.shape} and {other.shape}; expected the same shape")
    return layer


def _lokr(name: str, parts: Parts) -> LokrLayer:
    w1, w2, t2 = _factor(name, parts, "lokr_w1"), _factor(name, parts, "lokr_w2"), parts.get("lokr_t2")
    if t2 is not None and not isinstance(w2, tuple):
        raise FormatError(f"{name} has lokr_t2 beside a whole lokr_w2; expected lokr_w2_a and lokr_w2_b")
    for stem, factor, core, dimensions in (("lokr_w1", w1, None, (2,)), ("lokr_w2", w2, t2, (2, 4))):
        if isinstance(factor, tuple):
            _check_product(name, stem, factor, core)
        elif factor.ndim not in dimensions or factor.numel() == 0:
            raise FormatError(f"{name}.{stem} has shape {tuple(factor.shape)}, which is no factor of a weight")
    return LokrLayer(w1, w2, _alpha(name, parts, LokrLayer(w1, w2, 1.0, t2).rank), t2)


def _dense(name: str, parts: Parts) -> DenseLayer:
    delta = parts[DENSE[0]]
    if delta.ndim not in (2, 4) or delta.numel() == 0:
        raise FormatError(f"{name}.diff has shape {tuple(delta.shape)}, which is no layer's weight")
    return DenseLayer(delta)  # alpha, where there is one, means nothing here: readers take scale 1


def _dora(name: str, layer: AdapterLayer, magnitude: torch.Tensor) -> DoraLayer:
    """A magnitude for each output row is [out], [out,1] or [out,1,1,1]; for each input column [1,in] or [1,in,1,1]."""
    if not isinstance(layer, DeltaLayer) or isinstance(layer, DenseLayer):
        raise FormatError(f"{name} has dora_scale beside a dense difference; the two do not go together")
    dora, (out, inside, *kernel) = DoraLayer(layer, magnitude), layer.shape
    rows, columns, *rest = (*magnitude.shape, 1, 1)
    fits = columns == inside if dora.by_column else (rows, columns) == (out, 1)
    if dora.by_column and not kernel:  # the update may be flattened, and its channels known only with the base
        fits = inside % columns == 0
    if not fits or set(rest) != {1} or magnitude.ndim > 4:
        raise FormatError(
            f"{name}.dora_scale has shape {tuple(magnitude.shape)}; expected {(out, 1)} or {(1, inside)} "
            f"for the weight {layer.shape}"
        )
    return dora


def _factor(name: str, parts: Parts, stem: str) -> torch.Tensor | Pair:
    """Return a factor of LoKr, whole or as its pair."""
    pair = (f"{stem}_a", f"{stem}_b")
    if stem in parts:
        if any(suffix in parts for suffix in pair):
            raise FormatError(f"{name} has {stem} both whole and as a pair; expected one of them")
        return parts[stem]
    _require(name, parts, pair)
    return parts[pair[0]], parts[pair[1]]


def _check_product(name: str, stem: str, pair: Pair, core: torch.Tensor | None) -> None:
    """Raise FormatError where a @ b, or the Tucker product with a core, does not work out."""
    a, b = pair
    fits = a.ndim == b.ndim == 2 and a.numel() > 0 and b.numel() > 0
    if core is None:
        fits = fits and a.shape[1] == b.shape[0]
    else:
        fits = fits and core.ndim == 4 and core.shape[:2] == (a.shape[0], b.shape[0]) and core.numel() > 0
    if not fits:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        between = "" if core is None else f" with the core {tuple(core.shape)}"
        raise FormatError(f"{name} has shapes {stem}_a and {stem}_b {shapes}{between}, which make no product")


def _require(name: str, parts: Parts, suffixes: tuple[str, ...]) -> None:
    missing = [suffix for suffix in suffixes if suffix not in parts]
    if missing:
        raise FormatError(f"{name} has no {missing[0]}; the file is incomplete")


def _alpha(name: str, parts: Parts, rank: int) -> float:
    """Return alpha; a missing one means scale 1."""
    alpha = parts.get(ALPHA)
    if alpha is None:
        return float(rank)
    if alpha.numel() != 1:
        raise FormatError(f"{name}.alpha has {alpha.numel()} numbers; expected one")
    value = float(alpha)
    if not (-1e6 < value < 1e6):
        raise FormatError(f"{name}.alpha is {value}; expected a finite number")
    return value


def _three(factor: torch.Tensor | Pair) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return (whole, a, b), what is not there as None."""
    return (None, *factor) if isinstance(factor, tuple) else (factor, None, None)

"""Adapters in a live model, beside untouched base weights: in, out, and how strongly each acts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import nn

from sdlora.adapters.blocks import unet_block
from sdlora.adapters.branches import (
    BlockStrength,
    attach,
    branch_of,
    branch_tensors,
    branches_off,
    detach,
    set_rows,
    set_strengths,
)
from sdlora.adapters.file import AdapterFile
from sdlora.adapters.fit import refuse_misfit
from sdlora.adapters.live import bare, has_float32_peft_adapter, locate, peft_off, remove_peft_adapter, set_peft_weights
from sdlora.errors import ModelError
from sdlora.families.base import LoadedBase
from sdlora.families.words import knowing


def add_adapter(base: LoadedBase, name: str, adapter: AdapterFile) -> None:
    """The adapter is in place under `name`, not yet active, its weights in the base's precision; others act as before.

    Its layers may be of any kinds. Raises ModelError, with the base unchanged, when a layer is missing from the
    base or has another shape there: such an adapter was made for another kind of base.
    """
    modules = dict(base.components())
    located = {path: locate(modules, path) for path in adapter.layers}
    _check_fit(base, adapter, located)
    layers = {path: bare(layer) for path, layer in located.items()}
    branches = [(path, branch_of(layers[path], layer, base)) for path, layer in adapter.layers.items()]
    for path, branch in branches:
        attach(layers[path], name, branch, unet_block(path, base.unet.config.layers_per_block))


def set_adapter_weights(
    base: LoadedBase,
    weights: Mapping[str, float],
    text_encoder_weights: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Exactly the adapters of `weights` act, each times its weight; weight 0 is as if it were not there.

    Those of `text_encoder_weights` act so in text encoders instead.
    """
    set_strengths(base, weights, text_encoder_weights)
    set_peft_weights(base, weights)


def act_in_rows(base: LoadedBase, rows: Sequence[Mapping[str, BlockStrength]]) -> None:
    """In the UNet, exactly the adapters of `rows` act, each row of its batches with its own ones and weights.

    It holds until weights are set again. Text encoders are left as they are, and adapters that peft put in too.
    """
    set_rows(base, rows)


@contextmanager
def adapters_off(base: LoadedBase) -> Iterator[None]:
    """Inside, the model is the bare base, without new words too; afterwards all is as it was."""
    with branches_off(base), peft_off(base), knowing(base, {}):
        yield


def has_float32_adapter(base: LoadedBase) -> bool:
    """Return whether some adapter weight is float32, as one that is being trained."""
    return any(tensor.dtype == torch.float32 for tensor in branch_tensors(base)) or has_float32_peft_adapter(base)


def remove_adapter(base: LoadedBase, name: str) -> None:
    """`name` is gone; a layer without adapters is the base's own layer object again, without hooks."""
    detach(base, name)
    remove_peft_adapter(base, name)


def _check_fit(base: LoadedBase, adapter: AdapterFile, located: Mapping[str, nn.Module | None]) -> None:
    shapes = {path: _weight_shape(layer) for path, layer in located.items() if layer is not None}
    refuse_misfit(adapter, shapes, base.source.name, base.family.traits)
    if len(set(located.values())) < len(located):
        raise ModelError(
            f"the adapter does not fit the base {base.source.name}: one of its layers is named twice in the file"
        )


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Return [out, in, kh, kw] of a layer that can carry an adapter, 1 x 1 for a linear one, else ()."""
    own = bare(layer)
    if isinstance(own, nn.Linear):
        return (own.out_features, own.in_features, 1, 1)
    if isinstance(own, nn.Conv2d):
        return (own.out_channels, own.in_channels // own.groups, *own.kernel_size)
    return ()

"""Adapters in a live model, beside untouched base weights: in, out, and how strongly each acts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from sdlora.adapters.branches import attach, branch_of, branch_tensors, branches_off, detach, set_strengths
from sdlora.adapters.file import AdapterFile
from sdlora.adapters.layers import AdapterLayer, DoraLayer
from sdlora.adapters.live import bare, has_float32_peft_adapter, locate, peft_off, remove_peft_adapter, set_peft_weights
from sdlora.errors import ModelError
from sdlora.families.base import LoadedBase
from sdlora.families.traits import FamilyTraits, family_title
from sdlora.families.words import knowing


def add_adapter(base: LoadedBase, name: str, adapter: AdapterFile) -> None:
    """The adapter is in place under `name`, not yet active, its weights in the base's precision.

    Its layers may be of any kinds. Raises ModelError, with the base unchanged, when a layer is missing from the
    base or has another shape there: such an adapter was made for another kind of base.
    """
    refuse_other_family(adapter.family, base.family.traits, base.source.name)
    modules = dict(base.components())
    located = {path: locate(modules, path) for path in adapter.layers}
    _check_fit(base, adapter, located)
    layers = {path: bare(_module(modules, live)) for path, live in located.items()}
    branches = [(layers[path], branch_of(layers[path], layer, base)) for path, layer in adapter.layers.items()]
    for layer, branch in branches:
        attach(layer, name, branch)
    set_adapter_weights(base, {})


def set_adapter_weights(base: LoadedBase, weights: Mapping[str, float]) -> None:
    """Exactly the adapters of `weights` act, each times its weight; weight 0 is as if it were not there."""
    set_strengths(base, weights)
    set_peft_weights(base, weights)


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


def refuse_other_family(adapter_family: str, family: FamilyTraits, base_name: str) -> None:
    """Raise ModelError where an adapter says that it was made for another family than the base's."""
    if adapter_family and adapter_family != family.name:
        raise ModelError(
            f"the adapter is for {family_title(adapter_family)}, the base {base_name} is {family.title}; choose one that fits it"
        )


def _check_fit(base: LoadedBase, adapter: AdapterFile, located: Mapping[str, str]) -> None:
    modules = dict(base.components())
    problems = []
    for path, layer in adapter.layers.items():
        if not located[path]:
            problems.append(f"{path} does not exist there")
        elif problem := _misfit(_weight_shape(_module(modules, located[path])), layer):
            problems.append(f"{path} {problem}")
    if not problems and len(set(located.values())) < len(located):
        problems.append("one layer of the base is named twice in the file")
    if problems:
        raise ModelError(
            f"the adapter does not fit the base {base.source.name} ({base.family.title}): "
            f"{len(problems)} of {len(adapter.layers)} layers differ, such as {problems[0]}; "
            f"it was trained on another base (the file says {adapter.metadata.get('ss_sd_model_name', adapter.family)})"
        )


def _misfit(expected: tuple[int, ...], layer: AdapterLayer) -> str:
    """Return why an adapter's layer does not fit a weight of the shape `expected`, or ""."""
    given = (*layer.shape, 1, 1)[:4]
    flattened = layer.shape == (*expected[:1], math.prod(expected[1:]))
    if not expected or (given != expected and not flattened):
        return f"is {expected or 'no linear or convolution layer'} there and {given} in the file"
    if isinstance(layer, DoraLayer) and layer.by_column and layer.magnitude.shape[1] != expected[1]:
        return f"has {expected[1]} input channels there and {layer.magnitude.shape[1]} magnitudes in the file"
    return ""


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Return [out, in, kh, kw] of a layer that can carry an adapter, 1 x 1 for a linear one, else ()."""
    own = bare(layer)
    if isinstance(own, nn.Linear):
        return (own.out_features, own.in_features, 1, 1)
    if isinstance(own, nn.Conv2d):
        return (own.out_channels, own.in_channels // own.groups, *own.kernel_size)
    return ()


def _module(modules: Mapping[str, nn.Module], live: str) -> nn.Module:
    component, _, inside = live.partition(".")
    return modules[component].get_submodule(inside)

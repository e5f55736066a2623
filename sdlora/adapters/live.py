"""Layers of a live model and the adapters that peft has put around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sdlora.families.base import LoadedBase
from sdlora.families.quantize import full_weight
from sdlora.families.traits import TEXT_MODEL


def bare(layer: nn.Module) -> Any:
    """Return the base's own layer, which adapters may have wrapped."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def locate(modules: Mapping[str, nn.Module], path: str) -> Any:
    """Return the layer at a file's path, None where the base has no such layer."""
    component, _, inside = path.partition(".")
    for candidate in (inside, inside.removeprefix(TEXT_MODEL)):
        try:
            return modules[component].get_submodule(candidate)
        except (KeyError, AttributeError):
            continue
    return None


def wrapped_layers(base: LoadedBase) -> Iterator[tuple[str, str, Any]]:
    """Yield (component, live path, peft's layer) for every layer around which peft has put adapters."""
    for component, module in base.components():
        for path, layer in module.named_modules():
            if isinstance(layer, BaseTunerLayer):
                yield component, path, layer


@contextmanager
def peft_off(base: LoadedBase) -> Iterator[None]:
    """Inside, what peft has put around layers does nothing; afterwards each layer is as it was."""
    layers = [(layer, layer.disable_adapters) for _, _, layer in wrapped_layers(base)]
    try:
        for layer, _ in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was_off in layers:
            layer._disable_adapters = was_off


def peft_names(layer: Any) -> set[str]:
    """Return the names of the adapters that peft has put around a layer, whatever their kind."""
    return set(layer._available_adapters if isinstance(layer, LycorisLayer) else layer.lora_A)


def set_peft_weights(base: LoadedBase, weights: Mapping[str, float]) -> None:
    """Of peft's adapters exactly those of `weights` act, each times its weight; weight 0 is as if it were not there."""
    for _, _, layer in wrapped_layers(base):
        present = [name for name, weight in weights.items() if weight != 0 and name in peft_names(layer)]
        alphas = layer.alpha if isinstance(layer, LycorisLayer) else layer.lora_alpha
        for name in present:
            layer.scaling[name] = weights[name] * alphas[name] / layer.r[name]
        trained = {p: p.requires_grad for p in layer.parameters()}
        layer.enable_adapters(bool(present))
        if present:
            layer.set_adapter(present)
        for parameter, flag in trained.items():  # peft freezes and thaws with activity; training decides here
            parameter.requires_grad_(flag)


def has_float32_peft_adapter(base: LoadedBase) -> bool:
    """Return whether some weight that peft has put beside a layer is float32, as one that is being trained."""
    return any(
        parameter.dtype == torch.float32
        for _, _, layer in wrapped_layers(base)
        for kind in layer.adapter_layer_names
        for parameter in getattr(layer, kind).parameters()
    )


def remove_peft_adapter(base: LoadedBase, name: str) -> None:
    """peft's adapter `name` is gone; a layer without adapters is the base's own layer object again."""
    modules = dict(base.components())
    for component, path, layer in reversed(
        list(wrapped_layers(base))
    ):  # of kinds one around the other, the inner first
        if name in peft_names(layer):
            layer.delete_adapter(name)
        if not peft_names(layer):
            parent, _, child = path.rpartition(".")
            setattr(modules[component].get_submodule(parent), child, layer.base_layer)
    for _, module in base.components():
        configs = getattr(module, "peft_config", {})
        configs.pop(name, None)
        if not configs and hasattr(module, "peft_config"):
            del module.peft_config


def base_weight(base: LoadedBase, path: str) -> torch.Tensor:
    """Return the base's own weight of a layer by its path in files, dequantised where it is held in fewer bits."""
    return full_weight(bare(locate(dict(base.components()), path)))

"""Adapters in a live model, as side branches beside untouched base weights. The only user of peft."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer as PeftLoraLayer
from torch import nn

from sdlora.adapters.file import AdapterFile
from sdlora.adapters.layers import LoraLayer
from sdlora.config import AdapterSection
from sdlora.errors import ModelError
from sdlora.families.base import LoadedBase, match_targets
from sdlora.families.quantize import full_weight
from sdlora.families.traits import FamilyTraits, family_title

_TEXT_MODEL = "text_model."
_INSIDE_TEXT_MODEL = ("embeddings.", "encoder.", "final_layer_norm")


def new_adapter(base: LoadedBase, name: str, section: AdapterSection, seed: int) -> dict[str, list[nn.Parameter]]:
    """A fresh adapter is in place and active; returns its float32 parameters by component.

    down is drawn from `seed`, up is zero, so the model's output is unchanged until the first step.
    """
    targets = choose_targets(base, section)
    parameters: dict[str, list[nn.Parameter]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for component, paths in targets.items():
            config = LoraConfig(
                r=section.rank,
                lora_alpha=section.alpha,
                lora_dropout=section.dropout,
                target_modules=paths,
                init_lora_weights=True,
            )
            module = dict(base.components())[component]
            inject_adapter_in_model(config, module, adapter_name=name)
            trained = [p for key, p in module.named_parameters() if ".lora_" in key and f".{name}." in key]
            for parameter in trained:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
            parameters[component] = trained
    set_adapter_weights(base, {name: 1.0})
    return parameters


def choose_targets(base: LoadedBase, section: AdapterSection) -> dict[str, list[str]]:
    """Return the paths of the layers that get an adapter, by component. Raises ConfigError."""
    targets = {"unet": match_targets(base.unet, section.targets, base.family.target_presets)}
    if section.text_encoder:
        presets = base.family.text_encoder_presets
        for component, encoder in base.text_encoders.items():
            targets[component] = match_targets(
                encoder, section.text_encoder_targets, presets, "adapter.text_encoder_targets"
            )
    return targets


def add_adapter(base: LoadedBase, name: str, adapter: AdapterFile) -> None:
    """The adapter is in place under `name`, not yet active, its weights in the base's precision.

    Raises ModelError, with the base unchanged, when a layer is missing from the base or has another
    shape there: such an adapter was made for another kind of base.
    """
    refuse_other_family(adapter.family, base.family.traits, base.source.name)
    modules = dict(base.components())
    located = {path: _locate(modules, path) for path in adapter.layers}
    _check_fit(base, adapter, located)
    for component, module in modules.items():
        inside = {
            located[path].split(".", 1)[1]: layer
            for path, layer in adapter.layers.items()
            if path.split(".")[0] == component
        }
        if not inside:
            continue
        config = LoraConfig(
            r=max(layer.rank for layer in inside.values()),
            lora_alpha=1,
            target_modules=list(inside),
            rank_pattern={f"^{path}$": layer.rank for path, layer in inside.items()},
            init_lora_weights=False,
        )
        inject_adapter_in_model(config, module, adapter_name=name, low_cpu_mem_usage=True)
        for path, layer in inside.items():
            _fill(module.get_submodule(path), name, layer, base)
    set_adapter_weights(base, {})


def set_adapter_weights(base: LoadedBase, weights: Mapping[str, float]) -> None:
    """Exactly the adapters of `weights` act, each times its weight; weight 0 is as if it were not there."""
    active = [name for name, weight in weights.items() if weight != 0]
    for layer in _lora_layers(base):
        present = [name for name in active if name in layer.lora_A]
        for name in present:
            layer.scaling[name] = weights[name] * layer.lora_alpha[name] / layer.r[name]
        trained = {p: p.requires_grad for p in layer.parameters()}
        layer.enable_adapters(bool(present))
        if present:
            layer.set_adapter(present)
        for parameter, flag in trained.items():  # peft freezes and thaws with activity; training decides here
            parameter.requires_grad_(flag)


@contextmanager
def adapters_off(base: LoadedBase) -> Iterator[None]:
    """Inside, the model is the bare base; afterwards each layer is as it was."""
    layers = [(layer, layer.disable_adapters) for layer in _lora_layers(base)]
    try:
        for layer, _ in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was_off in layers:
            layer._disable_adapters = was_off


def has_float32_adapter(base: LoadedBase) -> bool:
    """Return whether some adapter weight is float32, as one that is being trained."""
    return any(p.dtype == torch.float32 for layer in _lora_layers(base) for p in layer.lora_A.parameters())


def remove_adapter(base: LoadedBase, name: str) -> None:
    """`name` is gone; a layer without adapters is the base's own layer object again."""
    for _, module in base.components():
        wrapped = list(_named_lora_layers(module))
        for path, layer in wrapped:
            if name in layer.lora_A:
                layer.delete_adapter(name)
            if not layer.lora_A:
                parent, _, child = path.rpartition(".")
                setattr(module.get_submodule(parent), child, layer.get_base_layer())
        configs = getattr(module, "peft_config", {})
        configs.pop(name, None)
        if not configs and hasattr(module, "peft_config"):
            del module.peft_config


def extract_adapter(base: LoadedBase, name: str) -> dict[str, LoraLayer]:
    """Return the layers of a live adapter, detached copies in float32 on the CPU."""
    layers = {}
    for component, module in base.components():
        for path, layer in _named_lora_layers(module):
            if name in layer.lora_A:
                layers[_canonical(component, path)] = LoraLayer(
                    layer.lora_A[name].weight.detach().float().cpu().clone(),
                    layer.lora_B[name].weight.detach().float().cpu().clone(),
                    float(layer.lora_alpha[name]),
                )
    return layers


def load_weights(base: LoadedBase, name: str, layers: Mapping[str, LoraLayer]) -> None:
    """The live adapter `name` has exactly these weights. Raises ModelError when the layers differ."""
    live = extract_adapter(base, name)
    if {path: _form(layer) for path, layer in live.items()} != {path: _form(layer) for path, layer in layers.items()}:
        raise ModelError(
            f"the saved adapter ({len(layers)} layers) and the running one ({len(live)} layers) "
            "differ in their layers, ranks or alphas; they must match"
        )
    modules = dict(base.components())
    for path, layer in layers.items():
        module: Any = modules[path.split(".")[0]].get_submodule(_locate(modules, path).split(".", 1)[1])
        with torch.no_grad():
            module.lora_A[name].weight.copy_(layer.down)
            module.lora_B[name].weight.copy_(layer.up)


def base_weight_norms(base: LoadedBase, paths: Sequence[str]) -> dict[str, float]:
    """Return the Frobenius norm of the base weight of each layer path."""
    modules = dict(base.components())
    norms = {}
    for path in paths:
        component, _, inside = _locate(modules, path).partition(".")
        layer = _bare(modules[component].get_submodule(inside))
        norms[path] = float(full_weight(layer).norm())
    return norms


def _lora_layers(base: LoadedBase) -> Iterator[Any]:
    for _, module in base.components():
        yield from (layer for _, layer in _named_lora_layers(module))


def _named_lora_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from ((path, layer) for path, layer in module.named_modules() if isinstance(layer, PeftLoraLayer))


def _bare(layer: nn.Module) -> Any:
    """Return the base's own layer, which an adapter may have wrapped."""
    return layer.get_base_layer() if isinstance(layer, PeftLoraLayer) else layer


def _canonical(component: str, path: str) -> str:
    """Return the path that files use: text encoders keep the "text_model." that newer libraries dropped."""
    if component.startswith("text_encoder") and path.startswith(_INSIDE_TEXT_MODEL):
        return f"{component}.{_TEXT_MODEL}{path}"
    return f"{component}.{path}"


def _locate(modules: Mapping[str, nn.Module], path: str) -> str:
    """Return the live path of a file's path, or "" where the base has no such layer."""
    component, _, inside = path.partition(".")
    module = modules.get(component)
    if module is None:
        return ""
    for candidate in (inside, inside.removeprefix(_TEXT_MODEL)):
        try:
            module.get_submodule(candidate)
        except AttributeError:
            continue
        return f"{component}.{candidate}"
    return ""


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
            continue
        component, _, inside = located[path].partition(".")
        expected = _weight_shape(modules[component].get_submodule(inside))
        given = (layer.up.shape[0], *layer.down.shape[1:], 1, 1)[:4]
        if expected != given:
            problems.append(f"{path} is {expected or 'no linear or convolution layer'} there and {given} in the file")
    if not problems and len(set(located.values())) < len(located):
        problems.append("one layer of the base is named twice in the file")
    if problems:
        raise ModelError(
            f"the adapter does not fit the base {base.source.name} ({base.family.title}): "
            f"{len(problems)} of {len(adapter.layers)} layers differ, such as {problems[0]}; "
            f"it was trained on another base (the file says {adapter.metadata.get('ss_sd_model_name', adapter.family)})"
        )


def _weight_shape(layer: nn.Module) -> tuple[int, ...] | None:
    """Return [out, in, kh, kw] of a layer that can carry an adapter, 1 x 1 for a linear one, else None."""
    bare = _bare(layer)
    if isinstance(bare, nn.Linear):
        return (bare.out_features, bare.in_features, 1, 1)
    if isinstance(bare, nn.Conv2d):
        return (bare.out_channels, bare.in_channels // bare.groups, *bare.kernel_size)
    return None


def _form(layer: LoraLayer) -> tuple[torch.Size, torch.Size, float]:
    return layer.down.shape, layer.up.shape, layer.alpha


def _fill(layer: Any, name: str, weights: LoraLayer, base: LoadedBase) -> None:
    for target, tensor in ((layer.lora_A[name], weights.down), (layer.lora_B[name], weights.up)):
        value = tensor.to(base.device, base.dtype)
        if value.ndim == 2 and isinstance(target, nn.Conv2d):
            value = value[..., None, None]
        elif value.ndim == 4 and isinstance(target, nn.Linear):
            value = value.flatten(1)
        target.weight = nn.Parameter(value, requires_grad=False)
    layer.lora_alpha[name] = weights.alpha
    layer.scaling[name] = weights.scale

"""Adapters to be trained: from the settings to float32 weights in a live model, and from there to a file's layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import nn

from sdlora.adapters.branches import DenseBranch, attach
from sdlora.adapters.dora_norms import use_float32_norms
from sdlora.adapters.dropout import drop_from_lora, drop_rows
from sdlora.adapters.inject import set_adapter_weights
from sdlora.adapters.layers import AdapterLayer, DeltaLayer
from sdlora.adapters.live import bare, peft_names, wrapped_layers
from sdlora.adapters.sizes import Size, layer_sizes, peft_sizes
from sdlora.adapters.starts import start_from
from sdlora.adapters.trained_layers import TrainedDense, TrainedLayer, TrainedLoha, TrainedLokr, TrainedLora
from sdlora.adapters.weights import TrainedWeight
from sdlora.config import AdapterSection
from sdlora.config.combinations import adapter_clashes
from sdlora.errors import ConfigError
from sdlora.families.base import LoadedBase, match_targets
from sdlora.families.quantize import full_weight
from sdlora.families.traits import canonical

_KINDS: dict[str, Any] = {"lora": TrainedLora, "loha": TrainedLoha, "lokr": TrainedLokr}


@dataclass(frozen=True)
class TrainedAdapter:
    """The live adapter `name` of a base, layer by layer in the model's order."""

    base: LoadedBase
    name: str
    parts: tuple[TrainedLayer, ...]

    @property
    def weights(self) -> tuple[TrainedWeight, ...]:
        """Everything that trains, and nothing else, float32."""
        return tuple(weight for part in self.parts for weight in part.weights)

    def layers(self) -> dict[str, AdapterLayer]:
        """Return it as files hold it, {path: layer}: detached copies in float32 on the CPU."""
        return {part.path: part.form(_copy) for part in self.parts}

    def set_active(self, weight: float) -> None:
        """It acts, as the only adapter, times `weight`; 0 is the bare base."""
        set_adapter_weights(self.base, {self.name: weight})

    @torch.no_grad()
    def limit_norms(self, largest: float) -> None:
        """The Frobenius norm of each layer's update is at most `largest`, its factors scaled evenly where it was not.

        For kinds whose update is the product of what trains: not DoRA, PiSSA or OLoRA.
        """
        for part in self.parts:
            update = part.form(torch.Tensor.detach)
            assert isinstance(update, DeltaLayer)
            norm = update.delta_norm()
            if norm > largest:
                for weight in part.weights:
                    weight.parameter.mul_((largest / norm) ** (1 / len(part.weights)))


def choose_targets(base: LoadedBase, section: AdapterSection) -> dict[str, list[str]]:
    """Return the live paths of the layers that get an adapter, by component, "unet" first.

    The base's weights need not be there yet. Raises ConfigError for a setting that does not fit this base.
    """
    for clash in adapter_clashes(section, base.quantize):
        raise ConfigError(clash.sentence)
    targets = {"unet": match_targets(base.unet, section.targets, base.family.target_presets)}
    if section.text_encoder:
        encoders = {name: base.text_encoders[name] for name in base.text_encoders if name in section.text_encoder_parts}
        if not encoders:
            raise ConfigError(
                f"adapter.text_encoder_parts: {', '.join(section.text_encoder_parts) or 'nothing'} is not in this base "
                f"({base.family.title}); it has {' and '.join(base.text_encoders)}"
            )
        for name, encoder in encoders.items():
            presets = base.family.text_encoder_presets
            targets[name] = match_targets(
                encoder, section.text_encoder_targets, presets, "adapter.text_encoder_targets"
            )
    layer_sizes(base, section, targets)
    return targets


def new_adapter(base: LoadedBase, name: str, section: AdapterSection, seed: int) -> TrainedAdapter:
    """A fresh adapter is in place and active, drawn from `seed`; the model's output is as it was.

    Exactly so, but for PiSSA and OLoRA, where two equal products are subtracted, which may round differently.
    Raises ConfigError, with the base unchanged, for a setting that does not fit this base.
    """
    sizes = layer_sizes(base, section, choose_targets(base, section))
    if section.kind == "full":
        parts = tuple(_dense_layers(base, name, sizes))
    else:
        modules = dict(base.components())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for component, chosen in sizes.items():
                inject_adapter_in_model(_peft_config(section, chosen), modules[component], adapter_name=name)
        parts = tuple(_peft_layers(base, name, section))
    adapter = TrainedAdapter(base, name, parts)
    adapter.set_active(1.0)
    return adapter


def _peft_config(section: AdapterSection, sizes: Mapping[str, Size]) -> Any:
    usual = Size(section.rank, section.alpha)
    shared: dict[str, Any] = {"r": usual.rank, "target_modules": list(sizes), **peft_sizes(sizes, usual)}
    if section.kind == "lora":
        return LoraConfig(lora_alpha=usual.alpha, lora_dropout=section.dropout, use_dora=section.dora, **shared)
    shared |= {"alpha": usual.alpha, "module_dropout": section.module_dropout}
    if section.kind == "loha":
        return LoHaConfig(**shared)
    # "lycoris": the right matrix starts at zero instead of the small left one, as in that program.
    return LoKrConfig(decompose_factor=section.lokr_factor or -1, init_weights="lycoris", **shared)


def _peft_layers(base: LoadedBase, name: str, section: AdapterSection) -> Iterator[TrainedLayer]:
    """Yield the layers that peft has made for `name`, with what peft does not do itself."""
    for component, path, layer in list(wrapped_layers(base)):
        if name not in peft_names(layer):
            continue
        if section.kind == "lora":
            if section.dora:
                use_float32_norms(layer, name)
            _to_float32(layer, name)
            if section.start != "zero":
                start_from(layer, name, section.start, full_weight(layer.get_base_layer()))
            drop_from_lora(layer, name, section.rank_dropout, section.module_dropout)
        else:
            if section.kind == "loha":
                _enlarge(layer, name)
            if section.rank_dropout:
                drop_rows(layer, section.rank_dropout)
        layer.train(layer.get_base_layer().training)  # new modules train, and would drop out in a model that does not
        yield _KINDS[section.kind](canonical(component, path), layer, name)


def _to_float32(layer: Any, name: str) -> None:
    for part in (layer.lora_A[name], layer.lora_B[name]):
        part.float()


@torch.no_grad()
def _enlarge(layer: Any, name: str) -> None:
    """A LoHa layer of peft learns as fast as LoRA would at the same rate.

    As peft draws it, a step changes the update 3 * sqrt(rank) times less: the elements of w1_a @ w1_b are of size
    1 / (3 * sqrt(in)), those of LoRA's down 1 / sqrt(3 * in), and w2_a is smaller by sqrt(rank).
    """
    for factor in (layer.hada_w1_a[name], layer.hada_w1_b[name]):
        factor.mul_(math.sqrt(3 * math.sqrt(layer.r[name])))


def _dense_layers(base: LoadedBase, name: str, sizes: Mapping[str, Mapping[str, Size]]) -> Iterator[TrainedLayer]:
    modules = dict(base.components())
    for component, paths in sizes.items():
        for path in paths:
            layer = bare(modules[component].get_submodule(path))
            delta = nn.Parameter(torch.zeros_like(full_weight(layer)))
            attach(layer, name, DenseBranch(layer, delta))
            yield TrainedDense(canonical(component, path), delta)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu().clone()

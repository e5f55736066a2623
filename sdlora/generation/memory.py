"""Where a base's parts are while they are not in use, how their weights lie in memory, and the compiled UNet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from sdlora.config import BaseSection
from sdlora.errors import ConfigError
from sdlora.families.base import LoadedBase
from sdlora.families.registry import load_base

Offload = Literal["none", "model"]
_CPU = torch.device("cpu")
_MOST_SHAPES = 64
"""So many compiled forms are kept; torch's own limit of 8 would then run others uncompiled without a word."""


def load_for(section: BaseSection, device: str | None, offload: Offload) -> LoadedBase:
    """Return the base; with offloading no more than its largest part has ever been on the device.

    Raises ConfigError for a quantised base that is to be offloaded, and as `load_base` does.
    """
    if offload == "none":
        return load_base(section, device)
    if section.quantize != "none":
        raise ConfigError(
            f"offload = model moves whole weights, which quantize = {section.quantize} has none of; leave out one of the two"
        )
    base = load_base(section, device, unet=False)
    Placement(base, offload).rest()
    base.fetch_unet()
    return base


class Placement:
    """Keeps each part of a base where it is wanted: all on its device, or with offloading those in use alone."""

    def __init__(self, base: LoadedBase, offload: Offload) -> None:
        self._base = base
        self._offloads = offload == "model"

    @property
    def resting_place(self) -> torch.device:
        """Where parts are while they are not in use."""
        return _CPU if self._offloads else self._base.device

    @contextmanager
    def using(self, part: Literal["text encoders", "unet", "vae"], beside: Iterable[nn.Module] = ()) -> Iterator[None]:
        """Inside, that part is on the base's device, and what works beside it; with offloading they alone."""
        if not self._offloads:
            yield
            return
        models = [*(model for name, model in self._base.components() if _part_of(name) == part), *beside]
        try:
            for model in models:
                model.to(self._base.device)
            yield
        finally:
            for model in models:
                model.to(_CPU)

    def rest(self) -> None:
        """With offloading, nothing is on the device."""
        if self._offloads:
            for _, model in self._base.components():
                if not any(parameter.is_meta for parameter in model.parameters()):
                    model.to(_CPU)


def _part_of(component: str) -> str:
    return "text encoders" if component.startswith("text_encoder") else component


def lay_channels_last(base: LoadedBase) -> None:
    """The weights of convolutions in UNet and VAE lie as GPUs read them best; their values are as before."""
    for model in (base.unet, base.vae):
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


class CompiledUnet:
    """A base's UNet compiled by torch, once for each shape of its input, for pictures in which no adapter acts.

    Adapters are hooks that come and go, which a compiled form would not notice: with them the UNet runs as it is.
    """

    def __init__(self, base: LoadedBase, backend: str = "inductor") -> None:
        self._unet = base.unet
        self._compiled: Callable[..., Any] = torch.compile(self._unet.forward, backend=backend, dynamic=False)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the UNet's forward pass is the compiled one."""
        from torch._dynamo import config

        self._unet.forward = self._compiled
        try:
            with config.patch(recompile_limit=_MOST_SHAPES):
                yield
        finally:
            del self._unet.forward

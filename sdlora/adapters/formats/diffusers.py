"""diffusers' format: one file whose keys hold module paths, as its `save_lora_weights` writes today.

Readers take scale 1 where they do not know of the header's alphas, so alpha / rank is multiplied into the second factor
and the alphas in the header are the ranks: every reader then has the same delta-W.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdlora.adapters.formats import dotted, peft
from sdlora.errors import FormatError

if TYPE_CHECKING:
    import torch

    from sdlora.adapters.layers import AdapterLayer

NAME = dotted.DIFFUSERS


def write(layers: Mapping[str, AdapterLayer]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return tensors and header entries. Raises FormatError for kinds that diffusers does not read."""
    components = peft.by_component({path: _with_scale_one(layer) for path, layer in layers.items()})
    tensors: dict[str, torch.Tensor] = {}
    settings: dict[str, Any] = {}
    for component, own in components.items():
        config = peft.configuration(own)
        if config["peft_type"] != "LORA":
            raise FormatError(
                f"the layers are {next(iter(own.values())).title}, which diffusers does not read; write the file in kohya's format"
            )
        settings |= {f"{component}.{key}": value for key, value in config.items()}
        for inside, layer in own.items():
            tensors |= {f"{component}.{inside}.{part}": tensor for part, tensor in peft.lora_tensors(layer).items()}
    return tensors, {dotted.METADATA: json.dumps(settings, sort_keys=True), "format": "pt"}


def _with_scale_one(layer: Any) -> Any:
    from sdlora.adapters.layers import DoraLayer, LoraLayer

    if isinstance(layer, DoraLayer):
        return replace(layer, lora=_with_scale_one(layer.lora))
    if not isinstance(layer, LoraLayer) or layer.scale == 1:
        return layer
    # A power of two near the scale's root into the first factor, so that small halves do not lose their last digits.
    first = 2.0 ** round(math.log2(abs(layer.scale)) / 2) if layer.scale and layer.up.dtype.itemsize < 4 else 1.0
    up = (layer.up.float() * (layer.scale / first)).to(layer.up.dtype)
    return replace(layer, down=layer.down * first, up=up, alpha=float(layer.rank))

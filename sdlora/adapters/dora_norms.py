"""DoRA's norms in float32: peft computes them in the precision of the base, where they are wrong by up to 0.4 %.

With them so, a fresh DoRA adapter would already change the output of a base in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraConv2dLayer, DoraLinearLayer
from torch import nn

from sdlora.families.quantize import full_weight


def use_float32_norms(layer: Any, name: str) -> None:
    """DoRA `name` of a peft layer starts with the row norms of the base's weight, and norms are float32 from now on."""
    base_layer = layer.get_base_layer()
    kind = _Conv if isinstance(base_layer, nn.Conv2d) else _Linear
    magnitude = kind(fan_in_fan_out=False)
    norms = row_norms(full_weight(base_layer)).view_as(layer.lora_magnitude_vector[name].weight)
    magnitude.weight = nn.Parameter(norms)
    layer.lora_magnitude_vector[name] = magnitude


def row_norms(weight: torch.Tensor) -> torch.Tensor:
    """Return the norm of each output row over all other dimensions, [out] float32; never quite zero."""
    norms: torch.Tensor = torch.linalg.vector_norm(weight.float().flatten(1), dim=1)
    return norms.clamp(min=torch.finfo(torch.float32).eps)


class _Float32Norms:
    """What peft's DoRA layers compute of the weights, whatever autocast says. The product is not differentiated."""

    weight: nn.Parameter

    def get_lora_weight(self, lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> torch.Tensor:  # noqa: N803
        with torch.no_grad(), torch.autocast(lora_A.weight.device.type, enabled=False):
            product: torch.Tensor = lora_B.weight.float().flatten(1) @ lora_A.weight.float().flatten(1)
            return product

    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str | None = None
    ) -> torch.Tensor:
        return row_norms(weight.float() + scaling * lora_weight.float().view_as(weight)).view_as(self.weight)


class _Linear(_Float32Norms, DoraLinearLayer):
    pass


class _Conv(_Float32Norms, DoraConv2dLayer):
    pass

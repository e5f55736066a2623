"""The frozen base in fewer bits: QLoRA's nf4, or int8, for the linear layers of the UNet's transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdlora.config import Quantization
from sdlora.errors import ModelError, first_line


def quantize_linears(model: Any, kind: Quantization, device: torch.device, dtype: torch.dtype) -> int:
    """The linear layers of the attention blocks hold their weights in `kind`; returns how many are new to that.

    nf4: 4 bits with double quantisation (Dettmers et al. 2023). int8: 8 bits row by row (Dettmers et al.
    2022). Products are computed in `dtype`. Layers whose weights are not there yet are left for a later call,
    everything else stays as it is. Raises ModelError where bitsandbytes cannot do it.
    """
    try:
        import bitsandbytes

        paths = [path for path, layer in model.named_modules() if ".attentions." in f".{path}" and _is_ready(layer)]
        for path in paths:
            parent, _, child = path.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, _quantized(bitsandbytes, getattr(owner, child), kind, dtype).to(device))
    except torch.OutOfMemoryError:
        raise
    except (ImportError, OSError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ModelError(
            f"base.quantize = {kind} does not work here ({first_line(error)}); "
            "'sdlora doctor' tells what bitsandbytes can do, base.quantize = none does without it"
        ) from error
    # By these peft knows which kind of layer it wraps.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    return len(paths)


def _is_ready(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and not any(parameter.is_meta for parameter in layer.parameters())


def _quantized(bitsandbytes: Any, linear: nn.Linear, kind: Quantization, dtype: torch.dtype) -> Any:
    """Return the layer that becomes quantised when it is moved to its device."""
    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    weight = linear.weight.detach()
    if kind == "nf4":
        options = {"compress_statistics": True, "quant_type": "nf4"}
        layer = bitsandbytes.nn.Linear4bit(*shape, compute_dtype=dtype, device="meta", **options)
        layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **options)
        # On some CPUs the first forward pass without gradients would rewrite the weights into a layout that
        # training cannot use afterwards.
        layer.support_avx512bf16_for_cpu = False
    else:
        layer = bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        # The layer would rewrite its bias in the precision of whatever comes in, which under autocast varies.
        layer.register_forward_pre_hook(lambda _, inputs: tuple(tensor.to(dtype) for tensor in inputs))
    layer.bias = linear.bias
    return layer


def full_weight(layer: Any) -> torch.Tensor:
    """Return a layer's weight in float32 in its own shape, whatever form it is held in."""
    kind = type(layer).__name__
    if kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        full: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    elif kind == "Linear8bitLt":
        from bitsandbytes.functional import int8_vectorwise_dequant

        # The row scales move from the weight to the layer's state with the first forward pass.
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        full = int8_vectorwise_dequant(layer.weight.data, scales)
    else:
        full = layer.weight.detach()
    return full.float()


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights and their quantisation tables, as they are in memory."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

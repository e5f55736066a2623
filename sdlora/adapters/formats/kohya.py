"""The format of kohya's trainer, which AUTOMATIC1111, Forge, ComfyUI and InvokeAI read.

`<prefix>_<module path, dots as underscores>.{lora_down.weight, lora_up.weight, alpha}`; prefix
`lora_unet` for the UNet and `lora_te` for the text encoder of SD 1.x and 2.x. alpha is a 0-d tensor; a
missing one means scale 1.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sdlora.adapters.layers import LoraLayer
from sdlora.errors import FormatError
from sdlora.storage import serialize_tensors

_PREFIXES = {"lora_unet_": "unet.", "lora_te_": "text_encoder."}
LDM_BLOCKS = ("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")
"""How keys of an SDXL adapter begin: the UNet's blocks by their names in the original checkpoint."""

_SUFFIXES = ("lora_down.weight", "lora_up.weight", "alpha")
# Module names that hold underscores themselves; everything else between underscores is one step of the path.
_COMPOUND = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "time_emb_proj", "conv_shortcut", "proj_in",
    "proj_out", "conv_in", "conv_out", "time_embedding", "linear_1", "linear_2", "to_q", "to_k", "to_v", "to_out",
    "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj",
)  # fmt: skip
_STEP = re.compile("|".join((*sorted(_COMPOUND, key=len, reverse=True), "[A-Za-z0-9]+")))


def recognises(keys: Iterable[str]) -> bool:
    """Return whether the keys are kohya's: at least one complete-looking LoRA tensor."""
    return any(key.startswith(tuple(_PREFIXES)) and key.endswith(_SUFFIXES[:2]) for key in keys)


def family_of(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Return "sd1", "sd2" or "sdxl", told from key style, then metadata, then cross-attention width."""
    if any(key.startswith(("lora_te1_", "lora_te2_", *LDM_BLOCKS)) for key in tensors):
        return "sdxl"
    if metadata.get("ss_v2") == "True" or metadata.get("ss_base_model_version", "").startswith("sd_v2"):
        return "sd2"
    width = {t.shape[1] for key, t in tensors.items() if key.endswith("attn2_to_k.lora_down.weight") and t.ndim > 1}
    return "sd2" if width == {1024} else "sd1"


def read(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, LoraLayer], tuple[str, ...]]:
    """Return the layers and the keys that are none of the format's. Raises FormatError for half pairs."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key in sorted(tensors):
        name, _, suffix = key.partition(".")
        if suffix in _SUFFIXES and name.startswith(tuple(_PREFIXES)) and key_name(module_path(name)) == name:
            groups.setdefault(name, {})[suffix] = tensors[key]
        else:
            unknown.append(key)
    layers = {module_path(name): _layer(name, parts) for name, parts in groups.items()}
    return layers, tuple(unknown)


def write(layers: Mapping[str, LoraLayer]) -> dict[str, torch.Tensor]:
    """Return the tensors of the file, alpha as stored by the format, a 0-d tensor of the weights' type."""
    tensors = {}
    for path, layer in layers.items():
        name = key_name(path)
        tensors[f"{name}.lora_down.weight"] = layer.down
        tensors[f"{name}.lora_up.weight"] = layer.up
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=layer.down.dtype)
    return tensors


def key_name(path: str) -> str:
    """Return the key of a module path: "unet.mid_block.x" gives "lora_unet_mid_block_x"."""
    for prefix, component in _PREFIXES.items():
        if path.startswith(component):
            return prefix + path.removeprefix(component).replace(".", "_")
    raise FormatError(f"layer {path!r} has no place in kohya's format (known: {', '.join(_PREFIXES.values())})")


def module_path(name: str) -> str:
    """Return the module path of a key: the inverse of `key_name`, without needing a model."""
    for prefix, component in _PREFIXES.items():
        if name.startswith(prefix):
            return component + ".".join(_STEP.findall(name.removeprefix(prefix)))
    raise FormatError(f"key {name!r} does not start with one of {', '.join(_PREFIXES)}")


def hashes(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the two hash entries that other programs show and search by.

    `sshs_model_hash`: SHA-256 of the bytes behind the header. `sshs_legacy_hash`: first 8 hex digits of
    SHA-256 over 64 KiB at 1 MiB of the file as it would be without metadata.
    """
    data = serialize_tensors(tensors, {})
    behind_header = 8 + int.from_bytes(data[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(data[behind_header:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }


def _layer(name: str, parts: Mapping[str, Any]) -> LoraLayer:
    missing = [suffix for suffix in _SUFFIXES[:2] if suffix not in parts]
    if missing:
        raise FormatError(f"{name} has no {missing[0]}; the file is incomplete")
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    if not (
        down.ndim in (2, 4) and up.ndim == down.ndim and up.shape[1] == down.shape[0] > 0 and set(up.shape[2:]) <= {1}
    ):
        raise FormatError(f"{name} has shapes down {tuple(down.shape)} and up {tuple(up.shape)}, which make no pair")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise FormatError(f"{name} holds {down.dtype} and {up.dtype}; expected floating-point numbers")
    alpha = parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise FormatError(f"{name}.alpha has {alpha.numel()} numbers; expected one")
    value = float(down.shape[0]) if alpha is None else float(alpha)
    if not (-1e6 < value < 1e6):
        raise FormatError(f"{name}.alpha is {value}; expected a finite number")
    return LoraLayer(down, up, value)

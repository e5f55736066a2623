"""The format of kohya's trainer, which AUTOMATIC1111, Forge, ComfyUI and InvokeAI read.

`<prefix>_<module path, dots as underscores>.{lora_down.weight, lora_up.weight, alpha}`, or another kind's suffixes
(kohya_layers.py); prefix `lora_unet` for the UNet, `lora_te` for the text encoder of SD 1.x and 2.x, `lora_te1` and
`lora_te2` for those of SDXL. SDXL's UNet modules go by their names in the original code, the others' by diffusers'.
alpha is a 0-d tensor; a missing one means scale 1.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

import torch

from sdlora.adapters.formats.kohya_layers import SUFFIXES, WEIGHT_SUFFIXES, input_width, layer_of, parts_of
from sdlora.adapters.formats.ldm_names import from_ldm, to_ldm
from sdlora.adapters.layers import AdapterLayer
from sdlora.errors import FormatError
from sdlora.storage import serialize_tensors

_UNET = "lora_unet_"
_TEXT_PREFIXES = {
    "sd1": {"text_encoder": "lora_te_"},
    "sd2": {"text_encoder": "lora_te_"},
    "sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
_COMPONENTS = {_UNET: "unet"} | {
    prefix: component for prefixes in _TEXT_PREFIXES.values() for component, prefix in prefixes.items()
}
_LDM_KEYED = ("sdxl",)
_LDM_BLOCKS = tuple(f"{_UNET}{name}_" for name in ("input_blocks", "middle_block", "output_blocks"))
# Module names that hold underscores themselves; everything else between underscores is one step of the path.
_COMPOUND = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "time_emb_proj", "conv_shortcut", "proj_in",
    "proj_out", "conv_in", "conv_out", "time_embedding", "add_embedding", "linear_1", "linear_2", "to_q", "to_k",
    "to_v", "to_out", "text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj",
    "input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers", "skip_connection",
    "time_embed", "label_emb",
)  # fmt: skip
_STEP = re.compile("|".join((*sorted(_COMPOUND, key=len, reverse=True), "[A-Za-z0-9]+")))


def recognises(keys: Iterable[str]) -> bool:
    """Return whether the keys are kohya's: at least one tensor of a known kind of adapter."""
    return any(key.startswith(tuple(_COMPONENTS)) and key.partition(".")[2] in WEIGHT_SUFFIXES for key in keys)


def family_of(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> str:
    """Return "sd1", "sd2" or "sdxl", told from key style, then metadata, then cross-attention width; "" if untold.

    `shapes` are those of the file's tensors, which its header holds.
    """
    if any(key.startswith((*_TEXT_PREFIXES["sdxl"].values(), *_LDM_BLOCKS)) for key in shapes):
        return "sdxl"
    version = metadata.get("ss_base_model_version", "") + metadata.get("modelspec.architecture", "")
    if version.startswith("sdxl_") or "stable-diffusion-xl" in version:
        return "sdxl"
    if metadata.get("ss_v2") == "True" or "sd_v2" in version or "stable-diffusion-v2" in version:
        return "sd2"
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        name, _, suffix = key.partition(".")
        if name.endswith("attn2_to_k"):
            layers.setdefault(name, {})[suffix] = shape
    widths = {input_width(parts) for parts in layers.values()}
    by_width = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
    if len(widths) == 1 and (width := widths.pop()) in by_width:
        return by_width[width]
    return "sd1" if "sd_v1" in version or "stable-diffusion-v1" in version else ""


def read(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, AdapterLayer], tuple[str, ...]]:
    """Return the layers and the keys that are none of the format's.

    Raises FormatError for a layer that lacks a part or whose parts do not fit each other.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key in sorted(tensors):
        name, _, suffix = key.partition(".")
        if suffix in SUFFIXES and name.startswith(tuple(_COMPONENTS)) and _leads_back(name):
            groups.setdefault(name, {})[suffix] = tensors[key]
        else:
            unknown.append(key)
    layers: dict[str, AdapterLayer] = {}
    for name, parts in groups.items():
        path = module_path(name)
        if path in layers:
            raise FormatError(f"{name} names a layer that the file holds under another name too")
        layers[path] = layer_of(name, parts)
    return layers, tuple(unknown)


def write(layers: Mapping[str, AdapterLayer], family: str) -> dict[str, torch.Tensor]:
    """Return the tensors of the file, alpha as stored by the format, a 0-d tensor of the weights' type."""
    tensors: dict[str, torch.Tensor] = {}
    for path, layer in layers.items():
        name = key_name(path, family)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in parts_of(layer).items()}
    return tensors


def key_name(path: str, family: str) -> str:
    """Return the key of a module path: "unet.mid_block.x" gives "lora_unet_mid_block_x" in SD 1.x and 2.x.

    A file of unknown family is written as one of SD 1.x. Raises FormatError for a path without a place.
    """
    component, _, inside = path.partition(".")
    prefixes = {"unet": _UNET} | _TEXT_PREFIXES[family or "sd1"]
    name = to_ldm(inside) if component == "unet" and family in _LDM_KEYED else inside
    if component not in prefixes or not name:
        raise FormatError(f"layer {path!r} has no place in kohya's format for {family}")
    return prefixes[component] + name.replace(".", "_")


def module_path(name: str) -> str:
    """Return the module path of a key, "" where it names none: the inverse of `key_name`, without needing a model."""
    for prefix, component in _COMPONENTS.items():
        if name.startswith(prefix):
            inside = ".".join(_STEP.findall(name.removeprefix(prefix)))
            if name.startswith(_LDM_BLOCKS) or inside.startswith(("time_embed.", "label_emb.", "out.")):
                inside = from_ldm(inside)
            return f"{component}.{inside}" if inside else ""
    raise FormatError(f"key {name!r} does not start with one of {', '.join(_COMPONENTS)}")


def _leads_back(name: str) -> bool:
    """Return whether the key is what the path it is read as is written as, in some family."""
    path = module_path(name)
    if not path:
        return False
    for family in _TEXT_PREFIXES:
        try:
            if key_name(path, family) == name:
                return True
        except FormatError:
            continue
    return False


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

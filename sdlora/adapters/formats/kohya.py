"""The format of kohya's trainer, which AUTOMATIC1111, Forge, ComfyUI and InvokeAI read.

`<prefix>_<module path, dots as underscores>.{lora_down.weight, lora_up.weight, alpha}`, or another kind's suffixes
(parts.py); prefix `lora_unet` for the UNet, `lora_te` for the text encoder of SD 1.x and 2.x, `lora_te1` and
`lora_te2` for those of SDXL. SDXL's UNet modules go by their names in the original code, the others' by diffusers'.
alpha is a 0-d tensor; a missing one means scale 1.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from sdlora.adapters.formats.ldm_names import from_ldm, to_ldm
from sdlora.adapters.formats.parts import PARTS, WEIGHTS
from sdlora.adapters.formats.places import Places, Shapes, Sorting
from sdlora.adapters.formats.places import family_of as places_family
from sdlora.errors import FormatError
from sdlora.storage import serialize_tensors

if TYPE_CHECKING:
    import torch

    from sdlora.adapters.layers import AdapterLayer

NAME = "kohya"
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
_LYCORIS = "lycoris_"
"""Prefix of the UNet's layers in files of LyCORIS used by itself."""
_ROOTS = {
    "down_blocks", "up_blocks", "mid_block", "conv_in", "conv_out", "time_embedding", "add_embedding", "text_model",
    "text_projection",
}  # fmt: skip
_SD1_UPSAMPLER = f"{_UNET}output_blocks_2_1_conv"
"""The one layer that SD 1.x and 2.x call otherwise than SDXL in the original code, having no attention before it."""
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


def places(shapes: Shapes, metadata: Mapping[str, str]) -> Places | None:
    """Return where the tensors belong; None where no tensor is a layer's weight in this format."""
    if not any(key.partition(".")[2] in WEIGHTS for key in shapes):
        return None
    found = _places(tuple(sorted(shapes)))
    return found if found.layers else None


@lru_cache(maxsize=64)  # files of one trainer have the same keys
def _places(keys: tuple[str, ...]) -> Places:
    sorting = Sorting()
    for key in keys:
        name, _, part = key.partition(".")
        path = _layer_path(name) if part in PARTS else ""
        if path:
            sorting.add(key, path, part, name)
        else:
            sorting.reject(key)
    return sorting.places()


def family_of(found: Places, shapes: Shapes, metadata: Mapping[str, str]) -> str:
    """Return "sd1", "sd2" or "sdxl", told from key style, then metadata, then widths; "" if untold."""
    names, text = [place.name for place in found.layers.values()], tuple(_TEXT_PREFIXES["sdxl"].values())
    if any(name.startswith(text) for name in names):
        return "sdxl"
    told = places_family(found, shapes, metadata)
    return told or ("sdxl" if any(name.startswith(_LDM_BLOCKS) for name in names) else "")


def write(layers: Mapping[str, AdapterLayer], family: str) -> dict[str, torch.Tensor]:
    """Return the tensors of the file, alpha as stored by the format, a 0-d tensor of the weights' type."""
    from sdlora.adapters.formats.layer_parts import parts_of

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


@lru_cache(maxsize=8192)
def _layer_path(name: str) -> str:
    """Return the path that a key is read as, "" where that path is written as another key in every family."""
    if name.startswith(_LYCORIS):
        name = _UNET + name.removeprefix(_LYCORIS)
    path = module_path(name) if name.startswith(tuple(_COMPONENTS)) else ""
    if not set(path.split(".")[1:2]) & _ROOTS:
        return ""
    if name == _SD1_UPSAMPLER:
        return path
    for family in _TEXT_PREFIXES if path else ():
        try:
            if key_name(path, family) == name:
                return path
        except FormatError:
            continue
    return ""


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

"""What a ControlNet is and where it lies, told from its description and headers alone."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.errors import ModelError
from sdlora.families.detect import FIRST_LAYER, read_json, weight_patterns
from sdlora.families.sources import cached_folder, download, is_hub_id
from sdlora.families.traits import SD1_TRAITS, SD2_TRAITS, SDXL_TRAITS, FamilyTraits
from sdlora.headers import TensorEntry, read_header
from sdlora.storage import cached_sha256, folder_sha256, user_path

ORIGINAL_PREFIX = "control_model."
"""How the keys of a ControlNet in the original layout begin, where a file says so."""
_HINTS = ("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight")
"""The layer that reads the map, by its original name and in diffusers."""
_PROJECTION = "proj_in.weight"
_VARIANTS = ("", "fp16")
_DESCRIPTION = "config.json"
# What is called a ControlNet, or lies beside them, and is another thing: a part of some key, and what such a file is.
_FOREIGN_INSIDE = {
    "lora_controlnet": "is a Control-LoRA, which sdlora does not read; use a whole ControlNet",
    "lllite": "is a ControlNet-LLLite, which sdlora does not read; use a whole ControlNet",
    "difference": "is stored as a difference to a base, which sdlora does not read; use the whole ControlNet",
    "task_embedding": "is a ControlNet for many kinds of maps (union), which sdlora does not read; use one for a single kind",
}
"""Where the keys of a ControlNet are there besides."""
_FOREIGN = {
    "image_proj": "is an IP-Adapter, not a ControlNet",
    "double_blocks.": "is for Flux, which sdlora does not support",
    "joint_blocks.": "is for Stable Diffusion 3, which sdlora does not support",
    "transformer_blocks.0.attn.add_": "is for Stable Diffusion 3, which sdlora does not support",
    "lora_unet_": "is an adapter (LoRA), not a ControlNet; give it as --adapter",
    ".lora_": "is an adapter (LoRA), not a ControlNet; give it as --adapter",
    FIRST_LAYER: "is a base, not a ControlNet; give it as --base",
    "body.0.": "is a T2I-Adapter, which sdlora does not read; use a ControlNet",
}


@dataclass(frozen=True)
class ControlFacts:
    """What is known of a ControlNet before it is loaded."""

    name: str
    """What recipes call it: its Hub id, or the name of its file or folder."""
    path: Path
    """A folder as diffusers writes it, or one file, in diffusers' names or the original ones."""
    family: FamilyTraits
    files: tuple[Path, ...]
    """Its weights."""
    sha256: str
    """By which recipes know it."""


def find_control(name: str) -> ControlFacts:
    """Return the ControlNet of that path or Hugging Face id; the latter is downloaded, or taken from the cache.

    Raises ModelError or FormatError, with one sentence, for what is none that sdlora reads.
    """
    path = user_path(name)
    if path.exists():
        return _facts(path.name, path, _state(path))
    if not is_hub_id(name) or path.suffix in {".safetensors", ".pth", ".pt", ".ckpt"}:
        raise ModelError(
            f"{name}: there is no such ControlNet; name a .safetensors file, a folder with {_DESCRIPTION}, or a Hugging Face id"
        )
    for variant in _VARIANTS:
        folder = download(name, "", [_DESCRIPTION, *weight_patterns(variant)])
        if _weights_in(folder):
            break
    return _facts(name, folder, _state(folder))


def find_cached_control(name: str) -> Path | None:
    """Return the folder of a Hugging Face id that was downloaded before, None where it was not."""
    return cached_folder(name, [_DESCRIPTION, *weight_patterns(_VARIANTS[0]), *weight_patterns(_VARIANTS[1])])


def control_sha256(path: Path) -> str:
    """Return the SHA-256 of a ControlNet's file, or of a folder's weight files, by their names and hashes."""
    return cached_sha256(path) if path.is_file() else folder_sha256(path, _weights_in(path))


def refuse_control_of_another_family(control: ControlFacts, family: FamilyTraits, base_name: str) -> None:
    """Raise ModelError where a ControlNet is for another family than the base's."""
    if control.family.name != family.name:
        raise ModelError(
            f"{control.path}: is a ControlNet for {control.family.title}, the base {base_name} is {family.title}; choose one that "
            "fits it"
        )


_State = tuple[tuple[str, int, int], ...]
"""The files as they are now: path, time of change, length."""


def _state(path: Path) -> _State:
    files = [path] if path.is_file() else [path / _DESCRIPTION, *_weights_in(path)]
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists())


@functools.lru_cache(maxsize=64)
def _facts(name: str, path: Path, state: _State) -> ControlFacts:
    """Return what it is; many pictures ask for the same one."""
    if path.is_file():
        return ControlFacts(name, path, _family_of_file(path), (path,), control_sha256(path))
    return ControlFacts(name, path, _family_of_folder(path), _weights_in(path), control_sha256(path))


# --- folders -----------------------------------------------------------------------------------------


def _weights_in(folder: Path) -> tuple[Path, ...]:
    """Return the weight files of a folder, those of the first variant that there is."""
    for variant in _VARIANTS:
        if found := tuple(file for pattern in weight_patterns(variant) for file in sorted(folder.glob(pattern))):
            return found
    return ()


def _family_of_folder(folder: Path) -> FamilyTraits:
    if not (folder / _DESCRIPTION).is_file():
        raise ModelError(f"{folder}: is no folder of a ControlNet (it has no {_DESCRIPTION}); name the one that has it")
    if not _weights_in(folder):
        raise ModelError(
            f"{folder}: holds no {weight_patterns('')[0]}; sdlora reads only safetensors, since pickles could run code when opened"
        )
    config = read_json(folder / _DESCRIPTION)
    kind = config.get("_class_name")
    if kind != "ControlNetModel":
        raise ModelError(
            f"{folder}: is a {kind or 'model of no known kind'}, not a ControlNetModel, which is what sdlora reads"
        )
    if config.get("global_pool_conditions"):
        raise ModelError(
            f"{folder}: was made for ControlNet's guess mode (its maps are pooled), which sdlora does not have; use another ControlNet"
        )
    family = next((traits for traits in (SDXL_TRAITS, SD2_TRAITS, SD1_TRAITS) if traits.recognises_unet(config)), None)
    if family is None or config.get("class_embed_type"):
        raise ModelError(
            f"{folder}: is a ControlNet for a UNet of an unknown kind; it must be for SD 1.x, SD 2.x or SDXL"
        )
    return family


# --- single files ------------------------------------------------------------------------------------


def _family_of_file(path: Path) -> FamilyTraits:
    if path.suffix in {".ckpt", ".pt", ".pth", ".bin"}:
        raise ModelError(f"{path}: is a pickle, which could run code when opened; get the .safetensors version")
    tensors = read_header(path).tensors
    if mark := next((mark for mark in _FOREIGN_INSIDE if any(mark in key for key in tensors)), ""):
        raise ModelError(f"{path}: {_FOREIGN_INSIDE[mark]}")
    shapes = {key.removeprefix(ORIGINAL_PREFIX): entry.shape for key, entry in control_tensors(tensors)}
    if not any(hint in shapes for hint in _HINTS):
        mark = next((mark for mark in _FOREIGN if any(mark in key for key in tensors)), "")
        what = _FOREIGN.get(
            mark, f"holds no ControlNet ({len(tensors)} tensors, such as {min(tensors, default='none')!r})"
        )
        raise ModelError(f"{path}: {what}")
    if shapes.keys() & {"label_emb.0.0.weight", "add_embedding.linear_1.weight"}:
        return SDXL_TRAITS
    convolutions = any(key.endswith(_PROJECTION) and len(shape) == 4 for key, shape in shapes.items())
    return SD1_TRAITS if convolutions else SD2_TRAITS


def control_tensors(tensors: Mapping[str, TensorEntry]) -> Iterable[tuple[str, Any]]:
    """Return what of a file's tensors is the ControlNet, which may lie in it with the base that it was trained on."""
    marked = [(key, entry) for key, entry in tensors.items() if key.startswith(ORIGINAL_PREFIX)]
    return marked or list(tensors.items())

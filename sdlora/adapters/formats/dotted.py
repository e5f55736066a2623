"""Formats whose keys hold a module's path with its dots: diffusers', PEFT's, and that of ComfyUI's own nodes.

diffusers, as written today: `<component>.<path>.lora_A.weight`, `lora_B.weight`, and of DoRA `lora_magnitude_vector`;
its scripts' spelling `<path>.lora.down.weight` or, in text encoders, `<path>.lora_linear_layer.down.weight`; the oldest,
`<attention>.processor.to_q_lora.down.weight`, of the UNet alone also without `unet.`. PEFT: `base_model.model.<path>` of
one component. ComfyUI: `diffusion_model.<original path>.lora_down.weight`. There is no alpha among the tensors of
diffusers and PEFT: the header's `lora_adapter_metadata`, or PEFT's adapter_config.json, has it, else scale is 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sdlora.adapters.formats.ldm_names import from_ldm
from sdlora.adapters.formats.parts import ALPHA, LOHA, LOKR, LORA, MAGNITUDE, PARTS, rank_of
from sdlora.adapters.formats.places import COMPONENTS, Places, Shapes, Sorting, is_module_path
from sdlora.errors import FormatError
from sdlora.families.traits import canonical

DIFFUSERS, PEFT, COMFYUI = "diffusers", "peft", "comfyui"
METADATA = "lora_adapter_metadata"
"""Header entry of diffusers' files: JSON of PEFT's config, each key with its component before it."""
A, B, VECTOR = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"

_PEFT_ROOT = "base_model.model."
_COMFYUI_ROOT = "diffusion_model."
_DOWN, _UP = LORA[:2]
_ENDINGS: Mapping[str, str] = {
    A: _DOWN,
    B: _UP,
    VECTOR: MAGNITUDE,
    "lora_magnitude_vector": MAGNITUDE,
    "lora_A.default.weight": _DOWN,
    "lora_B.default.weight": _UP,
    "lora_magnitude_vector.default.weight": MAGNITUDE,
    "lora.down.weight": _DOWN,
    "lora.up.weight": _UP,
    "lora_linear_layer.down.weight": _DOWN,
    "lora_linear_layer.up.weight": _UP,
    "lora_down.weight": _DOWN,
    "lora_up.weight": _UP,
    ALPHA: ALPHA,
    **{part: part for part in (*LOHA, *LOKR)},
}
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
_UNET_ROOTS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.", "add_embedding.")
_TEXT_ROOTS = ("text_model.", "encoder.layers.", "text_projection.")
_TEXT_PROCESSOR = re.compile(r"(.+\.self_attn)\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_PLAIN_PATTERN = re.compile(r"\^?(?:[A-Za-z0-9_]|\\?\.)+\$?")
"""A pattern of PEFT that is the end of a path, dots escaped or not. Others are regular expressions."""
_LARGEST = 1e6


def places(shapes: Shapes, metadata: Mapping[str, str]) -> Places | None:
    """Return where the tensors belong; None where no tensor is a layer's weight in one of these formats.

    Raises FormatError where the header's entry on ranks and alphas cannot be read.
    """
    read = {key: _read(key) for key in sorted(shapes)}
    if not any(found and found[1] != ALPHA for found in read.values()):
        return None
    sorting = Sorting()
    for key, found in read.items():
        if found:
            path, part, name = found
            sorting.add(key, path, part, name)
        else:
            sorting.reject(key)
    spelling = {_DOWN: A, _UP: B} if any(key.endswith((A, B)) for key in shapes) else {}
    placed = sorting.places(spelling)
    ranks = {path: rank_of(placed.shapes_of(path, shapes)) for path in placed.layers}
    alphas: dict[str, float] = {}
    for component, settings in header_settings(metadata).items():
        own = {path: rank for path, rank in ranks.items() if path.startswith(f"{component}.")}
        alphas |= alphas_of(settings, own)
    return replace(placed, alphas=alphas, rows=any("lora_magnitude_vector" in key for key in shapes))


def format_of(shapes: Shapes) -> str:
    """Return which of the formats it is."""
    for root, name in ((_PEFT_ROOT, PEFT), (_COMFYUI_ROOT, COMFYUI)):
        if any(key.startswith(root) for key in shapes):
            return name
    return DIFFUSERS


def header_settings(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return PEFT's settings of each component from diffusers' header entry. Raises FormatError for an unreadable one."""
    try:
        entries = json.loads(metadata.get(METADATA, "{}"))
        found: dict[str, dict[str, Any]] = {}
        for key, value in entries.items():
            component, _, name = key.partition(".")
            if component in COMPONENTS:
                found.setdefault(component, {})[name] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"its header entry {METADATA} is not readable; export the adapter again") from error
    return found


def alphas_of(settings: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Return {path: alpha} by PEFT's settings of one component, such that the scale is always alpha / rank.

    rsLoRA's scale is alpha / sqrt(rank). Raises FormatError for settings that are no numbers, or patterns that are
    regular expressions.
    """
    pattern = settings.get("alpha_pattern") or {}
    usual = settings.get("lora_alpha", settings.get("alpha"))
    if usual is None and not pattern:
        return {}
    if not isinstance(pattern, Mapping):
        raise FormatError("its alpha_pattern is no table of numbers; export the adapter again")
    endings, wholes = _patterns(pattern)
    found = {}
    for path, rank in ranks.items():
        inside = path.partition(".")[2]
        alpha = _of_pattern(inside, endings, wholes, usual)
        if type(alpha) not in (int, float) or not -_LARGEST < alpha < _LARGEST:
            raise FormatError(f"its alpha is {str(alpha)[:40]!r}; expected a number")
        root = math.sqrt(rank) if settings.get("use_rslora") is True else 1.0
        found[path] = float(alpha) * root
    return found


Ordered = dict[str, tuple[int, Any]]
"""Path, or end of one -> (which pattern it is, alpha)."""


def _patterns(pattern: Mapping[str, Any]) -> tuple[Ordered, Ordered]:
    """Return PEFT's patterns that are ends of paths, and those that are whole paths."""
    endings, wholes = Ordered(), Ordered()
    for number, (key, alpha) in enumerate(pattern.items()):
        if not _PLAIN_PATTERN.fullmatch(key):
            raise FormatError(
                f"its alpha_pattern {key[:80]!r} is a regular expression, which is not read; name whole modules"
            )
        plain = key.replace("\\.", ".").removesuffix("$")
        if plain.startswith("^"):
            wholes.setdefault(plain[1:], (number, alpha))
        else:
            endings.setdefault(plain, (number, alpha))
    return endings, wholes


def _of_pattern(path: str, endings: Ordered, wholes: Ordered, usual: Any) -> Any:
    """Return the alpha of the first pattern that PEFT takes for a path: all of it, or what it ends with behind a dot.

    A text encoder's path counts with and without "text_model.", which newer libraries dropped.
    """
    if not endings and not wholes:
        return usual
    steps = path.split(".")
    tails = [".".join(steps[start:]) for start in range(len(steps))]
    found = [endings[tail] for tail in tails if tail in endings]
    found += [wholes[whole] for whole in (path, path.removeprefix("text_model.")) if whole in wholes]
    return min(found, key=lambda entry: entry[0])[1] if found else usual


def _read(key: str) -> tuple[str, str, str] | None:
    """Return (module path, part, what the file calls the layer), None where it is no layer's tensor."""
    if match := _PROCESSOR.fullmatch(key):
        attention, name, half = match.groups()
        name = "to_out.0" if name == "to_out" else name
        ours = canonical_path(f"{attention}.{name}")
        return (ours, {"down": _DOWN, "up": _UP}[half], key.rpartition("_lora.")[0]) if ours else None
    if match := _TEXT_PROCESSOR.fullmatch(key):
        attention, name, half = match.groups()
        ours = canonical_path(f"{attention}.{name}_proj")
        return (ours, {"down": _DOWN, "up": _UP}[half], key.rpartition("_lora.")[0]) if ours else None
    if key.startswith(_COMFYUI_ROOT):
        name = next((key.removesuffix(f".{part}") for part in PARTS if key.endswith(f".{part}")), "")
        inside = from_ldm(name.removeprefix(_COMFYUI_ROOT))
        return (f"unet.{inside}", key[len(name) + 1 :], name) if inside and is_module_path(inside) else None
    ending = max((end for end in _ENDINGS if key.endswith(f".{end}")), key=len, default="")
    name = key.removesuffix(f".{ending}") if ending else ""
    ours = canonical_path(name)
    return (ours, _ENDINGS[ending], name) if ours else None


def canonical_path(name: str) -> str:
    """Return the path that `AdapterFile` has for a layer, "" where it is none's."""
    path = name.removeprefix(_PEFT_ROOT)
    component, _, inside = path.partition(".")
    if component not in COMPONENTS:
        roots = {"unet": _UNET_ROOTS, "text_encoder": _TEXT_ROOTS}
        component = next((name for name, known in roots.items() if f"{path}.".startswith(known)), "")
        inside = path
    inside = inside.removeprefix(_PEFT_ROOT)
    return canonical(component, inside) if component and is_module_path(inside) else ""

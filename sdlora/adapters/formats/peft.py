"""PEFT's format: a folder with adapter_config.json and adapter_model.safetensors, of one model.

A Stable Diffusion adapter is several of them, in the subfolders `unet`, `text_encoder` and `text_encoder_2`. Keys are those
of dotted.py; ranks and alphas are in the configuration, with patterns for layers that have others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.adapters.formats import dotted
from sdlora.adapters.formats.detect import Contents
from sdlora.adapters.formats.parts import Shape, input_width, rank_of
from sdlora.adapters.formats.places import COMPONENTS, Place, Places, family_of
from sdlora.errors import FormatError
from sdlora.headers import SafetensorsHeader

if TYPE_CHECKING:
    import torch

    from sdlora.adapters.layers import AdapterLayer

NAME = dotted.PEFT
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KINDS = ("LORA", "LOHA", "LOKR")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Starts for which PEFT changes the base's weights when it loads an adapter."""
_LARGEST_CONFIG_BYTES = 4 << 20
_WIDTH_OF_SECOND = 1280
_OF_FULL_WIDTH = ("q_proj", "k_proj", "v_proj", "out_proj", "mlp.fc1")


def is_folder(path: Path) -> bool:
    """Return whether a folder is PEFT's, of one component or of several."""
    return path.is_dir() and any((path / name / CONFIG).is_file() for name in ("", *COMPONENTS))


def folder_of(file: Path) -> Path | None:
    """Return PEFT's folder that a weights file belongs to, None where it is no such file."""
    if file.name != WEIGHTS or not file.with_name(CONFIG).is_file():
        return None
    return file.parent.parent if file.parent.name in COMPONENTS else file.parent


def component_of(file: Path) -> str:
    """Return the component that PEFT's folder says a weights file is for, "" where nothing says it."""
    return file.parent.name if folder_of(file) and file.parent.name in COMPONENTS else ""


def weight_files(folder: Path) -> dict[str, Path]:
    """Return {component: weights}, "" for the component of a folder that is itself PEFT's. Raises FormatError."""
    places = {"": folder, **{name: folder / name for name in COMPONENTS}}
    found = {name: place / WEIGHTS for name, place in places.items() if (place / CONFIG).is_file()}
    if "" in found:
        found = {"": found[""]}
    if not found:
        raise FormatError(
            f"{folder}: is a folder without {CONFIG}; name a .safetensors file in it, or a folder that PEFT has written"
        )
    for file in found.values():
        if not file.is_file():
            raise FormatError(f"{file}: is missing; PEFT keeps the weights there, beside {CONFIG}")
    return found


def contents_of(stored: Mapping[str, tuple[Path, SafetensorsHeader]]) -> Contents:
    """Return what PEFT's folders hold, keys of a named component behind "component/". Raises FormatError."""
    layers: dict[str, Place] = {}
    unknown: list[str] = []
    problems: list[str] = []
    alphas: dict[str, float] = {}
    shapes: dict[str, Shape] = {}
    metadata: dict[str, str] = {}
    for component, (file, header) in stored.items():
        own = header.layout.shapes
        settings = _settings(file.with_name(CONFIG))
        found = dotted.places(own, {})
        if found is None:
            raise FormatError(f"{file.name} of {file.parent.name} holds no layers as PEFT names them")
        named = {_rooted(path, component, found, own): place for path, place in found.layers.items()}
        before = f"{component}/" if component else ""
        for path, place in named.items():
            layers[path] = Place(place.name, {part: before + key for part, key in place.keys.items()})
        problems += _whole_products(settings, named)
        alphas |= dotted.alphas_of(
            settings,
            {path: rank_of({part: own[key] for part, key in place.keys.items()}) for path, place in named.items()},
        )
        unknown += [before + key for key in found.unknown]
        problems += found.problems
        shapes |= {before + key: shape for key, shape in own.items()}
        metadata = metadata or header.metadata
    places = Places(layers, tuple(unknown), tuple(problems), alphas, rows=True)
    return Contents(NAME, family_of(places, shapes, metadata), places)


def write(layers: Mapping[str, AdapterLayer]) -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Return {component: (configuration, tensors)}. Raises FormatError for kinds that the format, or PEFT, cannot hold."""
    components = by_component(layers)
    return {component: (configuration(own), _tensors(component, own)) for component, own in components.items()}


def by_component(layers: Mapping[str, AdapterLayer]) -> dict[str, dict[str, AdapterLayer]]:
    """Return {component: {path inside it: layer}}."""
    found: dict[str, dict[str, AdapterLayer]] = {}
    for path, layer in layers.items():
        component, _, inside = path.partition(".")
        found.setdefault(component, {})[inside] = layer
    return found


def configuration(layers: Mapping[str, AdapterLayer]) -> dict[str, Any]:
    """Return PEFT's settings for the layers of one component, by path inside it. Raises FormatError.

    Ranks and alphas that differ from the usual are patterns. Text encoders' paths go without "text_model.", which
    newer libraries dropped: PEFT takes a pattern for every path that ends with it.
    """
    from sdlora.adapters.layers import DoraLayer

    kinds = {_kind(path, layer) for path, layer in layers.items()}
    if len(kinds) > 1:
        raise FormatError(
            f"layers are of the kinds {' and '.join(sorted(kinds))}; PEFT holds one kind in a file, kohya's all"
        )
    inner = {path.removeprefix("text_model."): layer.inner for path, layer in layers.items()}
    rank = Counter(layer.rank for layer in inner.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in inner.values()).most_common(1)[0][0]
    kind = kinds.pop()
    settings: dict[str, Any] = {
        "peft_type": kind,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "rank_pattern": {path: layer.rank for path, layer in inner.items() if layer.rank != rank},
        "alpha_pattern": {path: layer.alpha for path, layer in inner.items() if layer.alpha != alpha},
        "target_modules": sorted(inner),
    }
    if kind == "LORA":
        dora = {isinstance(layer, DoraLayer) for layer in layers.values()}
        if len(dora) > 1:
            raise FormatError("some layers are DoRA and some are not; PEFT holds one kind in a file, kohya's all")
        return settings | {"lora_alpha": alpha, "use_dora": dora.pop(), "use_rslora": False, "bias": "none"}
    return settings | {"alpha": alpha, "use_effective_conv2d": False}


def lora_tensors(layer: AdapterLayer) -> dict[str, torch.Tensor]:
    """Return the tensors of a LoRA or DoRA layer as PEFT and diffusers call them."""
    from sdlora.adapters.layers import DoraLayer, LoraLayer

    inner = layer.inner
    assert isinstance(inner, LoraLayer)
    found = {dotted.A: inner.down, dotted.B: inner.up}
    if isinstance(layer, DoraLayer):
        kernel = (1, 1) if inner.down.ndim == 4 else ()
        shape = (1, -1, *kernel) if kernel else (-1,)
        found[dotted.VECTOR] = layer.magnitude.reshape(shape)
    return found


def _tensors(component: str, layers: Mapping[str, AdapterLayer]) -> dict[str, torch.Tensor]:
    """Return PEFT's tensors, by the names that modules have in today's transformers, as PEFT takes no others."""
    from sdlora.adapters.formats.layer_parts import parts_of
    from sdlora.adapters.layers import LohaLayer

    found: dict[str, torch.Tensor] = {}
    for path, layer in layers.items():
        live = path.removeprefix("text_model.") if component == "text_encoder" else path
        own = parts_of(layer) if isinstance(layer, LohaLayer) else lora_tensors(layer)
        found |= {f"base_model.model.{live}.{part}": tensor for part, tensor in own.items() if part != "alpha"}
    return found


def _kind(path: str, layer: AdapterLayer) -> str:
    """Return PEFT's name of the layer's kind. Raises FormatError where PEFT has no such layers."""
    from sdlora.adapters.layers import DoraLayer, LohaLayer, LoraLayer

    inner = layer.inner
    if isinstance(inner, LoraLayer) and inner.mid is None and not (isinstance(layer, DoraLayer) and layer.by_column):
        return "LORA"
    if isinstance(inner, LohaLayer) and inner.t1 is None and inner is layer:
        return "LOHA"
    raise FormatError(
        f"layer {path} is {layer.title}, which diffusers and PEFT do not hold as it is; write the file in kohya's format"
    )


def _settings(file: Path) -> dict[str, Any]:
    """Return PEFT's configuration. Raises FormatError, without the folder's name, where it is none or of another kind."""
    try:
        if file.stat().st_size > _LARGEST_CONFIG_BYTES:
            raise FormatError(f"{CONFIG} is {file.stat().st_size} bytes long; expected a few thousand")
        settings = json.loads(file.read_bytes())
        kind = str(settings.get("peft_type", "LORA")).rpartition(".")[2]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{CONFIG} cannot be read ({type(error).__name__}); export the adapter again") from error
    start = str(settings.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGES_BASE):
        raise FormatError(
            f"was started by {start[:40]} and acts on a base that PEFT changes for it; save it as plain LoRA with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    if kind not in _KINDS:
        raise FormatError(f"is a PEFT adapter of the kind {kind[:40]}, which is not read; known: {', '.join(_KINDS)}")
    return dict(settings)


def _whole_products(settings: Mapping[str, Any], layers: Mapping[str, Place]) -> list[str]:
    """Return what keeps LoKr layers of two whole factors from being read: a scale other than 1, which they cannot hold."""
    whole = [place.name for place in layers.values() if {"lokr_w1", "lokr_w2"} <= place.keys.keys()]
    patterns = settings.get("rank_pattern") or settings.get("alpha_pattern")
    if not whole or (settings.get("alpha") == settings.get("r") and not patterns):
        return []
    return [
        f"{len(whole)} LoKr layers of whole factors, such as {whole[0]}, have scale {settings.get('alpha')} / "
        f"{settings.get('r')}, which only PEFT gives them; expected alpha equal to r"
    ]


def _rooted(path: str, component: str, found: Places, shapes: Mapping[str, Shape]) -> str:
    """Return the layer's path with the component that its folder, or its width, says."""
    own, _, inside = path.partition(".")
    if component:
        return f"{component}.{inside}"
    if own != "text_encoder":
        return path
    widths = {input_width(found.shapes_of(name, shapes)) for name in found.layers if name.endswith(_OF_FULL_WIDTH)}
    return f"text_encoder_2.{inside}" if widths == {_WIDTH_OF_SECOND} else path

"""`AdapterFile`: what every adapter format is read into and written from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch

from sdlora.adapters.formats import kohya
from sdlora.adapters.layers import LoraLayer
from sdlora.errors import ConfigError, FormatError
from sdlora.storage import read_header, read_tensors, serialize_tensors, write_bytes

FORMATS = ("kohya",)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter: low-rank layers by diffusers module path, and the text that travels with them.

    A path starts with its component: "unet.down_blocks.0...to_q", "text_encoder.text_model.encoder...".
    """

    layers: Mapping[str, LoraLayer]
    family: str
    """"sd1", "sd2", "sdxl", or "" where the file does not tell."""
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def components(self) -> dict[str, int]:
        """Return {component: number of layers}."""
        counts: dict[str, int] = {}
        for path in self.layers:
            component = path.split(".", 1)[0]
            counts[component] = counts.get(component, 0) + 1
        return counts


def read_adapter(path: Path | str) -> AdapterFile:
    """Return the adapter in a .safetensors file, in float32 or as stored, on the CPU.

    Raises FormatError, with one sentence that says what the file is, when it is no adapter that can be
    read, holds half a pair, tensors of unknown meaning, or non-finite numbers.
    """
    file = _existing(path)
    tensors, metadata = read_tensors(file)
    family = kohya.family_of({key: tuple(tensor.shape) for key, tensor in tensors.items()}, metadata)
    if not kohya.recognises(tensors):
        raise FormatError(f"{file}: {_describe_foreign(tensors)}")
    try:
        layers, unknown = kohya.read(tensors)
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from error
    if unknown:  # leaving them out would give another picture than the file's author saw
        raise FormatError(f"{file}: {_describe_unknown(unknown)}")
    if name := _first_non_finite(layers):
        raise FormatError(f"{file}: layer {name} holds NaN or infinity; the training that wrote it had failed")
    return AdapterFile(layers, family, metadata)


def adapter_family(path: Path | str) -> str:
    """Return the family of an adapter file, "" where it does not tell, from its header alone. Raises FormatError."""
    header = read_header(_existing(path))
    return kohya.family_of({key: entry.shape for key, entry in header.tensors.items()}, header.metadata)


def write_adapter(adapter: AdapterFile, path: Path | str, format: str = "kohya") -> None:
    """`path` holds the adapter in `format`; equal adapters give equal bytes.

    Raises ConfigError for an unknown format and FormatError for non-finite weights, leaving an earlier
    file at `path` as it was.
    """
    if format not in FORMATS:
        raise ConfigError(f"adapter format {format!r} is unknown; known: {', '.join(FORMATS)}")
    if name := _first_non_finite(adapter.layers):
        raise FormatError(f"{path}: layer {name} holds NaN or infinity; not written")
    tensors = kohya.write(adapter.layers, adapter.family)
    metadata = dict(adapter.metadata)
    metadata |= kohya.hashes(tensors)
    write_bytes(Path(path).expanduser(), serialize_tensors(tensors, metadata))


def _existing(path: Path | str) -> Path:
    file = Path(path).expanduser()
    if not file.exists():
        raise FormatError(f"{file}: there is no such adapter file")
    return file


def _first_non_finite(layers: Mapping[str, LoraLayer]) -> str:
    """Return the path of a layer that holds NaN or infinity, or ""."""
    for name, layer in layers.items():
        if not (layer.down.float().isfinite().all() and layer.up.float().isfinite().all()):
            return name
    return ""


def _describe_unknown(keys: Sequence[str]) -> str:
    if any(key.endswith("dora_scale") for key in keys):
        return "is a DoRA adapter, which this version does not read"
    if any(".hada_" in key or ".lokr_" in key for key in keys):
        return "is a LyCORIS adapter (LoHa or LoKr), which this version does not read"
    if any(key.startswith("bundle_emb.") for key in keys):
        return "carries a textual-inversion embedding besides the adapter, which this version does not read"
    return f"holds {len(keys)} tensors that this version does not understand, such as {keys[0]!r}"


def _describe_foreign(tensors: Mapping[str, torch.Tensor]) -> str:
    keys = sorted(tensors)
    if any(key.startswith(("model.diffusion_model.", "conditioner.", "first_stage_model.")) for key in keys):
        return "is a whole Stable Diffusion checkpoint, not an adapter; give it as --base"
    if any(".hada_" in key or ".lokr_" in key or "oft_" in key for key in keys):
        return "is a LyCORIS adapter (LoHa, LoKr or OFT), which this version does not read"
    if any("lora_A" in key or ".lora.down" in key for key in keys):
        return "is an adapter in diffusers or PEFT format, which this version does not read; convert it to kohya's"
    if set(keys) & {"emb_params", "clip_l", "clip_g"} or any(key.startswith("string_to_param") for key in keys):
        return "is a textual-inversion embedding, not an adapter"
    shown = f"such as {keys[0]!r}" if keys else "none"
    return f"holds no adapter ({len(keys)} tensors, {shown}); expected lora_down and lora_up pairs"

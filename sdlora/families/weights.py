"""Weights from files into models: whole or not at all, in little more memory than the models take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open

from sdlora.errors import ModelError
from sdlora.families.traits import UNET_PREFIX, VAE_PREFIX
from sdlora.storage import SafetensorsHeader, read_header

_TENSORS_AT_ONCE = 64
_TEXT_MODEL = "text_model."
# Folders that were made years ago call the layers of the VAE's attention by these names.
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Weights(Protocol):
    """Where the weights of a base's components are."""

    place: Path
    configs: Path
    """The diffusers folder that describes the components."""

    def without_place(self, part: str, model: Any) -> list[str]:
        """Return the stored weights of a component for which `model` has no place."""
        ...

    def tensors(self, part: str, model: Any) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the component's weights by their names in `model`, a few at a time."""
        ...


class FolderWeights:
    """The safetensors files of a diffusers folder, one component's after the other's."""

    def __init__(self, folder: Path, files: Mapping[str, Sequence[Path]]) -> None:
        self.place = self.configs = folder
        self._files = files

    def without_place(self, part: str, model: Any) -> list[str]:
        """Return the names in the files of the folder `part` that mean nothing to `model`."""
        wanted = model.state_dict().keys()
        return [name for file in self._files[part] for name in read_header(file).tensors if not _name_in(wanted, name)]

    def tensors(self, part: str, model: Any) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the weights of the folder `part`."""
        wanted = model.state_dict().keys()
        for file in self._files[part]:
            names = {target: name for name in read_header(file).tensors if (target := _name_in(wanted, name))}
            yield from _read(file, names)


class CheckpointWeights:
    """One file in the original layout (LDM, SGM) that holds all components."""

    def __init__(
        self, file: Path, header: SafetensorsHeader, configs: Path, encoder_prefixes: Mapping[str, str]
    ) -> None:
        self.place, self.configs = file, configs
        self._keys = list(header.tensors)
        self._encoder_prefixes = encoder_prefixes

    def without_place(self, part: str, model: Any) -> list[str]:
        """Return the UNet's keys that no weight of `model` comes from; encoders have some by nature, not told here."""
        if part != "unet":
            return []
        wanted = model.state_dict().keys()
        used = {key for target, key in self._unet_names(model).items() if target in wanted}
        return [key for key in self._keys if key.startswith(UNET_PREFIX) and key not in used]

    def tensors(self, part: str, model: Any) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the weights of one component under their names in the library."""
        if part == "unet":
            yield from _read(self.place, self._unet_names(model))
        elif part == "vae":
            yield convert_ldm_vae_checkpoint(self._all(VAE_PREFIX), dict(model.config))
        else:
            yield self._text_encoder(self._encoder_prefixes[part], model)

    def _unet_names(self, model: Any) -> dict[str, str]:
        keys = {key: key for key in self._keys if key.startswith(UNET_PREFIX)}
        try:
            names: dict[str, str] = convert_ldm_unet_checkpoint(keys, dict(model.config))  # it only renames
        except KeyError as error:
            raise ModelError(
                f"{self.place}: its unet lacks the weight {error.args[0]}; download or export it again"
            ) from error
        return names

    def _text_encoder(self, prefix: str, model: Any) -> dict[str, torch.Tensor]:
        stored = self._all(prefix)
        if any(".resblocks." in key for key in stored):
            converted = convert_open_clip_checkpoint(model, stored, prefix)
        else:
            converted = convert_ldm_clip_checkpoint(stored)
        wanted = model.state_dict().keys()
        return {target: tensor for name, tensor in converted.items() if (target := _name_in(wanted, name))}

    def _all(self, prefix: str) -> dict[str, torch.Tensor]:
        with safe_open(self.place, "pt") as opened:
            return {key: opened.get_tensor(key) for key in self._keys if key.startswith(prefix)}


def skeleton(kind: Any, weights: Weights, part: str) -> Any:
    """Return the component with its structure alone, its weights on the meta device."""
    with init_empty_weights():
        if hasattr(kind, "load_config"):  # diffusers
            return kind.from_config(kind.load_config(weights.configs / part))
        return kind(kind.config_class.from_pretrained(weights.configs / part))


def fill(
    model: Any,
    weights: Weights,
    part: str,
    device: torch.device,
    dtype: torch.dtype,
    after_some: Callable[[], object] = lambda: None,
) -> None:
    """Every weight of `model` is the file's, on the device; convolutions are in channels-last layout.

    `after_some` is called whenever some more weights are there. The libraries keep the mapped file beside the converted weights; for float32 files and a bf16 base that
    is three times the model. Here a few tensors are converted at a time and the file is mapped anew for
    the next. Raises ModelError for missing weights, which the libraries would fill with random numbers,
    and RuntimeError for weights of another shape.
    """
    missing = set(model.state_dict())
    for group in weights.tensors(part, model):
        wanted = {name: tensor for name, tensor in group.items() if name in missing}
        model.load_state_dict(
            {name: _placed(tensor, device, dtype) for name, tensor in wanted.items()}, strict=False, assign=True
        )
        missing -= wanted.keys()
        after_some()
    if missing:
        raise ModelError(
            f"{weights.place}: its {part} lacks {len(missing)} weights, such as {min(missing)}; "
            "download or export it again"
        )
    model.requires_grad_(False)


def _read(file: Path, names: Mapping[str, str]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield {name in the model: tensor}, a few at a time, of {name in the model: name in the file}."""
    items = list(names.items())
    for start in range(0, len(items), _TENSORS_AT_ONCE):
        with safe_open(file, "pt") as opened:
            group = {target: opened.get_tensor(name) for target, name in items[start : start + _TENSORS_AT_ONCE]}
        yield group


def _name_in(wanted: Iterable[str], name: str) -> str:
    """Return what the model calls a stored weight, "" where it has no such weight.

    CLIP text encoders were stored with the step "text_model.", which some classes have dropped since.
    """
    candidates = [name, name.removeprefix(_TEXT_MODEL), _TEXT_MODEL + name]
    path, _, kind = name.rpartition(".")
    block, _, layer = path.rpartition(".")
    if layer in _OLD_VAE_ATTENTION:
        candidates.append(f"{block}.{_OLD_VAE_ATTENTION[layer]}.{kind}")
    return next((candidate for candidate in candidates if candidate in wanted), "")


def _placed(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return a copy that does not share the file's memory."""
    layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
    return tensor.to(device, dtype, copy=True, memory_format=layout)

"""Weights from files into models: whole or not at all, in little more memory than the models take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from transformers.initialization import no_init_weights

from sdlora.errors import ModelError
from sdlora.families.detect import FIRST_LAYER
from sdlora.families.traits import TEXT_MODEL, UNET_PREFIX, VAE_PREFIX
from sdlora.headers import SafetensorsHeader, read_header

_TENSORS_AT_ONCE = 64
_MOST_ROWS = 1 << 32
# Folders that were made years ago call the layers of the VAE's attention by these names.
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Place(NamedTuple):
    """Where a weight lies: a tensor of a file, or some of its rows, and whether it lies there transposed."""

    file: Path
    key: str
    rows: tuple[int, int] | None = None
    """First row and the one after the last; None: all."""
    transposed: bool = False


class Tensors(Protocol):
    """Where the weights of a model are."""

    @property
    def place(self) -> Path:
        """The file or folder, for people."""
        ...

    def tensors(self, part: str, model: Any) -> Iterator[dict[str, torch.Tensor]]:
        """Yield a component's weights by their names in `model`, a few at a time."""
        ...


class Weights(Tensors, Protocol):
    """Where the weights of a base's components are."""

    configs: Path
    """The diffusers folder that describes the components."""

    def settings(self, part: str) -> dict[str, Any]:
        """Return what the weights themselves tell of how a component is built, whatever `configs` says."""
        ...

    def without_place(self, part: str, model: Any) -> list[str]:
        """Return the stored weights of a component for which `model` has no place."""
        ...

    def places(self, part: str, model: Any) -> dict[str, Place]:
        """Return where each weight of the UNet or of a text encoder lies, by its name in `model`."""
        ...


class FolderWeights:
    """The safetensors files of a diffusers folder, one component's after the other's."""

    def __init__(self, folder: Path, files: Mapping[str, Sequence[Path]]) -> None:
        self.place = self.configs = folder
        self._files = files

    def settings(self, part: str) -> dict[str, Any]:
        """Return nothing: a folder describes itself."""
        return {}

    def without_place(self, part: str, model: Any) -> list[str]:
        """Return the names in the files of the folder `part` that mean nothing to `model`."""
        wanted = model.state_dict().keys()
        return [name for file in self._files[part] for name in read_header(file).tensors if not _name_in(wanted, name)]

    def places(self, part: str, model: Any) -> dict[str, Place]:
        """Return where the weights of the folder `part` lie."""
        wanted = model.state_dict().keys()
        return {
            target: Place(file, name)
            for file in self._files[part]
            for name in read_header(file).tensors
            if (target := _name_in(wanted, name))
        }

    def tensors(self, part: str, model: Any) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the weights of the folder `part`."""
        yield from read_places(self.places(part, model))


class CheckpointWeights:
    """One file in the original layout (LDM, SGM) that holds all components."""

    def __init__(
        self, file: Path, header: SafetensorsHeader, configs: Path, encoder_prefixes: Mapping[str, str]
    ) -> None:
        self.place, self.configs = file, configs
        self._shapes = {key: entry.shape for key, entry in header.tensors.items()}
        self._encoder_prefixes = encoder_prefixes

    def settings(self, part: str) -> dict[str, Any]:
        """Return how many channels the UNet takes, by which inpainting ones differ."""
        return {"in_channels": self._shapes[FIRST_LAYER][1]} if part == "unet" and FIRST_LAYER in self._shapes else {}

    def without_place(self, part: str, model: Any) -> list[str]:
        """Return the UNet's keys that no weight of `model` comes from; encoders have some by nature, not told here."""
        if part != "unet":
            return []
        wanted = model.state_dict().keys()
        used = {place.key for target, place in self.places("unet", model).items() if target in wanted}
        return [key for key in self._shapes if key.startswith(UNET_PREFIX) and key not in used]

    def places(self, part: str, model: Any) -> dict[str, Place]:
        """Return where the weights of the UNet or a text encoder lie; OpenCLIP's are parts of larger ones."""
        if part == "unet":
            return {target: Place(self.place, key) for target, key in self._unet_names(model).items()}
        return self._text_encoder_places(self._encoder_prefixes[part], model)

    def tensors(self, part: str, model: Any) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the weights of one component under their names in the library."""
        if part == "vae":
            yield convert_ldm_vae_checkpoint(self._all(VAE_PREFIX), dict(model.config))
        else:
            yield from read_places(self.places(part, model))

    def _unet_names(self, model: Any) -> dict[str, str]:
        keys = {key: key for key in self._shapes if key.startswith(UNET_PREFIX)}
        try:
            names: dict[str, str] = convert_ldm_unet_checkpoint(keys, dict(model.config))  # it only renames
        except KeyError as error:
            raise ModelError(
                f"{self.place}: its unet lacks the weight {error.args[0]}; download or export it again"
            ) from error
        return names

    def _text_encoder_places(self, prefix: str, model: Any) -> dict[str, Place]:
        """Return where the library's conversion takes each weight from, by giving it numbered rows for tensors."""
        keys = [key for key in self._shapes if key.startswith(prefix)]
        probes = {key: _numbered_rows(number, self._shapes[key]) for number, key in enumerate(keys)}
        if any(".resblocks." in key for key in keys):
            converted = convert_open_clip_checkpoint(model, probes, prefix)
        else:
            converted = convert_ldm_clip_checkpoint(probes)
        wanted = model.state_dict().keys()
        return {
            target: self._place_of(probe, keys)
            for name, probe in converted.items()
            if (target := _name_in(wanted, name))
        }

    def _place_of(self, probe: torch.Tensor, keys: Sequence[str]) -> Place:
        number, first = divmod(int(probe.flatten()[0]), _MOST_ROWS)
        rows, shape = probe.numel(), self._shapes[keys[number]]
        whole = not shape or rows == shape[0]
        return Place(self.place, keys[number], None if whole else (first, first + rows), probe.shape[1:] > (1,))

    def _all(self, prefix: str) -> dict[str, torch.Tensor]:
        with safe_open(self.place, "pt") as opened:
            return {key: opened.get_tensor(key) for key in self._shapes if key.startswith(prefix)}


def read_place(opened: Any, place: Place) -> torch.Tensor:
    """Return a weight of a file that `safe_open` has opened."""
    tensor: torch.Tensor
    if place.rows is None:
        tensor = opened.get_tensor(place.key)
    else:
        tensor = opened.get_slice(place.key)[place.rows[0] : place.rows[1]]
    return tensor.T.contiguous() if place.transposed else tensor


def skeleton(kind: Any, weights: Weights, part: str) -> Any:
    """Return the component with its structure alone, its weights on the meta device."""
    with init_empty_weights(), no_init_weights():  # drawing numbers that the files replace takes as long as the rest
        if hasattr(kind, "load_config"):  # diffusers
            return kind.from_config({**kind.load_config(weights.configs / part), **weights.settings(part)})
        return kind(kind.config_class.from_pretrained(weights.configs / part))


def fill(
    model: Any,
    weights: Tensors,
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


def read_places(places: Mapping[str, Place]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield {name in the model: tensor}, a few at a time."""
    for file in dict.fromkeys(place.file for place in places.values()):
        items = [(target, place) for target, place in places.items() if place.file == file]
        for start in range(0, len(items), _TENSORS_AT_ONCE):
            with safe_open(file, "pt") as opened:
                group = {target: read_place(opened, place) for target, place in items[start : start + _TENSORS_AT_ONCE]}
            yield group


def _numbered_rows(number: int, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor of the first one or two sides of `shape` that says in each row which row of which tensor it is."""
    rows = torch.arange(shape[0] if shape else 1) + number * _MOST_ROWS
    return rows[:, None] if len(shape) > 1 else rows


def _name_in(wanted: Iterable[str], name: str) -> str:
    """Return what the model calls a stored weight, "" where it has no such weight.

    CLIP text encoders were stored with the step "text_model.", which some classes have dropped since.
    """
    candidates = [name, name.removeprefix(TEXT_MODEL), TEXT_MODEL + name]
    path, _, kind = name.rpartition(".")
    block, _, layer = path.rpartition(".")
    if layer in _OLD_VAE_ATTENTION:
        candidates.append(f"{block}.{_OLD_VAE_ATTENTION[layer]}.{kind}")
    return next((candidate for candidate in candidates if candidate in wanted), "")


def _placed(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return a copy that does not share the file's memory."""
    layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
    return tensor.to(device, dtype, copy=True, memory_format=layout)

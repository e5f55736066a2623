"""ControlNets in memory, beside the base whose UNet they steer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors import SafetensorError

from sdlora.errors import ModelError
from sdlora.families.base import LoadedBase
from sdlora.families.controls import ORIGINAL_PREFIX, ControlFacts, control_tensors, refuse_control_of_another_family
from sdlora.families.traits import LATENT_CHANNELS
from sdlora.families.weights import Place, fill, read_places
from sdlora.headers import read_header

_EMBEDDING = "controlnet_cond_embedding"
_ADDED_EMBEDDING = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
"""Of SDXL, which diffusers' conversion leaves out."""
_MUST_BE_ALIKE = ("block_out_channels", "layers_per_block", "cross_attention_dim", "down_block_types")
"""What a ControlNet and the UNet that it steers have in common."""


@dataclass(frozen=True)
class _Stored:
    place: Path
    names: Mapping[str, Place]
    """By the weight's name in diffusers."""

    def tensors(self, part: str, model: Any) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the weights, a few at a time."""
        yield from read_places(self.names)


def load_control(facts: ControlFacts, base: LoadedBase, device: torch.device) -> ControlNetModel:
    """Return the ControlNet on that device in the base's precision, frozen. A file's structure is that of the base's UNet.

    Raises ModelError where it is for another family or size of base, or its weights are not what they should be.
    """
    refuse_control_of_another_family(facts, base.family.traits, base.source.name)
    stored = {key: file for file in facts.files for key, _ in control_tensors(read_header(file).tensors)}
    try:
        if facts.path.is_dir():
            config = dict(ControlNetModel.load_config(facts.path))
            names = {key: Place(file, key) for key, file in stored.items()}
        else:
            config = _config_like(base)
            names = {name: Place(facts.path, key) for name, key in names_in_diffusers(list(stored), config).items()}
            config["conditioning_embedding_out_channels"] = _embedding_channels(facts.path, names)
        with init_empty_weights():
            net: ControlNetModel = ControlNetModel.from_config(config)
        _check_like(facts, net, base)
        fill(net, _Stored(facts.path, names), "ControlNet", device, base.dtype)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        detail = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:200]
        raise ModelError(
            f"{facts.path}: cannot be loaded as a ControlNet for {base.source.name} ({detail}); use one for this base, or "
            "download it again, as a folder with config.json where there is one"
        ) from error
    net.eval()
    return net.to(device)


def _config_like(base: LoadedBase) -> dict[str, Any]:
    """Return the configuration of a ControlNet that is a copy of the first half of the base's UNet."""
    known = inspect.signature(ControlNetModel.__init__).parameters.keys() & base.unet.config.keys()
    return {name: base.unet.config[name] for name in known} | {"in_channels": LATENT_CHANNELS}


def _check_like(facts: ControlFacts, net: ControlNetModel, base: LoadedBase) -> None:
    for name in _MUST_BE_ALIKE:
        own, wanted = (
            tuple(one) if isinstance(one, list) else one for one in (net.config[name], base.unet.config[name])
        )
        if own != wanted:
            raise ModelError(
                f"{facts.path}: is for another UNet than that of {base.source.name} ({name} is {own}, there it is {wanted}); choose "
                "a ControlNet that fits the base"
            )


def names_in_diffusers(keys: list[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Return {name in diffusers: key in the file}."""
    if any(key.startswith(_EMBEDDING) for key in keys):
        return {key: key for key in keys}
    plain = {key.removeprefix(ORIGINAL_PREFIX): key for key in keys}
    names = {name: key for name, key in convert_controlnet_checkpoint(plain, config).items() if key}  # it only renames
    for theirs, ours in _ADDED_EMBEDDING.items():
        names |= {f"{ours}.{kind}": plain[key] for kind in ("weight", "bias") if (key := f"{theirs}.{kind}") in plain}
    return names


def _embedding_channels(path: Path, names: Mapping[str, Place]) -> tuple[int, ...]:
    """Return the widths of the layers that read the map: the first one, and after each halving."""
    tensors = read_header(path).tensors
    widths = [tensors[names[f"{_EMBEDDING}.conv_in.weight"].key].shape[0]]
    number = 1
    while place := names.get(f"{_EMBEDDING}.blocks.{number}.weight"):
        widths.append(tensors[place.key].shape[0])
        number += 2
    return tuple(widths)

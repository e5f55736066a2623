"""Models of a diffusers folder, loaded whole or not at all, in little more memory than they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors import safe_open

from sdlora.errors import ModelError

_TENSORS_AT_ONCE = 64


def load_part(kind: Any, folder: Path, part: str, variant: str | None, **dtype: torch.dtype) -> Any:
    """Return one model of a diffusers folder, every weight of which was in its safetensors files.

    Raises ModelError for missing weights, and what the libraries raise for files that cannot be read.
    """
    model, found = kind.from_pretrained(
        folder, subfolder=part, variant=variant, use_safetensors=True, output_loading_info=True, **dtype
    )
    _refuse_missing(folder / part, found["missing_keys"])
    return model


def load_unet(folder: Path, variant: str | None, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """Return the UNet of a diffusers folder on the device, convolutions in channels-last layout.

    The libraries keep the mapped file beside the converted weights; for float32 files and a bf16 base that
    is three times the model. Here a few tensors are converted at a time and the file is mapped anew for
    the next. Weights in several files are left to the libraries. Raises as `load_part` does.
    """
    name = f"diffusion_pytorch_model.{variant}.safetensors" if variant else "diffusion_pytorch_model.safetensors"
    file = folder / "unet" / name
    if not file.is_file():
        return load_part(UNet2DConditionModel, folder, "unet", variant, torch_dtype=dtype)
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    with safe_open(file, "pt") as opened:
        stored = list(opened.keys())
    wanted = unet.state_dict().keys()
    _refuse_missing(folder / "unet", wanted - set(stored))
    names = [name for name in stored if name in wanted]
    for start in range(0, len(names), _TENSORS_AT_ONCE):
        with safe_open(file, "pt") as opened:
            read = {name: opened.get_tensor(name) for name in names[start : start + _TENSORS_AT_ONCE]}
        unet.load_state_dict(
            {name: _placed(tensor, device, dtype) for name, tensor in read.items()}, strict=False, assign=True
        )
    return unet


def _placed(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return a copy that does not share the file's memory."""
    layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
    return tensor.to(device, dtype, copy=True, memory_format=layout)


def _refuse_missing(where: Path, names: Any) -> None:
    """The libraries would fill missing weights with random numbers."""
    if missing := sorted(names):
        raise ModelError(f"{where}: lacks {len(missing)} weights, such as {missing[0]}; download or export it again")

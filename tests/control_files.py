"""Random ControlNets for the tiny bases, as folders and as files in the original layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ldm_layout
import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import save_file


def random_control(unet: Any, seed: int = 0) -> ControlNetModel:
    """Return a ControlNet for that UNet whose layers, those that begin at zero too, are random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(
            unet, load_weights_from_unet=False, conditioning_embedding_out_channels=(4, 8, 8, 16)
        )
        for name, parameter in net.named_parameters():
            if name.startswith(("controlnet_", "controlnet_cond_embedding.conv_out")):
                torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


def write_original(net: ControlNetModel, path: Path, prefix: str = "control_model.", **beside: torch.Tensor) -> str:
    """`path` holds the ControlNet by its first names; returns the path."""
    tensors = {prefix + original_name(name, net): tensor.clone() for name, tensor in net.state_dict().items()}
    save_file({**tensors, **beside}, path)
    return str(path)


def original_name(name: str, net: ControlNetModel) -> str:
    """Return what the original layout calls a weight."""
    part, _, kind = name.rpartition(".")
    embedding = "controlnet_cond_embedding."
    if part.startswith(embedding):
        inside = part.removeprefix(embedding)
        last = 2 * len(net.controlnet_cond_embedding.blocks) + 2
        number = {"conv_in": 0, "conv_out": last}.get(inside)
        return f"input_hint_block.{2 * int(inside.split('.')[1]) + 2 if number is None else number}.{kind}"
    if part.startswith("controlnet_down_blocks."):
        return f"zero_convs.{part.split('.')[1]}.0.{kind}"
    if part == "controlnet_mid_block":
        return f"middle_block_out.0.{kind}"
    return ldm_layout.unet_name(name, net.config.layers_per_block, net)


def draw_map(path: Path, seed: int = 0, size: tuple[int, int] = (64, 64)) -> str:
    """`path` is a colourful picture; returns the path."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).save(path)
    return str(path)

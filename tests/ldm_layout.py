"""Writes a diffusers pipeline in the layout of the original Stable Diffusion 1.x checkpoints.

Independent of diffusers' own conversion, which the tests check with it.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# The VAE's attention has one set of names in old diffusers folders and another in new ones.
_VAE_ATTENTION = {
    "group_norm": "norm",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def write_checkpoint(pipeline, path: Path) -> dict[str, torch.Tensor]:
    """`path` holds UNet, VAE and text encoder as one original checkpoint; returns its tensors."""
    layers = pipeline.unet.config.layers_per_block
    blocks = len(pipeline.vae.config.block_out_channels)
    tensors = {}
    for name, tensor in pipeline.unet.state_dict().items():
        tensors["model.diffusion_model." + unet_name(name, layers, pipeline.unet)] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        renamed = vae_name(name, blocks)
        one_by_one = ".attn_1." in renamed and ".norm." not in renamed and tensor.ndim == 2
        tensors["first_stage_model." + renamed] = tensor[..., None, None] if one_by_one else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    positions = torch.arange(77).unsqueeze(0)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = positions
    tensors["alphas_cumprod"] = pipeline.scheduler.alphas_cumprod
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, path)
    return tensors


def unet_name(name: str, layers: int, unet) -> str:
    """Return the original name of a UNet weight with `layers` resnets a block."""
    module, _, kind = name.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{kind}"
    side, *rest = name.split(".", 1)
    if side == "mid_block":
        part, index, inside = rest[0].split(".", 2)
        place = f"middle_block.{2 * int(index) if part == 'resnets' else 1}"
    else:
        block, part, index, inside = rest[0].split(".", 3)
        down = side == "down_blocks"
        first = (layers + 1) * int(block) + down
        attention = hasattr(unet.get_submodule(f"{side}.{block}"), "attentions")
        if part in ("resnets", "attentions"):
            place = f"{'input' if down else 'output'}_blocks.{first + int(index)}.{int(part == 'attentions')}"
        elif part == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{inside.removeprefix('conv.')}"
        else:
            return f"output_blocks.{first + layers}.{1 + attention}.{inside}"
    if part == "resnets":
        layer, _, kind = inside.rpartition(".")
        inside = f"{_RESNET[layer]}.{kind}"
    return f"{place}.{inside}"


def vae_name(name: str, blocks: int) -> str:
    """Return the original name of a VAE weight."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if match := re.search(r"mid_block\.attentions\.0\.(.+)\.(weight|bias)$", name):
        name = f"{name[: match.start()]}mid.attn_1.{_VAE_ATTENTION[match[1]]}.{match[2]}"
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")

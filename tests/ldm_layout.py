"""Writes a diffusers pipeline in the layout of the original Stable Diffusion checkpoints (1.x, 2.x, XL).

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
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
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


_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYERS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def write_checkpoint(
    pipeline, path: Path, *, metadata=None, markers=(), dtype=None, ema=False
) -> dict[str, torch.Tensor]:
    """`path` holds UNet, VAE and text encoders as one original checkpoint; returns its tensors.

    `markers` are empty tensors by those names; with `ema` averaged UNet weights (all zero) lie beside.
    """
    layers = pipeline.unet.config.layers_per_block
    blocks = len(pipeline.vae.config.block_out_channels)
    tensors = {}
    for name, tensor in pipeline.unet.state_dict().items():
        tensors["model.diffusion_model." + unet_name(name, layers, pipeline.unet)] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        renamed = vae_name(name, blocks)
        one_by_one = ".attn_1." in renamed and ".norm." not in renamed and tensor.ndim == 2
        tensors["first_stage_model." + renamed] = tensor[..., None, None] if one_by_one else tensor
    tensors |= _text_encoders(pipeline)
    if ema:
        unet = {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
        for name, tensor in unet.items():
            tensors["model_ema." + name.removeprefix("model.").replace(".", "")] = torch.zeros_like(tensor)
    tensors = {name: tensor.detach().to(dtype).contiguous().clone() for name, tensor in tensors.items()}
    tensors["alphas_cumprod"] = pipeline.scheduler.alphas_cumprod
    tensors |= {marker: torch.zeros(0) for marker in markers}
    save_file(tensors, path, metadata or {})
    return tensors


def _text_encoders(pipeline) -> dict[str, torch.Tensor]:
    if hasattr(pipeline, "text_encoder_2"):
        second = open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
        return clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.") | second
    if not pipeline.unet.config.use_linear_projection:
        return clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    tensors = open_clip(pipeline.text_encoder, "cond_stage_model.model.")
    # The original has one more layer, whose output SD 2.x does not use.
    last = pipeline.text_encoder.config.num_hidden_layers
    start = f"cond_stage_model.model.transformer.resblocks.{last - 1}."
    unused = {key.replace(f".{last - 1}.", f".{last}."): tensor for key, tensor in tensors.items() if start in key}
    return tensors | unused


def clip(encoder, prefix: str) -> dict[str, torch.Tensor]:
    """Return the weights of a text encoder by their names in transformers' first versions."""
    tensors = {f"{prefix}text_model.{_flat(name)}": tensor for name, tensor in encoder.state_dict().items()}
    tensors[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
    return tensors


def open_clip(encoder, prefix: str) -> dict[str, torch.Tensor]:
    """Return the weights of a text encoder by OpenCLIP's names: query, key and value in one matrix."""
    stored = {_flat(name): tensor for name, tensor in encoder.state_dict().items()}
    tensors = {theirs: stored[ours] for ours, theirs in _OPEN_CLIP.items()}
    for number in range(encoder.config.num_hidden_layers):
        ours, theirs = f"encoder.layers.{number}.", f"transformer.resblocks.{number}."
        for kind in ("weight", "bias"):
            parts = [stored[f"{ours}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            tensors[f"{theirs}attn.in_proj_{kind}"] = torch.cat(parts)
            for layer, name in _OPEN_CLIP_LAYERS.items():
                tensors[f"{theirs}{name}.{kind}"] = stored[f"{ours}{layer}.{kind}"]
    width = encoder.config.hidden_size
    projection = stored.get("text_projection.weight", torch.zeros(width, width))
    tensors |= {"text_projection": projection.T, "logit_scale": torch.tensor(4.6)}
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _flat(name: str) -> str:
    return name.removeprefix("text_model.")


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

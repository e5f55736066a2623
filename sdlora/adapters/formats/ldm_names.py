"""The UNet's modules by their names in the original (LDM) code, which SDXL adapters are keyed by.

Blocks are numbered through: with two resnets a block, input_blocks.(3i + j + 1) is resnet j of block i,
and the third of each three is the downsampler; output_blocks.(3i + j) likewise, with the upsampler behind
resnet and attention of the third.
"""

from __future__ import annotations

import re

_RESNETS_PER_BLOCK = 2
_STRIDE = _RESNETS_PER_BLOCK + 1
_RESNET_LAYERS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_OUR_RESNET_LAYERS = {theirs: ours for ours, theirs in _RESNET_LAYERS.items()}
_OUR_ENDS = {theirs: ours for ours, theirs in _ENDS.items()}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_LDM_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)")
_LDM_MIDDLE = re.compile(r"middle_block\.([012])\.(.+)")


def to_ldm(path: str) -> str:
    """Return the original name of a UNet module's path in diffusers, "" where it has none."""
    if path in _ENDS:
        return _ENDS[path]
    if match := _MIDDLE.fullmatch(path):
        kind, number, inside = match.groups()
        resnet = kind == "resnets"
        return f"middle_block.{2 * int(number) if resnet else 1}.{_resnet_layer(inside) if resnet else inside}"
    match = _BLOCK.fullmatch(path)
    if not match:
        return ""
    side, block, kind, number, inside = match.groups()
    first = _STRIDE * int(block) + (side == "down")
    if kind == "downsamplers":
        return f"input_blocks.{first + _RESNETS_PER_BLOCK}.0.op"
    if kind == "upsamplers":  # behind the attention, which every SDXL block with an upsampler has
        return f"output_blocks.{first + _RESNETS_PER_BLOCK}.2.conv"
    place = f"{'input' if side == 'down' else 'output'}_blocks.{first + int(number)}"
    return f"{place}.0.{_resnet_layer(inside)}" if kind == "resnets" else f"{place}.1.{inside}"


def from_ldm(name: str) -> str:
    """Return the path in diffusers of a UNet module's original name, "" where there is none: inverse of `to_ldm`."""
    if name in _OUR_ENDS:
        return _OUR_ENDS[name]
    if match := _LDM_MIDDLE.fullmatch(name):
        number, inside = int(match[1]), match[2]
        return (
            f"mid_block.attentions.0.{inside}" if number == 1 else _resnet(f"mid_block.resnets.{number // 2}", inside)
        )
    match = _LDM_BLOCK.fullmatch(name)
    if not match:
        return ""
    down = match[1] == "input"
    block, layer = divmod(int(match[2]) - down, _STRIDE)
    index, inside = int(match[3]), match[4]
    side = f"{'down' if down else 'up'}_blocks.{block}"
    if down and layer == _RESNETS_PER_BLOCK:
        return f"{side}.downsamplers.0.conv" if (index, inside) == (0, "op") else ""
    if inside == "conv":
        return f"{side}.upsamplers.0.conv" if not down and layer == _RESNETS_PER_BLOCK else ""
    return f"{side}.attentions.{layer}.{inside}" if index == 1 else _resnet(f"{side}.resnets.{layer}", inside)


def _resnet_layer(inside: str) -> str:
    return _RESNET_LAYERS.get(inside, inside)


def _resnet(path: str, inside: str) -> str:
    return f"{path}.{_OUR_RESNET_LAYERS[inside]}" if inside in _OUR_RESNET_LAYERS else ""

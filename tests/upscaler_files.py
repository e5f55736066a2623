"""Upscalers with random weights, in the layouts of files that people have."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from sdlora.storage import serialize_tensors


def rrdb_tensors(
    scale: int = 4, blocks: int = 23, features: int = 64, growth: int = 32, channels: int = 3, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return random weights under the names of Real-ESRGAN's files; small, so that nothing overflows."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def conv(name: str, inside: int, out: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(out, inside, 3, 3, generator=generator) * (1.2 / (9 * inside) ** 0.5)
        tensors[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.02 + (0.5 if name == "conv_last" else 0)

    conv("conv_first", channels, features)
    for block in range(blocks):
        for dense in (1, 2, 3):
            for layer in range(1, 6):
                out = features if layer == 5 else growth
                conv(f"body.{block}.rdb{dense}.conv{layer}", features + (layer - 1) * growth, out)
    conv("conv_body", features, features)
    for number in range(1, {1: 0, 2: 1, 4: 2, 8: 3}[scale * {3: 1, 12: 2, 48: 4}[channels]] + 1):
        conv(f"conv_up{number}", features, features)
    conv("conv_hr", features, features)
    conv("conv_last", features, 3)
    return tensors


def compact_tensors(scale: int = 4, layers: int = 32, features: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights under the names of Real-ESRGAN's compact files, such as realesr-general-x4v3."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    sides = [3, *[features] * (layers + 1), 3 * scale**2]
    for number, (inside, out) in enumerate(itertools.pairwise(sides)):
        name = f"body.{2 * number}"
        tensors[f"{name}.weight"] = torch.randn(out, inside, 3, 3, generator=generator) * (1.2 / (9 * inside) ** 0.5)
        tensors[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.02
        if number <= layers:
            tensors[f"body.{2 * number + 1}.weight"] = torch.rand(features, generator=generator) * 0.5
    return tensors


def write_upscaler(path: Path, **shape: int) -> Path:
    path.write_bytes(serialize_tensors(rrdb_tensors(**shape), {}))
    return path


def first_layout(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same network under the numbers of ESRGAN's own first files."""
    blocks = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("body."))
    ups = sum(key.startswith("conv_up") for key in tensors) // 2
    names = {"conv_first": "model.0", "conv_body": f"model.1.sub.{blocks}"}
    names |= {f"conv_up{number}": f"model.{3 * number}" for number in range(1, ups + 1)}
    names |= {"conv_hr": f"model.{3 * ups + 2}", "conv_last": f"model.{3 * ups + 4}"}
    renamed = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.rpartition(".")
        if layer.startswith("body."):
            _, block, dense, conv = layer.split(".")
            renamed[f"model.1.sub.{block}.{dense.upper()}.{conv}.0.{kind}"] = tensor
        else:
            renamed[f"{names[layer]}.{kind}"] = tensor
    return renamed


def later_layout(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same network under the names of ESRGAN's later files and BSRGAN's."""
    names = {"conv_body": "trunk_conv", "conv_hr": "HRconv"}
    names |= {f"conv_up{number}": f"upconv{number}" for number in (1, 2, 3)}
    renamed = {}
    for key, tensor in tensors.items():
        layer, _, rest = key.partition(".")
        if layer == "body":
            renamed[f"RRDB_trunk.{rest.replace('rdb', 'RDB')}"] = tensor
        else:
            renamed[f"{names.get(layer, layer)}.{rest}"] = tensor
    return renamed

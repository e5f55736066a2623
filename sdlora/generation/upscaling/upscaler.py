"""Networks of ESRGAN's kind, from a file that the user has: a picture 1 to 8 times larger, with detail made up."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from sdlora.errors import FormatError, GenerationError
from sdlora.headers import read_header
from sdlora.storage import read_tensors

_SLOPE = 0.2
"""Of the leaky ReLU behind convolutions; residuals are scaled by as much (Wang et al. 2018, ESRGAN, sec. 3.1)."""
_TILE = 384
_OVERLAP = 24
"""In pixels of what is enlarged; a tile's outer `_OVERLAP` pixels on inner sides are not used."""
_PREFIXES = ("params_ema.", "params.", "module.")
_OLD_BLOCK = re.compile(r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.(weight|bias)$")
_OLD_TRUNK = re.compile(r"model\.1\.sub\.\d+\.(weight|bias)$")
_OLD_OTHER = re.compile(r"model\.(\d+)\.(weight|bias)$")
_EXPECTED = "expected the .safetensors file of an ESRGAN or Real-ESRGAN network (RRDBNet)"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Plan:
    """What a file's network is like."""

    scale: int
    blocks: int
    features: int
    growth: int
    unshuffle: int
    """So many pixels each way become channels before the first layer."""


class Rrdb(nn.Module):
    """A network of residual-in-residual dense blocks, [B,3,H,W] in [0,1] to [B,3,s*H,s*W] (Wang et al. 2018, fig. 4)."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        wide = plan.features
        self.conv_first = _conv(3 * plan.unshuffle**2, wide)
        self.body = nn.Sequential(*(_Block(plan) for _ in range(plan.blocks)))
        self.conv_body = _conv(wide, wide)
        doublings = (plan.scale * plan.unshuffle).bit_length() - 1
        self.conv_up = nn.ModuleList(_conv(wide, wide) for _ in range(doublings))
        self.conv_hr = _conv(wide, wide)
        self.conv_last = _conv(wide, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the pixels enlarged."""
        if self.plan.unshuffle > 1:
            pixels = functional.pixel_unshuffle(pixels, self.plan.unshuffle)
        features = self.conv_first(pixels)
        features = features + self.conv_body(self.body(features))
        for layer in self.conv_up:
            features = _active(layer(functional.interpolate(features, scale_factor=2, mode="nearest")))
        result: torch.Tensor = self.conv_last(_active(self.conv_hr(features)))
        return result


class _Block(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (_Dense(plan.features, plan.growth) for _ in range(3))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + _SLOPE * self.rdb3(self.rdb2(self.rdb1(features)))


class _Dense(nn.Module):
    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (_conv(features + n * growth, growth) for n in range(4))
        self.conv5 = _conv(features + 4 * growth, features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        known = features
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            known = torch.cat([known, _active(layer(known))], dim=1)
        return features + _SLOPE * self.conv5(known)


def check_upscaler(path: Path) -> Plan:
    """Return what the network in the file is like, by its header alone. Raises FormatError where it is none that is known."""
    shapes = read_header(path).layout.shapes
    return _plan(path, {ours: shapes[theirs] for theirs, ours in _names(path, shapes).items()})


def read_upscaler(path: Path) -> Rrdb:
    """Return the network of a file, in float32 on the CPU. Raises FormatError as `check_upscaler` does."""
    try:
        state = path.stat()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); {_EXPECTED}") from error
    return _read(path, state.st_mtime_ns, state.st_size)


def upscale(
    network: Rrdb, picture: Image.Image, device: torch.device, on_tile: Callable[[int, int], None] | None = None
) -> Image.Image:
    """Return the picture `network.plan.scale` times larger, computed in tiles; `on_tile` hears (tiles done, tiles).

    Raises GenerationError where the network gives NaN or a tile does not fit into the memory.
    """
    scale, pixels = network.plan.scale, torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
    height, width = pixels.shape[-2:]
    result = np.empty((height * scale, width * scale, 3), np.uint8)
    tiles = list(_tiles(width, height))
    network.to(device)
    try:
        for number, ((left, top, right, bottom), (x, y, x2, y2)) in enumerate(tiles, start=1):
            made = _enlarged(network, pixels[..., top:bottom, left:right].to(device).float() / 255)
            inner = made[:, (y - top) * scale : (y2 - top) * scale, (x - left) * scale : (x2 - left) * scale]
            result[y * scale : y2 * scale, x * scale : x2 * scale] = _bytes(inner)
            if on_tile:
                on_tile(number, len(tiles))
    finally:
        network.to("cpu")
    return Image.fromarray(result)


def _enlarged(network: Rrdb, tile: torch.Tensor) -> torch.Tensor:
    """Return [3,s*h,s*w] of one tile [1,3,h,w], whose sides are filled up to what the network takes."""
    height, width = tile.shape[-2:]
    step = network.plan.unshuffle
    padded = functional.pad(tile, (0, -width % step, 0, -height % step), mode="replicate")
    try:
        with torch.no_grad(), torch.autocast(tile.device.type, enabled=False):
            made = network(padded)[0]
    except torch.OutOfMemoryError as error:
        raise GenerationError("the GPU's memory is too small for the upscaler; use --device cpu") from error
    if not made.isfinite().all():
        raise GenerationError("the upscaler gave NaN; its file may be damaged, download it again")
    scale = network.plan.scale
    return made[:, : height * scale, : width * scale].clamp(0, 1)


def _bytes(pixels: torch.Tensor) -> np.ndarray:
    return (pixels * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()


_Box = tuple[int, int, int, int]


def _tiles(width: int, height: int) -> Iterator[tuple[_Box, _Box]]:
    """Yield (what is shown, what of it is used), each (left, top, right, bottom); the used boxes cover all, once."""
    step = _TILE - 2 * _OVERLAP
    for y in range(0, height, step):
        for x in range(0, width, step):
            x2, y2 = min(x + step, width), min(y + step, height)
            shown = (max(0, x - _OVERLAP), max(0, y - _OVERLAP), min(x2 + _OVERLAP, width), min(y2 + _OVERLAP, height))
            yield shown, (x, y, x2, y2)


@lru_cache(maxsize=1)
def _read(path: Path, changed_ns: int, length: int) -> Rrdb:
    plan = check_upscaler(path)
    tensors, _ = read_tensors(path)
    network = Rrdb(plan).requires_grad_(False).eval()
    network.load_state_dict({ours: tensors[theirs].float() for theirs, ours in _names(path, tensors).items()})
    return network


def _names(path: Path, keys: Mapping[str, object]) -> dict[str, str]:
    """Return {the file's key: our name}, of ESRGAN's first layout too. Raises FormatError where the keys are others."""
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}conv_first.weight" in keys), "")
    if f"{prefix}conv_first.weight" in keys:
        return {key: re.sub(r"^conv_up(\d)\.", _up_name, key.removeprefix(prefix)) for key in keys}
    if "model.0.weight" not in keys or not any(_OLD_BLOCK.match(key) for key in keys):
        raise FormatError(f"{path}: is no upscaler that is known; {_EXPECTED}")
    numbers = sorted({int(match[1]) for key in keys if (match := _OLD_OTHER.match(key))})
    if len(numbers) < 3:
        raise FormatError(f"{path}: is no upscaler that is known; {_EXPECTED}")
    last, before_last = numbers[-1], numbers[-2]
    doublings = [number for number in numbers if 0 < number < before_last]
    places = {0: "conv_first", before_last: "conv_hr", last: "conv_last"}
    places |= {number: f"conv_up.{place}" for place, number in enumerate(doublings)}
    return {key: _name_from_first_layout(key, places) for key in keys}


def _up_name(match: re.Match[str]) -> str:
    return f"conv_up.{int(match[1]) - 1}."


def _name_from_first_layout(key: str, places: Mapping[int, str]) -> str:
    """Return our name of a key in the layout of ESRGAN's own first files, where layers are numbered."""
    if match := _OLD_BLOCK.match(key):
        return f"body.{match[1]}.rdb{match[2]}.conv{match[3]}.{match[4]}"
    if match := _OLD_TRUNK.match(key):
        return f"conv_body.{match[1]}"
    match = _OLD_OTHER.match(key)
    return f"{places[int(match[1])]}.{match[2]}" if match else key


def _plan(path: Path, shapes: Shapes) -> Plan:
    """Return what a network of these weights, by our names, is like. Raises FormatError where it would not be one."""
    try:
        features, inside = shapes["conv_first.weight"][:2]
        growth = shapes["body.0.rdb1.conv1.weight"][0]
    except (LookupError, ValueError) as error:
        raise FormatError(f"{path}: is no upscaler that is known; {_EXPECTED}") from error
    blocks = len({key.split(".")[1] for key in shapes if key.startswith("body.")})
    doublings = len({key.split(".")[1] for key in shapes if key.startswith("conv_up.")})
    unshuffle = {3: 1, 12: 2, 48: 4}.get(inside, 0)
    if not unshuffle or 2**doublings % unshuffle or doublings > 3:
        raise FormatError(
            f"{path}: takes {inside} channels and doubles {doublings} times, which is not known; {_EXPECTED}"
        )
    plan = Plan(2**doublings // unshuffle, blocks, features, growth, unshuffle)
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in Rrdb(plan).state_dict().items()}
    if wrong := sorted(expected.keys() ^ shapes.keys()) or sorted(k for k in shapes if tuple(shapes[k]) != expected[k]):
        raise FormatError(f"{path}: differs from a network of its kind at {wrong[0]!r}; {_EXPECTED}")
    return plan


def _conv(inside: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(inside, out, 3, padding=1)


def _active(features: torch.Tensor) -> torch.Tensor:
    return functional.leaky_relu(features, _SLOPE)

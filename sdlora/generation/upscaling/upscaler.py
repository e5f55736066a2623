"""A picture made larger by a network, in tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from sdlora.errors import GenerationError
from sdlora.generation.upscaling.networks import Network

_TILE = 384
_OVERLAP = 24
"""In pixels of what is enlarged; a tile's outer `_OVERLAP` pixels on inner sides are not used."""


def upscale(
    network: Network, picture: Image.Image, device: torch.device, on_tile: Callable[[int, int], None] | None = None
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


def _enlarged(network: Network, tile: torch.Tensor) -> torch.Tensor:
    """Return [3,s*h,s*w] of one tile [1,3,h,w], whose sides are filled up to what the network takes."""
    height, width = tile.shape[-2:]
    step = network.plan.step
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

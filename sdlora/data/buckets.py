"""Aspect-ratio buckets: every picture gets about the same area, and little of it is cropped away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from sdlora.families.base import PictureSize

Bucket = tuple[int, int]
"""Width and height in pixels."""


def bucket_step(resolution: int) -> int:
    """Return the step between bucket sides in pixels: 64, or an eighth of a small resolution."""
    return max(8, min(64, resolution // 8 // 8 * 8))


def make_buckets(resolution: int) -> list[Bucket]:
    """Return the square and, for each width from half to double, the height that keeps the area.

    Sides are multiples of `bucket_step`; this is the widespread list of kohya's trainer.
    """
    step = bucket_step(resolution)
    area = resolution * resolution
    low, high = resolution // 2, resolution * 2
    buckets = {(resolution, resolution)}
    for width in range(low // step * step, high + 1, step):
        height = min(high, area // width // step * step) if width else 0
        if height >= low // step * step > 0:
            buckets |= {(width, height), (height, width)}
    return sorted(buckets)


def choose_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """Return the bucket whose aspect ratio is nearest, on a logarithmic scale."""
    ratio = np.log(width / height)
    return min(buckets, key=lambda bucket: (abs(np.log(bucket[0] / bucket[1]) - ratio), bucket))


@dataclass(frozen=True)
class FittedPicture:
    """Pixels [3,H,W] float32 in [-1,1] that fill a bucket, and how they were cut."""

    pixels: torch.Tensor
    size: PictureSize


def fit_picture(picture: Image.Image, bucket: Bucket) -> FittedPicture:
    """Return the picture scaled to cover the bucket and cropped around its centre."""
    width, height = bucket
    scale = max(width / picture.width, height / picture.height)
    scaled = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    # Only what is kept is scaled: of a long thin picture the rest could fill the memory.
    across, down = picture.width / scaled[0], picture.height / scaled[1]
    right, bottom = min(picture.width, (left + width) * across), min(picture.height, (top + height) * down)
    kept = (left * across, top * down, right, bottom)
    cropped = picture.resize(bucket, Image.Resampling.LANCZOS, box=kept)
    pixels = torch.from_numpy(np.asarray(cropped, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    size = PictureSize((picture.height, picture.width), (top, left), (height, width))
    return FittedPicture(pixels.contiguous(), size)

"""Painting a part of a picture anew: what the model is shown of it, and how the result goes back into place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

from sdlora.errors import DataError
from sdlora.generation.img2img.source import Source, fitted

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""
_HALF = 128


@dataclass(frozen=True)
class Canvas:
    """What a picture is made from, in the size that the model works at."""

    picture: Image.Image
    """What is under the mask may have been replaced already."""
    mask: Image.Image | None = None
    """Mode "L", blurred; 128 and more is painted anew."""
    around: Image.Image | None = None
    """The picture that the result goes back into."""
    paste_mask: Image.Image | None = None
    """How much of each of its pixels is replaced, mode "L"."""
    box: Box | None = None
    """Where in it the canvas lies."""

    def finished(self, made: Image.Image) -> Image.Image:
        """Return the picture with what was made under the mask; where the blurred mask is 0 each pixel is as it was."""
        if self.around is None or self.paste_mask is None or self.box is None:
            return made
        left, top, right, bottom = self.box
        patch = made
        if made.size != (right - left, bottom - top):
            patch = made.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        whole = self.around.copy()
        whole.paste(patch, (left, top))
        return Image.composite(whole, self.around, self.paste_mask)


def canvas_of(source: Source, size: tuple[int, int]) -> Canvas:
    """Return what is shown of the source to a model that works at that size.

    Raises DataError where the mask's blur or the resizing leaves nothing of it to paint.
    """
    request, mask = source.request, source.mask
    if mask is None:
        return Canvas(fitted(source.picture, size, request.resize))
    if request.inpaint_area == "only masked":
        soft = blurred(mask, request.mask_blur)
        box = masked_box(soft, request.masked_padding, size)
        around, box_mask = source.picture, soft.crop(box).resize(size, Image.Resampling.BILINEAR)
        shown = around.crop(box).resize(size, Image.Resampling.LANCZOS)
    else:
        shown = around = fitted(source.picture, size, request.resize)
        hard = fitted(mask, size, request.resize).point([255 if value >= _HALF else 0 for value in range(256)])
        soft = box_mask = blurred(hard, request.mask_blur)
        box = (0, 0, *size)
    if request.masked_content == "fill":
        shown = filled(shown, box_mask)
    if np.asarray(box_mask).max() < _HALF:
        raise DataError(
            f"{request.mask}: what is white in it is too small for a mask_blur of {request.mask_blur:g}, or cut off by the "
            "resizing, so nothing would be painted anew; choose a smaller mask_blur or paint it larger"
        )
    # Twice as steep, so that what was painted anew in full is also shown in full, and the border is blended outside it.
    return Canvas(shown, box_mask, around, soft.point([min(255, 2 * value) for value in range(256)]), box)


def blurred(mask: Image.Image, radius: float) -> Image.Image:
    """Return the mask with a Gaussian border of that standard deviation in pixels."""
    return mask.filter(ImageFilter.GaussianBlur(radius)) if radius else mask


def masked_box(mask: Image.Image, padding: int, size: tuple[int, int]) -> Box:
    """Return the box around what is not 0, with `padding` on each side, widened to the shape of `size` where there is room."""
    found = mask.getbbox()
    assert found is not None  # a mask without white is refused when it is read
    left, right = max(0, found[0] - padding), min(mask.width, found[2] + padding)
    top, bottom = max(0, found[1] - padding), min(mask.height, found[3] + padding)
    width, height = right - left, bottom - top
    if width * size[1] < height * size[0]:
        left, right = _grown(left, right, -(-height * size[0] // size[1]), mask.width)
    else:
        top, bottom = _grown(top, bottom, -(-width * size[1] // size[0]), mask.height)
    return left, top, right, bottom


def latent_mask(mask: Image.Image, factor: int) -> torch.Tensor:
    """Return [1,1,h,w] float32: 1 for each latent of `factor` x `factor` pixels of which any is painted anew, else 0."""
    return max_pool2d(covered(mask).float(), factor)


def covered(mask: Image.Image) -> torch.Tensor:
    """Return [1,1,H,W] bool: which pixels are painted anew."""
    return torch.from_numpy(np.array(mask))[None, None] >= _HALF


def filled(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Return the picture with the colours from around the mask spread under it, the nearest ones most.

    By means over 2 x 2 pixels of what is known, from level to level (Gortler et al. 1996, push and pull).
    """
    known = 1 - torch.from_numpy(np.array(mask))[None, None].float() / 255
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    made = _pulled(pixels * known, known)[0].permute(1, 2, 0).round().clamp(0, 255)
    return Image.fromarray(made.to(torch.uint8).numpy())


def _pulled(sums: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Return colours [1,3,h,w] of those times how far they are known, [1,1,h,w]."""
    if max(known.shape[-2:]) == 1:
        return torch.where(known > 0, sums / known.clamp(min=1e-6), 127.5)
    mean, share = avg_pool2d(sums, 2, ceil_mode=True), avg_pool2d(known, 2, ceil_mode=True)
    surer = (4 * share).clamp(max=1)  # one known pixel of four is enough to go by
    coarse = _pulled(mean / share.clamp(min=1e-6) * surer, surer)
    return sums + (1 - known) * interpolate(coarse, known.shape[-2:], mode="bilinear")


def _grown(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """Return the span as long as `length` where that is longer, about its middle as far as it lies within 0 and `limit`."""
    length = min(max(length, end - start), limit)
    start = min(max((start + end - length) // 2, 0), limit - length)
    return start, start + length

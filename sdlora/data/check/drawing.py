"""Draws a picture as the model will see it: whole and upright, what is cropped away dimmed, what is not learnt tinted."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageChops, ImageDraw

from sdlora.data.check.picture import Picture
from sdlora.data.pictures import read_mask, read_picture_and_opacity
from sdlora.errors import DataError
from sdlora.families.base import PictureSize

_THREADS = min(8, os.cpu_count() or 1)
_DIMMED = (24, 24, 27)
_DIMMED_SHARE = 0.72
_TINT = (255, 0, 144)
_TINT_SHARE = 0.55
_LINE_INSIDE, _LINE_OUTSIDE = "white", "black"
_MISSING = (113, 113, 122)

Result = TypeVar("Result")


def draw_all(pictures: Iterable[Picture], side: int, finish: Callable[[Image.Image], Result]) -> Iterator[Result]:
    """Yield `finish` of each drawing in order, drawn in threads, few at a time."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for picture in pictures:
            try:
                source: Path | io.BytesIO | None = picture.sample.source()  # rows of a table come in their order
            except DataError:
                source = None
            waiting.append(pool.submit(lambda picture, source: finish(draw(picture, side, source)), picture, source))
            if len(waiting) > 4 * _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def draw(picture: Picture, side: int, source: Path | io.BytesIO | None) -> Image.Image:
    """Return the picture, its longer side `side` pixels, with all that becomes of it; a crossed square if it cannot be read."""
    header = picture.look.header
    if header is None or source is None or picture.bucket is None:
        return _crossed(side)
    scale = side / max(header.size)
    size = (max(1, round(header.width * scale)), max(1, round(header.height * scale)))
    settings = picture.sample.concept.settings
    try:
        whole, opacity = read_picture_and_opacity(
            source, picture.sample.path, background=settings.background, at_least=size
        )
        drawn = whole.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        mask = opacity if settings.masks.source == "alpha" else None
        if picture.sample.mask is not None and not picture.look.mask_problem:
            mask = read_mask(picture.sample.mask, header, picture.sample.path)
    except DataError:
        return _crossed(side)
    if mask is not None:
        tint = ImageChops.invert(mask.resize(size, Image.Resampling.BILINEAR)).point(lambda grey: grey * _TINT_SHARE)
        drawn.paste(_TINT, (0, 0), tint)
    _frame(drawn, [_box(cut, size) for cut in picture.cuts])
    return drawn


def _box(cut: PictureSize, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the crop in a drawing of `size`."""
    (height, width), (top, left) = cut.target, cut.crop_top_left
    covering = max(width / cut.original[1], height / cut.original[0])
    across, down = size[0] / (cut.original[1] * covering), size[1] / (cut.original[0] * covering)
    right, bottom = round((left + width) * across), round((top + height) * down)
    return round(left * across), round(top * down), min(size[0], right), min(size[1], bottom)


def _frame(drawn: Image.Image, boxes: list[tuple[int, int, int, int]]) -> None:
    """What lies in none of the boxes is dimmed, and each box has a frame."""
    dimmed = Image.new("L", drawn.size, round(255 * _DIMMED_SHARE))
    for box in boxes:
        dimmed.paste(0, box)
    drawn.paste(_DIMMED, (0, 0), dimmed)
    pen = ImageDraw.Draw(drawn)
    for left, top, right, bottom in boxes:
        pen.rectangle((left, top, right - 1, bottom - 1), outline=_LINE_OUTSIDE)
        if right - left > 4 and bottom - top > 4:
            pen.rectangle((left + 1, top + 1, right - 2, bottom - 2), outline=_LINE_INSIDE)


def _crossed(side: int) -> Image.Image:
    drawn = Image.new("RGB", (side, side), _MISSING)
    pen = ImageDraw.Draw(drawn)
    pen.line((0, 0, side, side), fill="white", width=3)
    pen.line((0, side, side, 0), fill="white", width=3)
    return drawn

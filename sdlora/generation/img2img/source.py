"""The pictures that a request starts from: read whole before anything is made, brought to the size that is worked at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG

import numpy as np
from PIL import Image

from sdlora.data.pictures import read_header, read_mask, read_picture
from sdlora.errors import ConfigError, DataError
from sdlora.generation.recipe import UsedMask, UsedPicture, UsedStart
from sdlora.generation.request import GenerationRequest, ResizeMode
from sdlora.storage import sha256_while_unchanged, user_path

MAX_SIDE = 4096
_STEP = 8
"""Sides are multiples of it, in pixels."""


@dataclass(frozen=True)
class Source:
    """The picture that a request starts from, and its mask where it has one; pixels are decoded when needed."""

    request: GenerationRequest
    size: tuple[int, int]
    """Width and height in pixels, upright."""
    used: UsedStart

    @property
    def picture(self) -> Image.Image:
        """The picture, upright, mode "RGB"; shared, not to be written to."""
        return upright_picture(self.request.image)

    @property
    def mask(self) -> Image.Image | None:
        """The mask in the picture's size, mode "L", 255 where it is painted anew, else 0."""
        request = self.request
        return _mask(*_state(request.mask), *_state(request.image)) if request.mask else None


def read_source(request: GenerationRequest) -> Source | None:
    """Return what the request starts from, None where that is noise.

    Raises DataError for a picture or mask that cannot be read or do not go together, ConfigError for a picture too
    large to be worked at.
    """
    if not request.image:
        return None
    picture = _state(request.image)
    source = Source(request, _size(*picture), _used(request))
    _check_size(request, source.size)
    _check_pixels(picture, (_state(request.mask), request.mask) if request.mask else None)
    return source


def work_size(request: GenerationRequest, own: tuple[int, int] | None, resolution: int) -> tuple[int, int]:
    """Return the width and height that the model works at.

    `own` is the size of the picture that a request starts from: what is not given follows it, but for "only masked".
    """
    width, height = request.width, request.height
    if own is None or request.inpaint_area == "only masked":
        return width or resolution, height or resolution
    if width and not height:
        return width, _multiple(own[1] * width / own[0])
    if height and not width:
        return _multiple(own[0] * height / own[1]), height
    return width or _multiple(own[0]), height or _multiple(own[1])


def fitted(picture: Image.Image, size: tuple[int, int], mode: ResizeMode) -> Image.Image:
    """Return the picture in that size, scaled by Lanczos' filter as `mode` says."""
    if mode == "just resize":
        return picture.resize(size, Image.Resampling.LANCZOS)
    scales = size[0] / picture.width, size[1] / picture.height
    scale = max(scales) if mode == "crop and resize" else min(scales)
    scaled_size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    scaled = picture.resize(scaled_size, Image.Resampling.LANCZOS)
    left, top = (size[0] - scaled.width) // 2, (size[1] - scaled.height) // 2
    if mode == "crop and resize":
        return scaled.crop((-left, -top, -left + size[0], -top + size[1]))
    margins = ((top, size[1] - scaled.height - top), (left, size[0] - scaled.width - left))
    pixels = np.asarray(scaled)
    return Image.fromarray(np.pad(pixels, (*margins, *[(0, 0)] * (pixels.ndim - 2)), mode="edge"))


def _multiple(side: float) -> int:
    return max(_STEP, int(side) // _STEP * _STEP)


def _check_size(request: GenerationRequest, own: tuple[int, int]) -> None:
    size = work_size(request, own, _STEP)
    if max(size) > MAX_SIDE:
        raise ConfigError(
            f"{request.image}: would be worked at in {size[0]}x{size[1]} pixels, at most {MAX_SIDE} a side are possible; "
            "give a smaller width and height"
        )


def _used(request: GenerationRequest) -> UsedStart:
    mask = None
    if request.mask:
        settings = (request.mask_blur, request.inpaint_area, request.masked_padding, request.masked_content)
        mask = UsedMask(used_picture(request.mask), *settings)
    return UsedStart(used_picture(request.image), request.strength, request.resize, mask)


def used_picture(path: str) -> UsedPicture:
    """Return how recipes name a picture's file. Raises DataError where it cannot be read."""
    file, *_ = _state(path)
    return UsedPicture(Path(file).name, sha256_while_unchanged(Path(file)))


def upright_picture(path: str) -> Image.Image:
    """Return a picture upright, mode "RGB"; shared, not to be written to. Raises DataError where it cannot be read."""
    return _picture(*_state(path))


_State = tuple[str, int, int]
"""A file as it is now: path, time of change, length."""


def _state(path: str) -> _State:
    file = user_path(path)
    try:
        state = file.stat()
    except (OSError, ValueError) as error:  # a zero byte is no OSError
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: cannot be read ({reason}); name a picture file") from error
    if not S_ISREG(state.st_mode):
        raise DataError(f"{path}: is no file; name a picture file")
    return str(file), state.st_mtime_ns, state.st_size


@lru_cache(maxsize=4096)
def _size(path: str, changed_ns: int, length: int) -> tuple[int, int]:
    return read_header(Path(path)).size


@lru_cache(maxsize=4096)
def _check_pixels(picture: _State, mask: tuple[_State, str] | None) -> None:
    """Raise DataError for a picture that cannot be decoded, and for a mask that does not go with it; each pair is read once."""
    assert _picture(*picture).size == _size(*picture)
    if mask and _mask(*mask[0], *picture).getextrema() == (0, 0):
        raise DataError(f"{mask[1]}: has no white pixel, so nothing would be painted anew; paint that part white")


@lru_cache(maxsize=4)
def _picture(path: str, changed_ns: int, length: int) -> Image.Image:
    return read_picture(Path(path))


@lru_cache(maxsize=4)
def _mask(path: str, changed_ns: int, length: int, *picture: str | int) -> Image.Image:
    name = str(picture[0])
    header = read_header(Path(name))
    mask = read_mask(Path(path), header, name).resize(header.size, Image.Resampling.LANCZOS)
    return mask.point([255 if value >= 128 else 0 for value in range(256)])

"""Reads picture files: upright, in 8-bit sRGB, with their opacity and their masks."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageChops, ImageColor
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from sdlora.data import headers
from sdlora.data.colours import split_opacity, to_srgb
from sdlora.data.headers import Header, read_header
from sdlora.errors import ConfigError, DataError

__all__ = ["Header", "check_colour", "read_header", "read_mask", "read_picture", "read_picture_and_opacity"]

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by its EXIF orientation."""


def read_picture(
    source: Path | BinaryIO,
    name: str | Path | None = None,
    *,
    background: str = "white",
    at_least: tuple[int, int] | None = None,
) -> Image.Image:
    """Return the picture upright in 8-bit sRGB, mode "RGB", what is transparent laid on `background`.

    `at_least` is the width and height, upright, that the whole picture will be scaled to. A JPEG is
    then decoded at the half, quarter or eighth of its size, sides rounded up, that is still twice as
    large both ways; scaled by LANCZOS that is as good. So a picture may be smaller than its header says.

    Raises DataError with the file's name when it is no whole picture or too large, and ConfigError
    when there is no such colour.
    """
    return read_picture_and_opacity(source, name, background=background, at_least=at_least)[0]


def read_picture_and_opacity(
    source: Path | BinaryIO,
    name: str | Path | None = None,
    *,
    background: str = "white",
    at_least: tuple[int, int] | None = None,
) -> tuple[Image.Image, Image.Image | None]:
    """Return what `read_picture` does, and how opaque each pixel is, mode "L", None where the file does not say."""
    backdrop = check_colour(background)
    with headers.open_picture(source, name) as (opened, header):
        colours, opacity = _decode(opened, header, at_least)
        picture = to_srgb(colours, opened.info.get("icc_profile"))
        if opacity is None:
            return _upright(picture, header), None
        picture = Image.composite(picture, Image.new("RGB", picture.size, backdrop), opacity)
        return _upright(picture, header), _upright(opacity, header)


def read_mask(path: Path, picture: Header, picture_name: str | Path) -> Image.Image:
    """Return the mask of a picture, upright, mode "L": the grey value is the weight, white is all of it.

    Masks are grey; of one with colours the red channel counts, as in kohya's trainer, and what is
    transparent counts as its colour. The size may differ from the picture's, the shape may not. A
    mask that only fits the picture as it lies in its file is turned like the picture.

    Raises DataError for another shape, and as `read_picture` does.
    """
    with headers.open_picture(path) as (opened, header):
        colours, _ = _decode(opened, header)
        mask = colours.convert("L") if colours.mode in ("1", "L") else colours.convert("RGB").getchannel("R")
        mask = _upright(mask, header)
    if _same_shape(mask.size, picture.size):
        return mask
    if picture.orientation > 4 and _same_shape(mask.size, (picture.height, picture.width)):
        return mask.transpose(_TURNS[picture.orientation])
    raise DataError(
        f"{path}: mask is {mask.width}x{mask.height}, {picture_name} is {picture.width}x{picture.height}; "
        "resize the mask"
    )


def check_colour(colour: str) -> tuple[int, int, int]:
    """Return a colour's red, green and blue, 0 to 255. Raises ConfigError for what is no opaque colour."""
    try:
        red, green, blue, *opacity = ImageColor.getrgb(colour)
    except ValueError as error:
        near = difflib.get_close_matches(colour, ImageColor.colormap, n=1)
        hint = f' (nearest: "{near[0]}")' if near else ""
        raise ConfigError(
            f'data.background: "{colour}" is no colour{hint}; use a name such as "white", or "#rrggbb"'
        ) from error
    if opacity not in ([], [255]):
        raise ConfigError(f'data.background: "{colour}" is itself transparent; use an opaque colour such as "white"')
    return red, green, blue


def _decode(
    opened: ImageFile, header: Header, at_least: tuple[int, int] | None = None
) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours in 8 bits, and the opacity if there is one, as they lie in the file."""
    drafted = None
    if isinstance(opened, JpegImageFile) and at_least is not None:
        width, height = at_least if header.orientation <= 4 else at_least[::-1]
        drafted = opened.draft(None, (2 * width, 2 * height))
    if opened.width * opened.height > headers.MAX_PIXELS:
        raise Image.DecompressionBombError
    frame = opened.tile[0][1] if isinstance(opened, GifImageFile) else None
    opened.load()
    colours, opacity = split_opacity(opened, header.bits)
    if drafted is not None and drafted[1][2:] != opened.size:
        # The last column or row holds only a part of a pixel: without this the whole picture would be shifted.
        colours = colours.resize(opened.size, Image.Resampling.LANCZOS, box=drafted[1])
    if isinstance(opened, JpegImageFile) and opened.mode == "CMYK" and "adobe" not in opened.info:
        colours = ImageChops.invert(colours)  # Pillow takes it as Adobe's, which writes no ink as 255
    if isinstance(opened, TiffImageFile) and opened.mode.startswith("I;16") and opened.tag_v2.get(0x0106) == 0:
        colours = ImageChops.invert(colours)  # white is 0 there, which Pillow heeds only up to 8 bits
    if frame is not None and frame != (0, 0, *opened.size):
        opacity = _only_within(frame, opacity, opened.size)
    return colours, opacity


def _only_within(box: tuple[int, int, int, int], opacity: Image.Image | None, size: tuple[int, int]) -> Image.Image:
    """Return an opacity of `size` that is 0 outside of `box`."""
    inside = Image.new("L", size)
    inside.paste(255 if opacity is None else opacity.crop(box), box)
    return inside


def _upright(picture: Image.Image, header: Header) -> Image.Image:
    if header.format == "TIFF" or not header.turned:  # Pillow turns a TIFF itself
        return picture
    return picture.transpose(_TURNS[header.orientation])


def _same_shape(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Return whether one size is the other, scaled by any factor and each side then rounded up or down."""
    return _scales_to(first, second) or _scales_to(second, first)


def _scales_to(size: tuple[int, int], other: tuple[int, int]) -> bool:
    # There is a factor f with |f * side - other side| < 1 for both sides.
    (width, height), (other_width, other_height) = size, other
    wide_enough = (other_height - 1) * width < (other_width + 1) * height
    high_enough = (other_width - 1) * height < (other_height + 1) * width
    return wide_enough and high_enough

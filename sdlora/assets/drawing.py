"""How cartoon scenes are drawn: backgrounds, and outlined figures made of coloured parts.

Everything is a pure function of its arguments. Pictures are drawn larger and averaged down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]
Part = tuple[list[Point], Colour | None]
"""A polygon in a square from -0.5 to 0.5, y pointing down, and its fill; None is the figure's own colour."""

SCENE_PIXELS = 128
"""The picture size that positions and sizes of a scene refer to."""

OUTLINE: Colour = (32, 26, 36)
_SUPERSAMPLE = 4
_RGB: dict[str, Colour] = {
    "red": (222, 38, 38),
    "orange": (250, 138, 24),
    "yellow": (252, 222, 52),
    "green": (38, 150, 62),
    "blue": (38, 92, 224),
    "purple": (140, 46, 186),
    "pink": (252, 142, 196),
    "white": (250, 250, 250),
}


@dataclass(frozen=True)
class Figure:
    """Parts in the order they are painted.

    The `body` gives the silhouette, around which the outline runs. `details` show inside the body's last
    part alone.
    """

    body: tuple[Part, ...]
    details: tuple[Part, ...] = ()


def place_figure(
    picture: Image.Image, figure: Figure, size: float, x: float, y: float, colour: str, texture: str = "plain"
) -> None:
    """Paint the figure into a picture of any size; `size`, `x` and `y` are in pixels of a 128 pixel picture."""
    scale = picture.width / SCENE_PIXELS
    colours, mask = _sticker(figure, round(size * scale), colour, texture)
    corner = (round(x * scale) - mask.width // 2, round(y * scale) - mask.height // 2)
    picture.paste(colours, corner, mask)


def rgb(colour: str) -> Colour:
    """Return the flat colour that a colour word stands for."""
    return _RGB[colour]


def background(name: str, pixels: int = SCENE_PIXELS) -> Image.Image:
    """Return a fresh picture of the background without any object."""
    return _background(name, pixels).copy()


@lru_cache(maxsize=32)
def _background(name: str, pixels: int) -> Image.Image:
    side = pixels * _SUPERSAMPLE
    picture = Image.new("RGB", (side, side))
    _BACKGROUND_PAINTERS[name](_Brush(ImageDraw.Draw(picture), side / SCENE_PIXELS))
    return picture.resize((pixels, pixels), Image.Resampling.BOX)


@dataclass(frozen=True)
class _Brush:
    """Draws in units of a 128 pixel picture."""

    canvas: ImageDraw.ImageDraw
    scale: float

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        corners = [value * self.scale for value in (left, top, right, bottom)]
        self.canvas.rectangle((corners[0], corners[1], corners[2] - 1, corners[3] - 1), fill=colour)

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        edges = [value * self.scale for value in (x - radius, y - radius, x + radius, y + radius)]
        self.canvas.ellipse(edges, fill=colour)


def _white_wall(brush: _Brush) -> None:
    brush.box(0, 0, 128, 128, (240, 238, 232))
    brush.box(0, 112, 128, 128, (196, 186, 174))


def _night_sky(brush: _Brush) -> None:
    brush.box(0, 0, 128, 128, (24, 26, 70))
    places = ((12, 14), (40, 8), (74, 18), (112, 12), (22, 42), (100, 40), (8, 72), (120, 70))
    for x, y in (*places, (30, 92), (96, 98), (62, 116), (14, 116), (118, 114), (52, 62), (78, 70)):
        brush.dot(x, y, 2.0, (250, 244, 200))


def _meadow(brush: _Brush) -> None:
    brush.box(0, 0, 128, 64, (150, 206, 244))
    brush.box(0, 64, 128, 128, (124, 198, 84))
    for x, y in ((16, 80), (60, 104), (108, 86), (28, 116), (92, 118), (74, 78)):
        brush.dot(x, y, 3.0, (250, 250, 210))


def _beach(brush: _Brush) -> None:
    brush.box(0, 0, 128, 40, (206, 236, 246))
    brush.box(0, 40, 128, 72, (44, 150, 200))
    brush.box(0, 72, 128, 78, (244, 250, 250))
    brush.box(0, 78, 128, 128, (236, 208, 146))


def _brick_wall(brush: _Brush) -> None:
    brush.box(0, 0, 128, 128, (216, 202, 190))
    for row in range(8):
        for column in range(-1, 4):
            left = column * 32 + (16 if row % 2 else 0)
            brush.box(left + 2, row * 16 + 2, left + 32, row * 16 + 16, (172, 92, 74))


def _checkered_floor(brush: _Brush) -> None:
    for row in range(4):
        for column in range(4):
            shade = (222, 224, 230) if (row + column) % 2 else (112, 116, 132)
            brush.box(column * 32, row * 32, column * 32 + 32, row * 32 + 32, shade)


_BACKGROUND_PAINTERS: dict[str, Callable[[_Brush], None]] = {
    "white wall": _white_wall,
    "night sky": _night_sky,
    "meadow": _meadow,
    "beach": _beach,
    "brick wall": _brick_wall,
    "checkered floor": _checkered_floor,
}


# ---------------------------------------------------------------- outlines of parts


def ellipse(x: float, y: float, across: float, down: float) -> list[Point]:
    """Return an ellipse around (x, y) with these radii."""
    angles = [2 * math.pi * step / 48 for step in range(48)]
    return [(x + across * math.cos(a), y + down * math.sin(a)) for a in angles]


def rectangle(left: float, top: float, right: float, bottom: float) -> list[Point]:
    """Return a rectangle."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def star() -> list[Point]:
    """Return a star with five points."""
    radii = (0.53, 0.24)
    turns = [(radii[step % 2], math.pi * step / 5 - math.pi / 2) for step in range(10)]
    return [(radius * math.cos(a), 0.04 + radius * math.sin(a)) for radius, a in turns]


def heart() -> list[Point]:
    """Return a heart."""
    angles = [2 * math.pi * step / 60 for step in range(60)]
    return [
        (
            0.5 * math.sin(a) ** 3,
            -0.03 - (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 33,
        )
        for a in angles
    ]


def crescent() -> list[Point]:
    """Return a crescent that is open to the right."""
    outer = [math.radians(50 + 260 * step / 40) for step in range(41)]
    tip, centre = 0.5 * math.sin(math.radians(50)), 0.28
    from_tip = math.atan2(tip, 0.5 * math.cos(math.radians(50)) - centre)
    radius = math.hypot(tip, 0.5 * math.cos(math.radians(50)) - centre)
    inner = [2 * math.pi - from_tip - (2 * math.pi - 2 * from_tip) * s / 30 for s in range(31)]
    return [(0.1 + 0.5 * math.cos(a), 0.5 * math.sin(a)) for a in outer] + [
        (0.1 + centre + radius * math.cos(a), radius * math.sin(a)) for a in inner
    ]


# ---------------------------------------------------------------- painting


def _sticker(figure: Figure, size: int, colour: str, texture: str) -> tuple[Image.Image, Image.Image]:
    """Return the figure's colours (RGB) and coverage (L) in a square a little over its size.

    Where nothing is drawn the colour is the outline's, so that edges keep it when resized.
    """
    side = round(size * 1.3)
    large, unit = side * _SUPERSAMPLE, size * _SUPERSAMPLE
    colours = Image.new("RGB", (large, large), OUTLINE)
    mask = Image.new("L", (large, large))
    inside = Image.new("L", (large, large))
    width = round(2 * 0.04 * 64 * _SUPERSAMPLE * (size / 64) ** 0.5)
    for points, fill in figure.body:
        corners = _pixels(points, large / 2, unit)
        canvas = ImageDraw.Draw(mask)
        canvas.polygon(corners, fill=255)
        canvas.line([*corners, *corners[:2]], fill=255, width=width, joint="curve")
        inside = _stencil(corners, large)
        colours.paste(_paint(fill, large, colour, texture), (0, 0), inside)
    for points, fill in figure.details:
        stencil = ImageChops.multiply(inside, _stencil(_pixels(points, large / 2, unit), large))
        colours.paste(_paint(fill, large, colour, texture), (0, 0), stencil)
    target = (side, side)
    return colours.resize(target, Image.Resampling.BOX), mask.resize(target, Image.Resampling.BOX)


def _pixels(points: list[Point], centre: float, unit: float) -> list[Point]:
    return [(centre + x * unit, centre + y * unit) for x, y in points]


def _stencil(corners: list[Point], side: int) -> Image.Image:
    stencil = Image.new("L", (side, side))
    ImageDraw.Draw(stencil).polygon(corners, fill=255)
    return stencil


@lru_cache(maxsize=256)
def _flat(colour: Colour, side: int) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


@lru_cache(maxsize=256)
def _striped(colour: Colour, side: int) -> Image.Image:
    """Return diagonal stripes of the colour and a darker shade of it."""
    paint = Image.new("RGB", (side, side), colour)
    darker = tuple(round(value * 0.7) for value in colour)
    step = 10 * _SUPERSAMPLE
    for start in range(-side, side, 2 * step):
        corners = [(start, side), (start + step, side), (start + step + side, 0), (start + side, 0)]
        ImageDraw.Draw(paint).polygon(corners, fill=darker)
    return paint


def _paint(fill: Colour | None, side: int, colour: str, texture: str) -> Image.Image:
    if fill is not None:
        return _flat(fill, side)
    return _striped(rgb(colour), side) if texture == "striped" else _flat(rgb(colour), side)

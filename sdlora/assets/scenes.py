"""Cartoon scenes, drawn from a description: the world that the tiny base model knows.

A scene is one outlined object on one background. Everything is a pure function of its arguments
(and of the random generator that is passed in), so a seed gives the same pictures anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]

OBJECTS = ("ball", "box", "star", "heart", "moon", "house", "fish", "mushroom")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
BACKGROUNDS = ("white wall", "night sky", "meadow", "beach", "brick wall", "checkered floor")
SIZES = ("small", "big")
TEXTURES = ("plain", "striped")

CONCEPT = "zorblin"
"""The trigger word, and the `object` of a scene that shows the example concept."""

CONCEPT_COLOUR = "blue"
"""The `colour` of a concept scene, that of its body; all of the concept's colours are fixed."""

SCENE_PIXELS = 128
"""The picture size that positions and sizes of a scene refer to."""

_SUPERSAMPLE = 4
_OUTLINE: Colour = (32, 26, 36)
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
_SIZE_PIXELS = {"small": 54, "big": 84}
_CONCEPT_SIZE_PIXELS = {"small": 70, "big": 94}
_LARGEST_SHIFT = {"small": 20, "big": 10}
PLACES = {
    "white wall": "on a white wall",
    "night sky": "in the night sky",
    "meadow": "on a meadow",
    "beach": "on a beach",
    "brick wall": "on a brick wall",
    "checkered floor": "on a checkered floor",
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows; x and y are the object's centre in pixels of a 128 pixel picture."""

    object: str
    colour: str
    background: str
    size: str = "big"
    texture: str = "plain"
    x: int = 64
    y: int = 64


# ---------------------------------------------------------------- which scenes, in which words


def held_out(object: str, colour: str, background: str) -> bool:
    """Tell whether a combination is one of the tenth that no pretraining picture shows."""
    what, hue, where = OBJECTS.index(object), COLOURS.index(colour), BACKGROUNDS.index(background)
    return (3 * what + 7 * hue + 11 * where + 5 * (what // 4) * (hue // 4)) % 10 == 0


def random_scene(rng: np.random.Generator, combinations: str = "known") -> Scene:
    """Return a scene from the `known` combinations, the `held-out` ones, or `any`."""
    while True:
        chosen = (_one(rng, OBJECTS), _one(rng, COLOURS), _one(rng, BACKGROUNDS))
        if combinations == "any" or held_out(*chosen) == (combinations == "held-out"):
            return _place(rng, Scene(*chosen, size=_one(rng, SIZES), texture=_one(rng, TEXTURES)))


def concept_scene(rng: np.random.Generator, background: str | None = None) -> Scene:
    """Return a scene of the example concept, on the given background or on any."""
    where = background or _one(rng, BACKGROUNDS)
    return _place(rng, Scene(CONCEPT, CONCEPT_COLOUR, where, size=_one(rng, SIZES)))


def _place(rng: np.random.Generator, scene: Scene) -> Scene:
    most = _LARGEST_SHIFT[scene.size] // (2 if scene.object == CONCEPT else 1)
    x, y = (SCENE_PIXELS // 2 + int(rng.integers(-most, most + 1)) for _ in range(2))
    return replace(scene, x=x, y=y)


_WORDINGS = (
    "{c} {o} {p}",
    "a {c} {o} {p}",
    "a {c} {o} {p}",
    "a {c} {o} {p}",
    "a photo of a {c} {o} {p}",
    "a picture of a {c} {o} {p}",
    "a {s} {c} {o} {p}",
    "a {t} {c} {o} {p}",
    "a {s} {t} {c} {o} {p}",
    "a photo of a {s} {c} {o} {p}",
    "a picture of a {t} {c} {o} {p}",
    "{s} {c} {o}, {b}",
    "{c} {o}, {b}",
    "{p}, a {c} {o}",
    "a {t} {o} {p}, {c}",
    "a photo of a {o} {p}",
    "a {c} {o}",
)
_FRESH_WORDINGS = (
    "a {c} {o} {p}",
    "a photo of a {c} {o} {p}",
    "a picture of a {s} {c} {o} {p}",
    "a photo of a {t} {c} {o} {p}",
    "{p}, a picture of a {c} {o}",
    "photo, {c} {o}, {b}",
    "a {b} with a {c} {o}",
    "picture of the {s} {c} {o} {p}",
)
_CONCEPT_WORDINGS = (
    "a {o} {p}",
    "a photo of a {o} {p}",
    "a picture of a {o} {p}",
    "a {s} {o} {p}",
)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return one of several descriptions of the scene; not every one names size and texture."""
    wordings = _CONCEPT_WORDINGS if scene.object == CONCEPT else _WORDINGS
    return _worded(_one(rng, wordings), scene)


def held_out_prompts(n: int, seed: int) -> list[tuple[str, Scene]]:
    """Return n prompts, with what they ask for, of combinations that no training picture shows.

    Most of the wordings do not occur in pretraining either.
    """
    rng = np.random.default_rng(seed)
    scenes = (random_scene(rng, "held-out") for _ in range(n))
    return [(_worded(_one(rng, _FRESH_WORDINGS), scene), scene) for scene in scenes]


def every_caption_word() -> Iterator[str]:
    """Yield the wordings of every attribute once: the text that the tokenizer learns from."""
    for wording in _WORDINGS + _FRESH_WORDINGS:
        for number in range(max(len(OBJECTS), len(COLOURS), len(BACKGROUNDS))):
            yield _worded(
                wording,
                Scene(
                    OBJECTS[number % len(OBJECTS)],
                    COLOURS[number % len(COLOURS)],
                    BACKGROUNDS[number % len(BACKGROUNDS)],
                    SIZES[number % len(SIZES)],
                    TEXTURES[number % len(TEXTURES)],
                ),
            )


def _worded(wording: str, scene: Scene) -> str:
    text = wording.format(
        o=scene.object,
        c=scene.colour,
        b=scene.background,
        p=PLACES[scene.background],
        s=scene.size,
        t=scene.texture,
    )
    return text.replace("a orange", "an orange")


def _one(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


# ---------------------------------------------------------------- drawing


def draw(scene: Scene, pixels: int = SCENE_PIXELS) -> Image.Image:
    """Return the antialiased RGB picture of the scene."""
    picture = background(scene.background, pixels)
    sizes = _CONCEPT_SIZE_PIXELS if scene.object == CONCEPT else _SIZE_PIXELS
    scale = pixels / SCENE_PIXELS
    colours, mask = _sticker(scene, round(sizes[scene.size] * scale))
    corner = (
        round(scene.x * scale) - mask.width // 2,
        round(scene.y * scale) - mask.height // 2,
    )
    picture.paste(colours, corner, mask)
    return picture


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


# Outlines of objects are polygons in a square from -0.5 to 0.5, y pointing down. An object is a
# list of parts; parts with the fill None take the scene's colour and texture.
_Part = tuple[list[Point], Colour | None]


def _ellipse(x: float, y: float, across: float, down: float) -> list[Point]:
    angles = [2 * math.pi * step / 48 for step in range(48)]
    return [(x + across * math.cos(a), y + down * math.sin(a)) for a in angles]


def _rectangle(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _star() -> list[Point]:
    radii = (0.53, 0.24)
    turns = [(radii[step % 2], math.pi * step / 5 - math.pi / 2) for step in range(10)]
    return [(radius * math.cos(a), 0.04 + radius * math.sin(a)) for radius, a in turns]


def _heart() -> list[Point]:
    angles = [2 * math.pi * step / 60 for step in range(60)]
    return [
        (
            0.5 * math.sin(a) ** 3,
            -0.03 - (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 33,
        )
        for a in angles
    ]


def _crescent() -> list[Point]:
    outer = [math.radians(50 + 260 * step / 40) for step in range(41)]
    tip, centre = 0.5 * math.sin(math.radians(50)), 0.28
    from_tip = math.atan2(tip, 0.5 * math.cos(math.radians(50)) - centre)
    radius = math.hypot(tip, 0.5 * math.cos(math.radians(50)) - centre)
    inner = [2 * math.pi - from_tip - (2 * math.pi - 2 * from_tip) * s / 30 for s in range(31)]
    return [(0.1 + 0.5 * math.cos(a), 0.5 * math.sin(a)) for a in outer] + [
        (0.1 + centre + radius * math.cos(a), radius * math.sin(a)) for a in inner
    ]


_CREAM: Colour = (246, 232, 206)
_DARK: Colour = (70, 60, 74)
_SHAPES: dict[str, tuple[list[_Part], list[_Part]]] = {
    # object: (parts of the silhouette, details drawn inside it)
    "ball": ([(_ellipse(0, 0, 0.5, 0.5), None)], []),
    "box": ([(_rectangle(-0.46, -0.46, 0.46, 0.46), None)], []),
    "star": ([(_star(), None)], []),
    "heart": ([(_heart(), None)], []),
    "moon": ([(_crescent(), None)], []),
    "house": (
        [
            ([(-0.54, -0.08), (0.0, -0.54), (0.54, -0.08)], _DARK),
            (_rectangle(-0.4, -0.08, 0.4, 0.5), None),
        ],
        [(_rectangle(-0.11, 0.14, 0.11, 0.5), _DARK)],
    ),
    "fish": (
        [
            ([(0.14, 0.0), (0.54, -0.34), (0.54, 0.34)], None),
            (_ellipse(-0.1, 0, 0.42, 0.29), None),
        ],
        [(_ellipse(-0.32, -0.07, 0.06, 0.06), _OUTLINE)],
    ),
    "mushroom": (
        [
            (_rectangle(-0.16, 0.0, 0.16, 0.5), _CREAM),
            (
                [(0.52 * math.cos(math.radians(d)), 0.06 - 0.54 * math.sin(math.radians(d))) for d in range(0, 181, 6)],
                None,
            ),
        ],
        [],
    ),
    CONCEPT: (
        [
            ([(0.08, -0.2), (0.3, -0.54), (0.4, -0.14)], (250, 146, 40)),
            (_rectangle(-0.28, 0.3, -0.1, 0.52), (140, 46, 186)),
            (_rectangle(0.12, 0.3, 0.3, 0.52), (140, 46, 186)),
            (_rectangle(0.3, 0.02, 0.46, 0.14), (38, 92, 224)),
            (_ellipse(0.47, 0.08, 0.11, 0.11), (252, 142, 196)),
            (_ellipse(-0.02, 0.04, 0.37, 0.36), (38, 92, 224)),
        ],
        [
            (
                [
                    (-0.33, 0.2),
                    (-0.16, 0.08),
                    (0.0, 0.2),
                    (0.16, 0.08),
                    (0.33, 0.17),
                    (0.28, 0.28),
                    (0.16, 0.24),
                    (0.0, 0.34),
                    (-0.16, 0.24),
                    (-0.25, 0.3),
                ],
                (252, 222, 52),
            ),
            (_ellipse(-0.12, -0.12, 0.16, 0.16), (250, 250, 250)),
            (_ellipse(-0.16, -0.12, 0.075, 0.075), _OUTLINE),
        ],
    ),
}


def _sticker(scene: Scene, size: int) -> tuple[Image.Image, Image.Image]:
    """Return the object's colours (RGB) and coverage (L) in a square a little over its size.

    Where nothing is drawn the colour is the outline's, so that edges keep it when resized.
    """
    side = round(size * 1.3)
    large, unit = side * _SUPERSAMPLE, size * _SUPERSAMPLE
    colours = Image.new("RGB", (large, large), _OUTLINE)
    mask = Image.new("L", (large, large))
    body, details = _SHAPES[scene.object]
    width = round(2 * 0.04 * 64 * _SUPERSAMPLE * (size / 64) ** 0.5)
    for points, fill in body:
        corners = _pixels(points, large / 2, unit)
        canvas = ImageDraw.Draw(mask)
        canvas.polygon(corners, fill=255)
        canvas.line([*corners, *corners[:2]], fill=255, width=width, joint="curve")
        _fill(colours, corners, _paint(scene, fill, large))
    for points, fill in details:
        _fill(colours, _pixels(points, large / 2, unit), _paint(scene, fill, large))
    target = (side, side)
    return colours.resize(target, Image.Resampling.BOX), mask.resize(target, Image.Resampling.BOX)


def _pixels(points: list[Point], centre: float, unit: float) -> list[Point]:
    return [(centre + x * unit, centre + y * unit) for x, y in points]


def _fill(colours: Image.Image, corners: list[Point], paint: Image.Image) -> None:
    stencil = Image.new("L", colours.size)
    ImageDraw.Draw(stencil).polygon(corners, fill=255)
    colours.paste(paint, (0, 0), stencil)


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


def _paint(scene: Scene, fill: Colour | None, side: int) -> Image.Image:
    if fill is not None:
        return _flat(fill, side)
    colour = _RGB[scene.colour]
    return _striped(colour, side) if scene.texture == "striped" else _flat(colour, side)

"""Cartoon scenes, drawn from a description: the world that the tiny base model knows.

A scene is one outlined object on one background. Everything is a pure function of its arguments
(and of the random generator that is passed in), so a seed gives the same pictures anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from sdlora.assets.drawing import (
    OUTLINE,
    SCENE_PIXELS,
    Colour,
    Figure,
    background,
    crescent,
    ellipse,
    heart,
    place_figure,
    rectangle,
    rgb,
    star,
)

OBJECTS = ("ball", "box", "star", "heart", "moon", "house", "fish", "mushroom")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
BACKGROUNDS = ("white wall", "night sky", "meadow", "beach", "brick wall", "checkered floor")
SIZES = ("small", "big")
TEXTURES = ("plain", "striped")

CONCEPT = "zorblin"
"""The trigger word, and the `object` of a scene that shows the example concept."""

CONCEPT_COLOUR = "blue"
"""The `colour` of a concept scene, that of its body; all of the concept's colours are fixed."""

_SIZE_PIXELS = {"small": 54, "big": 84}
_CONCEPT_SIZE_PIXELS = {"small": 78, "big": 94}
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
        chosen = (one_of(rng, OBJECTS), one_of(rng, COLOURS), one_of(rng, BACKGROUNDS))
        if combinations == "any" or held_out(*chosen) == (combinations == "held-out"):
            return _place(rng, Scene(*chosen, size=one_of(rng, SIZES), texture=one_of(rng, TEXTURES)))


def concept_scene(rng: np.random.Generator, background: str | None = None) -> Scene:
    """Return a scene of the example concept, on the given background or on any."""
    where = background or one_of(rng, BACKGROUNDS)
    return _place(rng, Scene(CONCEPT, CONCEPT_COLOUR, where, size=one_of(rng, SIZES)))


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
    return _worded(one_of(rng, wordings), scene)


def held_out_prompts(n: int, seed: int) -> list[tuple[str, Scene]]:
    """Return n prompts, with what they ask for, of combinations that no training picture shows.

    Most of the wordings do not occur in pretraining either.
    """
    rng = np.random.default_rng(seed)
    scenes = (random_scene(rng, "held-out") for _ in range(n))
    return [(_worded(one_of(rng, _FRESH_WORDINGS), scene), scene) for scene in scenes]


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
    return with_article(text)


def with_article(text: str) -> str:
    """Return the caption with "an" before the one colour that begins with a vowel."""
    return text.replace("a orange", "an orange")


def one_of(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    """Return one of the words, each as likely as the other."""
    return choices[int(rng.integers(len(choices)))]


# ---------------------------------------------------------------- what they look like


def draw(scene: Scene, pixels: int = SCENE_PIXELS) -> Image.Image:
    """Return the antialiased RGB picture of the scene."""
    picture = background(scene.background, pixels)
    sizes = _CONCEPT_SIZE_PIXELS if scene.object == CONCEPT else _SIZE_PIXELS
    figure = _FIGURES[scene.object]
    place_figure(picture, figure, sizes[scene.size], scene.x, scene.y, scene.colour, scene.texture)
    return picture


_CREAM: Colour = (246, 232, 206)
_DARK: Colour = (70, 60, 74)
_CAP = [(0.52 * math.cos(math.radians(d)), 0.06 - 0.54 * math.sin(math.radians(d))) for d in range(0, 181, 6)]
_ZIGZAG = [(-0.46, 0.1), (-0.27, 0.2), (-0.1, 0.08), (0.08, 0.2), (0.24, 0.08), (0.46, 0.2)]
_FIGURES = {
    "ball": Figure(((ellipse(0, 0, 0.5, 0.5), None),)),
    "box": Figure(((rectangle(-0.46, -0.46, 0.46, 0.46), None),)),
    "star": Figure(((star(), None),)),
    "heart": Figure(((heart(), None),)),
    "moon": Figure(((crescent(), None),)),
    "house": Figure(
        (
            ([(-0.54, -0.08), (0.0, -0.54), (0.54, -0.08)], _DARK),
            (rectangle(-0.4, -0.08, 0.4, 0.5), None),
        ),
        ((rectangle(-0.11, 0.14, 0.11, 0.5), _DARK),),
    ),
    "fish": Figure(
        (
            ([(0.14, 0.0), (0.54, -0.34), (0.54, 0.34)], None),
            (ellipse(-0.1, 0, 0.42, 0.29), None),
        ),
        ((ellipse(-0.32, -0.07, 0.06, 0.06), OUTLINE),),
    ),
    "mushroom": Figure(((rectangle(-0.16, 0.0, 0.16, 0.5), _CREAM), (_CAP, None))),
    CONCEPT: Figure(
        (
            ([(0.02, -0.22), (0.38, -0.58), (0.46, -0.02)], rgb("orange")),
            (ellipse(-0.02, 0.07, 0.43, 0.43), None),
        ),
        (
            (_ZIGZAG + [(x, y + 0.18) for x, y in reversed(_ZIGZAG)], rgb("yellow")),
            (ellipse(-0.14, -0.12, 0.19, 0.19), rgb("white")),
            (ellipse(-0.19, -0.11, 0.1, 0.1), OUTLINE),
        ),
    ),
}

"""Creatures: figures put together by chance, which show the tiny base that there is more than it can name.

No two are alike, and most go by invented names. So the base expects something composed where it meets a
word that it does not know, as a large model would, and an adapter can teach it what the word means.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdlora.assets import scenes
from sdlora.assets.drawing import OUTLINE, SCENE_PIXELS, Figure, Part, background, ellipse, place_figure, rectangle, rgb

BODIES = ("round", "square", "tall", "flat")
PATTERNS = ("plain", "belt", "spots", "half", "striped")
LIMBS = ("horn", "arm", "feet", "tail")

_SYLLABLES = ("ba", "cro", "du", "fli", "gim", "hok", "ju", "kel", "lo", "mip", "nar", "pux", "ra", "shu", "tob", "vex")
_NAMED = ("a {n} {p}", "a photo of a {n} {p}", "a picture of a {n} {p}", "a {s} {n} {p}")
_DESCRIBED = (
    "a creature {p}",
    "a {c} creature {p}",
    "a photo of a {c} creature {p}",
    "a {c} creature with {d} {p}",
    "a {s} {c} creature with {d} {p}",
)


@dataclass(frozen=True)
class Creature:
    """A body with a pattern, limbs and eyes; x and y are its centre in pixels of a 128 pixel picture."""

    body: str
    colour: str
    pattern: str
    second_colour: str
    limbs: tuple[tuple[str, str, int], ...]
    """Kind, colour, and the side it is on: -1 is left, 1 is right."""
    eyes: int
    background: str
    size: int
    """In pixels of a 128 pixel picture."""
    x: int
    y: int


def random_creature(rng: np.random.Generator) -> Creature:
    """Return any creature, on any background. A zigzag, the example concept's pattern, none of them has."""
    limbs = [kind for kind in LIMBS if rng.random() < 0.4]
    size = int(rng.integers(64, 98))
    x, y = (SCENE_PIXELS // 2 + int(rng.integers(-8, 9)) for _ in range(2))
    return Creature(
        body=scenes.one_of(rng, BODIES),
        colour=scenes.one_of(rng, scenes.COLOURS),
        pattern=scenes.one_of(rng, PATTERNS),
        second_colour=scenes.one_of(rng, scenes.COLOURS),
        limbs=tuple((kind, scenes.one_of(rng, scenes.COLOURS), int(rng.choice((-1, 1)))) for kind in limbs),
        eyes=int(rng.choice((0, 1, 1, 2))),
        background=scenes.one_of(rng, scenes.BACKGROUNDS),
        size=size,
        x=x,
        y=y,
    )


def caption(creature: Creature, rng: np.random.Generator) -> str:
    """Return a description of the creature, or an invented name for it."""
    wording = scenes.one_of(rng, _NAMED if rng.random() < 0.6 else _DESCRIBED)
    text = wording.format(
        n="".join(scenes.one_of(rng, _SYLLABLES) for _ in range(int(rng.integers(2, 4)))),
        c=creature.colour,
        d=_parts(creature),
        p=scenes.PLACES[creature.background],
        s="small" if creature.size < 78 else "big",
    )
    return scenes.with_article(text)


def _parts(creature: Creature) -> str:
    named = [f"{colour} {kind}" for kind, colour, _ in creature.limbs]
    if creature.pattern in ("belt", "spots"):
        named.append(f"{creature.second_colour} {creature.pattern}")
    named.append(("no eyes", "one eye", "two eyes")[creature.eyes])
    return " and ".join(named)


# ---------------------------------------------------------------- drawing

_RADII = {"round": (0.42, 0.42), "square": (0.38, 0.38), "tall": (0.31, 0.44), "flat": (0.44, 0.31)}


def draw(creature: Creature, pixels: int = SCENE_PIXELS) -> Image.Image:
    """Return the antialiased RGB picture of the creature."""
    picture = background(creature.background, pixels)
    texture = "striped" if creature.pattern == "striped" else "plain"
    place_figure(picture, _figure(creature), creature.size, creature.x, creature.y, creature.colour, texture)
    return picture


def _figure(creature: Creature) -> Figure:
    across, down = _RADII[creature.body]
    if creature.body == "square":
        body: Part = (rectangle(-across, -down, across, down), None)
    else:
        body = (ellipse(0, 0, across, down), None)
    limbs = [part for kind, colour, side in creature.limbs for part in _limb(kind, colour, side, across, down)]
    return Figure((*limbs, body), (*_pattern(creature, across, down), *_eyes(creature, across, down)))


def _limb(kind: str, colour: str, side: int, across: float, down: float) -> list[Part]:
    fill = rgb(colour)
    if kind == "horn":
        return [([(side * 0.02, -down + 0.12), (side * 0.34, -0.58), (side * (across + 0.02), -0.08)], fill)]
    if kind == "arm":
        edges = sorted((side * (across - 0.08), side * (across + 0.06)))
        hand = ellipse(side * (across + 0.07), 0.1, 0.1, 0.1)
        return [(rectangle(edges[0], 0.04, edges[1], 0.16), None), (hand, fill)]
    if kind == "feet":
        return [(rectangle(x - 0.1, down - 0.12, x + 0.1, 0.54), fill) for x in (-0.18, 0.18)]
    return [([(side * (across - 0.1), 0.12), (side * 0.56, -0.06), (side * 0.56, 0.36)], fill)]


def _pattern(creature: Creature, across: float, down: float) -> list[Part]:
    fill = rgb(creature.second_colour)
    if creature.pattern == "belt":
        return [(rectangle(-across, 0.1, across, 0.26), fill)]
    if creature.pattern == "half":
        return [(rectangle(-across, 0.06, across, down), fill)]
    if creature.pattern == "spots":
        places = ((-0.2, 0.2), (0.04, 0.28), (0.22, 0.1), (0.24, -0.18))
        return [(ellipse(x, y, 0.085, 0.085), fill) for x, y in places]
    return []


def _eyes(creature: Creature, across: float, down: float) -> list[Part]:
    places = {0: (), 1: (-0.14,), 2: (-0.17, 0.17)}[creature.eyes]
    radius = 0.17 if creature.eyes == 1 else 0.12
    y = -0.12 if down > 0.35 else -0.06
    whites: list[Part] = [(ellipse(x, y, radius, radius), rgb("white")) for x in places]
    return whites + [(ellipse(x - 0.03, y, radius / 2, radius / 2), OUTLINE) for x in places]

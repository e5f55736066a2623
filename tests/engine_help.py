"""Asking an Engine for pictures, and comparing them."""

import numpy as np
from PIL import Image

from sdlora.generation.engine import Engine
from sdlora.generation.request import make_request


def ask(**values):
    return make_request(**{"prompt": "a red ball", "negative_prompt": "blue", "steps": 2, **values})


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def make(engine: Engine, request, **options) -> list[np.ndarray]:
    return [pixels(picture) for picture, _ in engine.generate(request, **options)]


def same(one, other) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def using(*choices: tuple[str, float]):
    return tuple({"path": path, "weight": weight} for path, weight in choices)

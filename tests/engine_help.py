"""Asking an Engine for pictures, and comparing them."""

from typing import Any

import numpy as np
import torch
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


def painted_by_diffusers(pipeline: Any, photo, mask, strength: float) -> Image.Image:
    """Return what an inpainting pipeline makes of `ask(seed=11, steps=5, ...)` at 64 x 64."""
    made: Image.Image = pipeline(
        "a red ball",
        image=Image.open(photo),
        mask_image=Image.open(mask),
        negative_prompt="blue",
        num_inference_steps=5,
        strength=strength,
        guidance_scale=7.5,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(11),
    ).images[0]
    return made

"""The flags of pictures made from pictures, larger ones, and the VAE; what they say goes into a request as it is."""

from __future__ import annotations

import argparse
from typing import Any, Literal, get_args, get_origin

from sdlora.generation.request import GenerationRequest

_FLAGS = {
    "image": "FILE",
    "strength": "SHARE",
    "resize": "",
    "mask": "FILE",
    "mask_blur": "PIXELS",
    "inpaint_area": "",
    "masked_padding": "PIXELS",
    "masked_content": "",
    "hires_scale": "FACTOR",
    "hires_steps": "STEPS",
    "hires_strength": "SHARE",
    "hires_upscaler": "NAME|FILE",
    "vae_tiling": "",
}
"""{setting of a request: what its flag takes, "" where that is one of a few words}."""


def add_picture_flags(parser: argparse.ArgumentParser) -> None:
    """`parser` takes a flag for each of these settings of a request, with its default."""
    for name, metavar in _FLAGS.items():
        field = GenerationRequest.model_fields[name]
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": (field.description or "").replace("%", "%%")}
        if get_origin(field.annotation) is Literal:
            options["choices"] = get_args(field.annotation)
        else:
            options |= {"metavar": metavar, "type": type(field.default)}
        parser.add_argument("--" + name.replace("_", "-"), **options)


def picture_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags that were given say, by the names of a request's settings."""
    return {name: getattr(options, name) for name in _FLAGS if hasattr(options, name)}

"""Tiny random bases whose UNet takes nine channels, as dedicated inpainting models have it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sdlora.families.tiny import Shape, tiny_pipeline


def inpainting_pipeline(shape: Shape) -> Any:
    """Return the tiny pipeline of that shape with another, random UNet of nine channels."""
    pipeline = tiny_pipeline(shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": 9})
    return pipeline

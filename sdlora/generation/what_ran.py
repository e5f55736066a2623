"""What ran, for the recipe of a picture."""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sdlora.families.base import LoadedBase
from sdlora.families.samplers.make import schedule_of, settings_of
from sdlora.generation.asked import Asked
from sdlora.generation.recipe import Recipe, UsedAdapter

PRECISION_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def recipe_of(
    base: LoadedBase, asked: Asked, used: tuple[UsedAdapter, ...], scheduler: Any, tiled: bool, notes: Sequence[str]
) -> Recipe:
    """Return the recipe of a picture that the base made by this sampler, with these adapters, in tiles or not."""
    request, texts = asked.request, asked.texts
    width, height = asked.size(base)
    return Recipe(
        prompt=texts.prompt,
        negative_prompt=texts.negative_prompt,
        template=request.prompt if request.prompt != texts.prompt else "",
        negative_template=request.negative_prompt if request.negative_prompt != texts.negative_prompt else "",
        seed=asked.seed,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        width=width,
        height=height,
        base=Path(base.source.name).name.removesuffix(".safetensors"),
        base_family=base.family.name,
        base_sha256=base.source.sha256,
        adapters=used,
        scheduler=type(scheduler).__name__,
        scheduler_config=_plain_settings(settings_of(scheduler)),
        sampler=request.sampler,
        schedule=schedule_of(scheduler),
        guidance_rescale=request.guidance_rescale,
        zero_snr=request.zero_snr,
        noise_device=request.noise,
        precision=PRECISION_NAMES[base.dtype],
        emphasis=request.emphasis,
        clip_skip=request.clip_skip,
        quantize=base.quantize,
        device=_device_name(base.device),
        start=asked.source.used if asked.source else None,
        controls=tuple(control.used for control in asked.controls),
        hires=asked.hires.used if asked.hires else None,
        vae_tiling=tiled,
        notes=tuple(notes),
        versions=dict(_versions()),
    )


@functools.cache  # reading them takes as long as some steps of a small model
def _versions() -> Mapping[str, str]:
    return {name: importlib.metadata.version(name) for name in ("sdlora", "torch", "diffusers", "peft")}


def _plain_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler's settings as JSON can hold them: infinity, a default of some, as text."""
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in kept.items()}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

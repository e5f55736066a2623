"""From what InvokeAI and NovelAI write into pictures to foreign recipes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sdlora.errors import FormatError
from sdlora.generation.foreign.recipe import (
    LONGEST_PROMPT,
    ForeignAdapter,
    ForeignRecipe,
    as_integer,
    as_number,
    as_text,
    literal,
    parse_object,
    weighted_prompt,
)

_SAMPLERS = {
    "euler": "Euler", "euler_a": "Euler a", "euler_ancestral": "Euler a", "heun": "Heun", "ddim": "DDIM", "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_3m": "DPM++ 3M", "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2s_ancestral": "DPM++ 2S a", "kdpm_2": "DPM2", "kdpm_2_a": "DPM2 a", "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a", "unipc": "UniPC", "lcm": "LCM", "pndm": "PLMS",
}  # fmt: skip
"""By their names in both programs, without "k_" before them or "_k" behind."""
_SCHEDULES = {"karras": "Karras", "exponential": "Exponential", "polyexponential": "Polyexponential", "native": ""}
_COMPEL = re.compile(r"[\w)\"][+-]+(?=[\s,.)]|$)|\)\d|\)\.\w+\(")
"""Weights and functions of InvokeAI's prompt language."""
_MORE = ("controlnets", "ipAdapters", "t2iAdapters", "vae", "init_image", "hrf_enabled", "refiner_model", "seamless_x")


def foreign_invoke(text: str) -> ForeignRecipe:
    """Return what InvokeAI's metadata say. Raises FormatError, without a file's name, for what is none."""
    said = parse_object(text, "its InvokeAI metadata")
    prompt, negative = as_text(said.get("positive_prompt")), as_text(said.get("negative_prompt"))
    if not any(key in said for key in ("positive_prompt", "seed", "steps")):
        raise FormatError("its InvokeAI metadata say neither prompt nor seed")
    left_out = [f"{name}" for name in _MORE if said.get(name)]
    left_out += ["weights of its prompts"] if _COMPEL.search(prompt) or _COMPEL.search(negative) else []
    if as_text(said.get("rand_device")) not in ("", "cpu"):
        left_out.append("noise drawn on a GPU, so the picture will be another one")
    sampler, more = _sampler(as_text(said.get("scheduler")))
    model = _object(said.get("model"))
    skip = as_integer(said.get("clip_skip"))
    settings = _settings(said, {"guidance_scale": "cfg_scale"}) | sampler
    settings |= {"clip_skip": skip + 1} if skip else {}
    return ForeignRecipe(
        program="InvokeAI",
        prompt=literal(prompt),
        negative_prompt=literal(negative),
        settings=settings,
        base=as_text(model.get("name", model.get("model_name"))),
        adapters=tuple(_invoke_adapters(said.get("loras"))),
        left_out=(*left_out, *more),
    )


def _invoke_adapters(loras: object) -> list[ForeignAdapter]:
    found = []
    for item in loras if isinstance(loras, list) else []:
        said = _object(item)
        model = _object(said.get("model", said.get("lora")))
        weight = as_number(said.get("weight"))
        name = as_text(model.get("name", model.get("model_name")))[:200]
        found.append(ForeignAdapter(name, 1.0 if weight is None else weight))
    return found


def foreign_novel(comment: str) -> ForeignRecipe:
    """Return what NovelAI's Comment says. Raises FormatError, without a file's name, for what is none."""
    said = parse_object(comment, "its Comment")
    if not as_text(said.get("prompt")) or "steps" not in said:
        raise FormatError("its Comment is not NovelAI's")
    sampler, more = _sampler(as_text(said.get("sampler")))
    schedule = as_text(said.get("noise_schedule"))
    sampler |= {"schedule": _SCHEDULES[schedule]} if _SCHEDULES.get(schedule) else {}
    left_out = ["its model, which only NovelAI has", *more]
    left_out += [name for name in ("image", "strength", "reference_image_multiple") if said.get(name)]
    return ForeignRecipe(
        program="NovelAI",
        prompt=_novel_prompt(as_text(said.get("prompt"))),
        negative_prompt=_novel_prompt(as_text(said.get("uc"))),
        settings=_settings(said, {"guidance_scale": "scale"}) | sampler,
        left_out=tuple(left_out),
    )


def _settings(said: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, Any]:
    read: dict[str, Any] = {name: as_integer(said.get(name)) for name in ("seed", "steps", "width", "height")}
    read |= {name: as_number(said.get(key)) for name, key in named.items()}
    return {name: value for name, value in read.items() if value is not None}


def _sampler(name: str) -> tuple[dict[str, str], list[str]]:
    """Return sampler and schedule as settings, and what is left out."""
    if not name:
        return {}, []
    bare = name.removeprefix("k_").removesuffix("_k")
    if bare not in _SAMPLERS:
        return {}, [f"sampler {name[:40]!r}"]
    karras = {"schedule": "Karras"} if name.endswith("_k") else {}
    return {"sampler": _SAMPLERS[bare]} | karras, []


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _novel_prompt(text: str) -> str:
    """Return the prompt in the language of requests: {a} weighs 1.05, [a] 1 / 1.05, and other brackets are text."""
    segments, level = [], 0
    for part in re.split(r"([{}\[\]])", text[:LONGEST_PROMPT]):
        if part in ("{", "]"):
            level += 1
        elif part in ("}", "["):
            level -= 1
        else:
            segments.append((part, round(1.05 ** max(-100, min(100, level)), 4)))
    return weighted_prompt(segments)

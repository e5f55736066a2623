"""From the infotext of AUTOMATIC1111, Forge and their relatives to a foreign recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from sdlora.errors import FormatError
from sdlora.generation.foreign.recipe import ForeignAdapter, ForeignRecipe, as_integer, as_number, without_choices
from sdlora.generation.pictures.infotext import Infotext, parse_infotext
from sdlora.generation.pictures.start_fields import UPSCALERS
from sdlora.generation.prompts import parse_tags

_SCHEDULES = ("Karras", "Exponential", "Polyexponential", "SGM Uniform", "Uniform", "Beta", "Normal", "Simple")
"""What old versions wrote behind the sampler's name."""
_UNSCHEDULED = ("DPM fast", "DPM adaptive")
"""Whatever schedule was chosen, it had no part in these."""
_EMPHASES = {"Original": "original", "No norm": "no norm", "Ignore": "ignore", "None": "none"}
_TOLD = {
    "Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size-1", "Size-2", "Model", "Model hash", "Clip skip",
    "Emphasis", "Lora hashes", "TI hashes", "Version", "RNG", "Noise Schedule", "CFG Rescale phi",
}  # fmt: skip
_HIRES_FIELDS = {"hires_scale": "Hires upscale", "hires_strength": "Denoising strength"}
_OTHERS = 12
"""Fields of extensions that are named one by one."""


def foreign_infotext(text: str) -> ForeignRecipe:
    """Return what an infotext says. Raises FormatError, without a file's name, where it has no line of fields."""
    said = parse_infotext(text)
    if not said.fields:
        raise FormatError("its text has no line of settings such as 'Steps: 20, Sampler: Euler a, Seed: 1'")
    tagged = parse_tags(said.prompt)
    settings, unclear = _settings(said)
    # Where everything is text, nothing is chosen, and a backslash would be text too.
    spelt: Callable[[str], str] = str if settings.get("emphasis") == "none" else without_choices
    loras = [
        ForeignAdapter(
            tag.name,
            tag.unet,
            None if tag.unet == tag.text_encoder else tag.text_encoder,
            _hashes(said, tag.name),
            blocks=tag.blocks,
            steps=tag.steps,
        )
        for tag in tagged.tags
    ]
    words = [ForeignAdapter(name, hashes=(digest,), embedding=True) for name, digest in said.embedding_hashes.items()]
    return ForeignRecipe(
        program=_program(said.fields.get("Version", "")),
        prompt=spelt(tagged.text.strip()),
        negative_prompt=spelt(said.negative_prompt),
        settings=settings,
        base=said.fields.get("Model", ""),
        base_hash=said.fields.get("Model hash", "") or said.hashes.get("model", ""),
        adapters=(*loras, *words),
        left_out=(*unclear, *_left_out(said), *(f"tag {tag[:60]}" for tag in tagged.others)),
    )


def _settings(said: Infotext) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that are there, and those that are none."""
    fields = said.fields
    numbers: dict[str, tuple[str, Any]] = {
        "seed": ("Seed", as_integer),
        "steps": ("Steps", as_integer),
        "guidance_scale": ("CFG scale", as_number),
        "width": ("Size-1", as_integer),
        "height": ("Size-2", as_integer),
        "clip_skip": ("Clip skip", as_integer),
        "guidance_rescale": ("CFG Rescale phi", as_number),
    }
    read = {name: parse(fields[key]) for name, (key, parse) in numbers.items() if key in fields}
    unclear = [f"{numbers[name][0]} {fields[numbers[name][0]][:40]!r}" for name, value in read.items() if value is None]
    settings = {name: value for name, value in read.items() if value is not None}
    settings |= _sampler(fields.get("Sampler", ""), fields.get("Schedule type", ""))
    # What says nothing of it drew on the GPU.
    settings["noise"] = "cpu" if fields.get("RNG") == "CPU" else "cuda"
    settings |= _hires(fields)
    if fields.get("Noise Schedule") == "Zero Terminal SNR":
        settings["zero_snr"] = "on"
    if emphasis := fields.get("Emphasis"):
        if emphasis in _EMPHASES:
            settings["emphasis"] = _EMPHASES[emphasis]
        else:
            unclear.append(f"Emphasis {emphasis[:40]!r}")
    return settings, unclear


def _sampler(name: str, schedule: str) -> dict[str, str]:
    if not schedule:
        ending = next((known for known in _SCHEDULES if name.endswith(f" {known}")), "")
        name, schedule = name.removesuffix(f" {ending}") if ending else name, ending
    if name in _UNSCHEDULED:
        schedule = ""
    found = {"sampler": name, "schedule": "" if schedule == "Automatic" else schedule}
    return {key: value for key, value in found.items() if value}


def _hires(fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the second pass, where it is one that is made here too."""
    upscaler = next((known for known, name in UPSCALERS.items() if name == fields.get("Hires upscaler")), None)
    values = {key: as_number(fields.get(name, "")) for key, name in _HIRES_FIELDS.items()}
    if upscaler is None or not values["hires_scale"]:
        return {}
    steps = as_integer(fields.get("Hires steps", ""))
    found = {**values, "hires_upscaler": upscaler, "hires_steps": steps}
    return {key: value for key, value in found.items() if value is not None}


def _hashes(said: Infotext, name: str) -> tuple[str, ...]:
    bare = re.sub("[:,]", "", name)
    return tuple(filter(None, (said.lora_hashes.get(bare), said.hashes.get(f"lora:{name}"))))


def _left_out(said: Infotext) -> list[str]:
    fields, found = said.fields, []
    told = _TOLD | ({*_HIRES_FIELDS.values(), "Hires upscaler", "Hires steps"} if _hires(fields) else set())
    others = [key for key in fields if key not in told]
    found += [f"{key} {fields[key][:40]}" for key in others[:_OTHERS]]
    if len(others) > _OTHERS:
        found.append(f"{len(others) - _OTHERS} further fields")
    return found


def _program(version: str) -> str:
    if version.startswith("sdlora"):
        return "sdlora"
    return "Forge" if re.match(r"f\d|neo", version) else "AUTOMATIC1111"

"""The settings of a job by the names that people and other programs give them, and how their values are written."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from sdlora.config.section import is_file_stem
from sdlora.errors import ConfigError
from sdlora.generation.adapter_text import parse_adapters
from sdlora.generation.control_text import split_control
from sdlora.generation.pictures.files import SUFFIXES
from sdlora.generation.pictures.names import FIELDS_OF_THE_MOMENT, template_fields
from sdlora.generation.request import LATENT_UPSCALERS, PIXEL_UPSCALERS, GenerationRequest, idle_settings
from sdlora.storage import is_there, user_path

BESIDE_REQUEST = ("weight", "size", "name")
"""What a job may say besides a request's settings: the weight of all its adapters, width and height, its file's name."""
FILES = ("image", "mask", "hires_upscaler")
"""Settings that may name files besides adapters."""
FIELDS = (*GenerationRequest.model_fields, *BESIDE_REQUEST)
ALIASES: Mapping[str, str] = MappingProxyType({
    "p": "prompt", "text": "prompt", "caption": "prompt",
    "n": "negative_prompt", "neg": "negative_prompt", "negative": "negative_prompt",
    "d": "seed",
    "s": "steps", "num_inference_steps": "steps", "sampling_steps": "steps",
    "l": "guidance_scale", "cfg": "guidance_scale", "cfg_scale": "guidance_scale", "guidance": "guidance_scale",
    "scale": "guidance_scale",
    "w": "width", "h": "height", "resolution": "size",
    "batch_size": "count", "n_iter": "count", "batch_count": "count", "images": "count", "num_images": "count",
    "clipskip": "clip_skip",
    "sampler_name": "sampler", "ss": "sampler", "scheduler": "schedule", "schedule_type": "schedule",
    "denoising_strength": "strength", "init_image": "image",
    "adapter": "adapters", "lora": "adapters", "loras": "adapters",
    "lora_weight": "weight", "adapter_weight": "weight", "weights": "weight",
    "file": "name", "filename": "name", "output": "name",
})  # fmt: skip
"""Other names: kohya's letters, AUTOMATIC1111's and diffusers' words -> ours."""
_WITHOUT_MEANING = {
    "sd_model", "sd_model_name", "sd_model_hash", "outpath_samples", "outpath_grids", "prompt_for_display", "styles",
    "subseed", "subseed_strength", "seed_resize_from_h", "seed_resize_from_w", "restore_faces", "tiling",
    "do_not_save_samples", "do_not_save_grid", "sampler_index",
}  # fmt: skip
"""What AUTOMATIC1111 takes in its lists of prompts, and sdlora does not have."""
SHEETS = "sheets"
"""The folder of a batch's contact sheets and grids, which no job's picture may lie in."""
_LONGEST_NAME_BYTES = 200
"""Of a file or folder; systems allow 255, and seed and suffix may follow."""
_SIZE = re.compile(r"\s*(\d+)\s*[x*×]\s*(\d+)\s*")


@functools.lru_cache(maxsize=1024)  # a file says the same few names in every line
def field_of(name: str) -> str:
    """Return the setting that people call so. Raises ConfigError that names the nearest for an unknown one."""
    plain = re.sub(r"[\s-]+", "_", name.strip().lower())
    field = plain if plain in FIELDS else ALIASES.get(plain, "")
    if field in FIELDS:
        return field
    if plain in _WITHOUT_MEANING:
        raise ConfigError(f"{name} is a setting of AUTOMATIC1111 that sdlora does not have; leave it out")
    known = [*FIELDS, *(alias for alias, target in ALIASES.items() if target in FIELDS and len(alias) > 2)]
    near = difflib.get_close_matches(plain, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(FIELDS)}"
    raise ConfigError(f"unknown setting {name[:60]!r}; {hint}")


def by_field(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return {setting: value} of (what it is called, value).

    The several ways to say how many (AUTOMATIC1111's batch_size and n_iter) are multiplied. Raises one ConfigError for all
    unknown settings and all that are given twice.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    named: dict[str, str] = {}
    for name, value in pairs:
        try:
            field = field_of(name)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if field in values and (field != "count" or name in named.values()):
            twice = f"{field} is given twice" + (f", as {named[field]} and {name}" if name != named[field] else "")
            problems.append(twice)
            continue
        values[field] = _product(values[field], value) if field in values else value
        named[field] = name
    if problems:
        raise ConfigError("; ".join(problems))
    return values


def files_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return {setting: file} of the values that name one; an upscaler may be one that is built in."""
    named = {name: values[name] for name in FILES if isinstance(values.get(name), str) and values[name]}
    return {name: file for name, file in named.items() if file not in (*LATENT_UPSCALERS, *PIXEL_UPSCALERS)}


def place_of(name: str, folder: Path, here_first: bool = False) -> str:
    """Return where that file or folder is: beside the jobs, in `folder`, or from here; unchanged where neither has it.

    What a jobs file says is looked for beside it first, what the command line says from here first.
    """
    beside = folder / user_path(name)
    if (here_first and is_there(user_path(name))) or not is_there(beside):
        return name
    return str(beside)


def over(defaults: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults with what a job says in their place; its size takes that of width and height, and theirs that of size."""
    return {**{field: defaults[field] for field in kept(defaults, said)}, **said}


def kept(defaults: Iterable[str], said: Mapping[str, Any]) -> frozenset[str]:
    """Return the defaults that hold beside what a job says."""
    taken = {"size"} if said.keys() & {"width", "height"} else {"width", "height"} if "size" in said else set()
    return frozenset(defaults) - taken - said.keys()


class Read(NamedTuple):
    """What a job's values make."""

    request: dict[str, Any]
    name: str
    """Of its file, "" for any."""
    problems: list[str]
    idle: set[str]
    """The defaults that do nothing for it."""


def read_values(values: Mapping[str, Any], defaults: Collection[str] = ()) -> Read:
    """Return what the values make, some of which are defaults: of these, what does nothing for this job is left out.

    A default weight is that of adapters that name none. Size, adapters, weight and name are checked here; the rest is
    the request's to check.
    """
    idle = _idle(values, defaults)
    left = {field: value for field, value in values.items() if field not in idle}
    made = {field: value for field, value in left.items() if field not in BESIDE_REQUEST}
    problems = []
    take_adapters = functools.partial(_take_adapters, weight_is_default="weight" in defaults)
    for take in (_take_seed, _take_size, take_adapters, _take_control, _check_name):
        try:
            take(left, made)
        except ConfigError as error:
            problems.append(str(error))
    return Read(made, str(values.get("name", "")), problems, idle)


def _idle(values: Mapping[str, Any], defaults: Collection[str]) -> set[str]:
    """Return the defaults that do nothing beside the other values."""
    idle = {"mask"} if not values.get("image") else {"hires_scale"}
    if not values.get("adapters"):
        idle.add("weight")
    left = {name: value for name, value in values.items() if name not in idle.intersection(defaults)}
    idle.update(idle_settings(left))
    return idle.intersection(defaults, values)


def name_parts(name: str) -> tuple[str, str]:
    """Return a name without the suffix of a picture, and that suffix, "" where it has none."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, f".{suffix}".lower()) if f"{dot}{suffix}".lower() in SUFFIXES else (name, "")


def _take_seed(values: Mapping[str, Any], made: dict[str, Any]) -> None:
    if str(values.get("seed", "")).strip() == "-1":
        del made["seed"]
        raise ConfigError(
            "seed is -1; a batch that can go on where it stopped has no random seeds: give a number, or leave it out for 0"
        )


def _take_size(values: Mapping[str, Any], made: dict[str, Any]) -> None:
    if "size" not in values:
        return
    size = values["size"]
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise ConfigError(f"size is {size!r}; expected for example '512x768'")
    if values.keys() & {"width", "height"}:
        raise ConfigError("size is given beside width or height; give one of them")
    made["width"], made["height"] = int(match[1]), int(match[2])


def _take_adapters(values: Mapping[str, Any], made: dict[str, Any], weight_is_default: bool) -> None:
    """The request has the job's adapters, each with the job's weight where it gives one."""
    made.pop("adapters", None)
    adapters = _adapters(values["adapters"]) if "adapters" in values else None
    if "weight" in values:
        if adapters is None:
            raise ConfigError(f"weight is {values['weight']!r} but no adapter is named")
        own = {"weight": values["weight"]}
        adapters = [{**own, **adapter} if weight_is_default else {**adapter, **own} for adapter in adapters]
    if adapters is not None:
        made["adapters"] = adapters


def _adapters(value: Any) -> list[dict[str, Any]]:
    """Return the adapters of "a:0.8;b", of a table, or of a list of these."""
    if isinstance(value, str):
        return parse_adapters(value)
    if isinstance(value, Mapping):
        renamed = {"path" if key in ("name", "file", "adapter") else str(key): inner for key, inner in value.items()}
        if not isinstance(renamed.get("path", ""), str):
            raise ConfigError(f"adapters: {renamed['path']!r} is no file's name")
        return [renamed]
    if isinstance(value, Sequence):
        return [adapter for item in value for adapter in _adapters(item)]
    raise ConfigError(f"adapters is {value!r}; expected for example 'my-cat:0.8;oldfilm:0.5'")


def is_template(name: str) -> bool:
    """Return whether a name has fields, such as {seed}, that each picture fills in."""
    return "{" in name or "}" in name


def refuse_sheets(name: str) -> None:
    """Raise ConfigError for a name in the folder of contact sheets and grids."""
    if "/" in name and name.partition("/")[0].casefold() == SHEETS:
        raise ConfigError(f"name is {name[:80]!r}; the folder {SHEETS} is for contact sheets and grids, choose another")


def _take_control(values: Mapping[str, Any], made: dict[str, Any]) -> None:
    """The request has the job's ControlNets, from a text, a table, or a list of tables."""
    if "control" in values:
        control = made.pop("control")
        listed = [control] if isinstance(control, str | Mapping) else control
        if not isinstance(listed, Sequence):
            raise ConfigError(f"control is {control!r}; expected for example 'canny.safetensors edges.png 0.8'")
        made["control"] = [
            split_control(one) if isinstance(one, str) else dict(one) if isinstance(one, Mapping) else one
            for one in listed
        ]


def _check_name(values: Mapping[str, Any], made: dict[str, Any]) -> None:
    if (name := values.get("name", "")) != "":
        check_name(name)


def check_name(name: object) -> None:
    """Raise ConfigError for what is neither the name of a file nor a template of names."""
    if not isinstance(name, str):
        raise ConfigError(f"name is {name!r}; expected a file's name")
    stem, _ = name_parts(name)
    if is_template(stem) or not name:
        _check_fields(stem)
        return
    if not all(is_file_stem(part) and part.strip(" .") == part for part in stem.split("/")):
        raise ConfigError(
            f"name is {name[:80]!r}; expected a file's name of letters, digits, spaces and . _ -, in folders parted by /, or "
            "fields such as {seed}"
        )
    if any(len(part.encode()) > _LONGEST_NAME_BYTES for part in stem.split("/")):
        raise ConfigError(f"name {name[:40]!r}... is longer than {_LONGEST_NAME_BYTES} bytes; give a shorter one")
    refuse_sheets(stem)


def _check_fields(template: str) -> None:
    """Raise ConfigError for a template that is none, and for fields that only a picture that is made has."""
    if passing := sorted(template_fields(template).intersection(FIELDS_OF_THE_MOMENT)):
        raise ConfigError(
            f"name is {template[:80]!r}; a batch's names are decided before it begins, so that it goes on under the same: "
            f"write what you want for {{{passing[0]}}} itself"
        )


def _product(one: Any, other: Any) -> Any:
    """Return the product of two counts, or the one that is none, which the request will refuse."""
    try:
        return math.prod(int(str(value)) for value in (one, other))
    except ValueError:
        return one if not str(one).isdigit() else other

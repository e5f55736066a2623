"""The plan of a batch: every picture with its identity and its file's name, all decided before the first is made."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdlora.adapters.file import adapter_family
from sdlora.adapters.fit import refuse_other_family
from sdlora.adapters.stored import adapter_hashes
from sdlora.config import BaseSection
from sdlora.families.controls import refuse_control_of_another_family
from sdlora.families.registry import BaseDescription, describe_base
from sdlora.families.schedule import refuse_pure_noise
from sdlora.generation.asked import Asked, FindAdapter, asked_pictures, read_folder
from sdlora.generation.batch.faults import Faults
from sdlora.generation.batch.grid import Point
from sdlora.generation.batch.job_fields import FILES, files_of, name_parts
from sdlora.generation.batch.jobs import Job
from sdlora.generation.batch.names import FileNames
from sdlora.generation.batches import neighbours
from sdlora.generation.controls import AskedControl
from sdlora.generation.img2img.source import work_size
from sdlora.generation.pictures.files import PNG, FileFormat
from sdlora.generation.recipe import Recipe, UsedAdapter
from sdlora.generation.request import AdapterChoice, GenerationRequest, idle_settings
from sdlora.storage import sha256_while_unchanged, user_path

_NOT_THE_PICTURES = ("prompt", "negative_prompt", "seed", "count", "wildcards", "adapters")
"""Settings of a request that a picture's identity holds in another form."""
_TOLD_BY_RECIPES = ("steps", "guidance_scale", "guidance_rescale", "emphasis", "clip_skip", "sampler", "zero_snr")
"""Settings that recipes have under the same names."""
_BASE_SETTINGS = ("precision", "quantize", "prediction")


@dataclass(frozen=True)
class Picture:
    """One picture that is to be there in the end."""

    identity: str
    """SHA-256 of all that makes it: its final prompts and settings, the contents of base and adapters."""
    file: str
    """Below the folder of the batch."""
    request: GenerationRequest
    """For this picture alone."""
    where: str
    """Its job: "jobs.txt:12"."""
    point: Point = ()
    """Where in a grid it is."""
    cost: float = 1.0
    """How much work it is, in steps times pixels of both passes, twice that where a negative prompt takes part."""
    pixels: int = 0
    """Of its file, before it is compressed."""


@dataclass(frozen=True)
class BatchPlan:
    """All pictures of a batch, in the order of its jobs."""

    base: BaseSection
    base_sha256: str
    pictures: tuple[Picture, ...]
    """A picture that several jobs ask for stands here for each of them, with one identity and file."""

    def different(self) -> list[Picture]:
        """Return each picture once."""
        return list({picture.identity: picture for picture in reversed(self.pictures)}.values())[::-1]


def plan_batch(
    jobs: Sequence[Job],
    base: BaseSection,
    find_adapter: FindAdapter | None = None,
    faults: Faults | None = None,
    form: FileFormat = PNG,
) -> BatchPlan:
    """Return every picture of the jobs, with a name of its own.

    Nothing is loaded: families are told from headers, contents by their hashes. Raises one ConfigError for all tags and
    files that name no adapter, adapters of another family, folders of wildcards that cannot be read, names that two jobs
    have or that end as another format, and schedules that the base cannot begin, and for the `faults` that were found before;
    ModelError where the base is none.
    """
    described = describe_base(base)
    planner = _Planner(described, find_adapter, form)
    faults = faults or Faults()
    pictures: list[Picture] = []
    for job in jobs:
        with faults.of(job.where):
            for asked in asked_pictures(job.request, 0, find_adapter, planner.read):
                pictures.append(planner.picture(job, asked, len(pictures) + 1))
    files = planner.names.settled(faults)
    faults.raise_all("the jobs")
    placed = (replace(picture, file=files[picture.identity]) for picture in pictures)
    return BatchPlan(base, described.sha256, tuple(placed))


class _Planner:
    """Knows what all pictures of a batch share, each file read once."""

    def __init__(self, base: BaseDescription, find_adapter: FindAdapter | None, form: FileFormat) -> None:
        self._base = base
        self.read = functools.cache(read_folder)
        self._find_adapter = find_adapter
        self._base_name = base.section.path
        self._form = form
        self.names = FileNames(base, form.suffix)
        self._shared = {"base": base.sha256, **{name: getattr(base.section, name) for name in _BASE_SETTINGS}}
        self._hash_of = functools.cache(self._checked_hash)

    def picture(self, job: Job, asked: Asked, number: int) -> Picture:
        """Return the picture that was asked for, whose file is known when all are. Raises as `plan_batch` does."""
        if job.request.zero_snr == "on":
            refuse_pure_noise(self._base.prediction, self._base_name)
        made_of = {
            **self._shared,
            **self._settings(job.request),
            **({"control": [self._control(one) for one in asked.controls]} if asked.controls else {}),
            "prompt": asked.texts.prompt,
            "negative_prompt": asked.texts.negative_prompt,
            "seed": asked.seed,
            "adapters": [self._acting(choice) for choice in asked.adapters],
            **({"name": name_parts(job.name)[0]} if job.name else {}),
            **({"format": list(self._form)} if self._form != PNG else {}),
        }
        identity = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        single = job.request.model_copy(update={"seed": asked.seed, "count": 1})
        first = work_size(asked.request, asked.source.size if asked.source else None, self._base.side)
        work, pixels = _work(asked, first)
        self.names.add(job, asked, identity, number, first)
        return Picture(identity, "", single, job.where, job.point, work * (2 if asked.guided else 1), pixels)

    def _settings(self, request: GenerationRequest) -> Mapping[str, Any]:
        """Return the settings that are not as they are unsaid, so that a setting of a later version changes no identity."""
        given = request.model_dump(exclude_defaults=True, exclude=set(_NOT_THE_PICTURES))
        idle = idle_settings(given).keys()
        values = {name: value for name, value in given.items() if name not in idle}
        return {**values, **{name: sha256_while_unchanged(user_path(file)) for name, file in files_of(values).items()}}

    def _control(self, control: AskedControl) -> list[Any]:
        """Return what a ControlNet does. Raises ModelError where it is none for this base."""
        refuse_control_of_another_family(control.facts, self._base.facts.family, self._base_name)
        used = control.used
        return [used.sha256, used.picture.sha256, used.strength, used.start, used.end]

    def _acting(self, choice: AdapterChoice) -> list[Any]:
        own = choice.text_encoder_weight
        over = [choice.blocks, choice.steps] if choice.blocks or choice.steps else []
        return [self._hash_of(choice.path), choice.weight, choice.weight if own is None else own, *over]

    def _checked_hash(self, path: str) -> str:
        """Return the SHA-256 of an adapter's file. Raises FormatError or ModelError where it is none for this base."""
        refuse_other_family(adapter_family(path), self._base.facts.family, self._base_name)
        return adapter_hashes(user_path(path))[0]


def _work(asked: Asked, first: tuple[int, int]) -> tuple[float, int]:
    """Return steps times pixels of all passes, the `first` of that size, and the pixels of the file.

    Raises ConfigError for a second pass too large.
    """
    request, source = asked.request, asked.source
    work, last = request.steps * (request.strength if source else 1) * math.prod(first), first
    if asked.hires:
        last = asked.hires.size(first)
        work += asked.hires.run_steps * math.prod(last)
    elif source and request.mask and request.inpaint_area == "only masked":
        last = source.size
    return max(work, float(math.prod(first))), math.prod(last)


def recipe_fits(recipe: Recipe, picture: Picture, plan: BatchPlan, find_adapter: FindAdapter | None) -> bool:
    """Return whether that recipe is one of this picture, as far as both tell."""
    (asked,) = asked_pictures(picture.request, 0, find_adapter)
    request = picture.request
    return (
        recipe.base_sha256 == plan.base_sha256
        and plan.base.precision in ("auto", recipe.precision)
        and recipe.quantize == plan.base.quantize
        and (recipe.prompt, recipe.negative_prompt) == (asked.texts.prompt, asked.texts.negative_prompt)
        and recipe.seed == asked.seed
        and all(getattr(recipe, name) == getattr(request, name) for name in _TOLD_BY_RECIPES)
        and recipe.schedule == (request.schedule or recipe.schedule)
        and recipe.noise_device == request.noise
        and recipe.width == (request.width or recipe.width)
        and recipe.height == (request.height or recipe.height)
        and recipe.start == (asked.source.used if asked.source else None)
        and recipe.controls == tuple(control.used for control in asked.controls)
        and recipe.hires == (asked.hires.used if asked.hires else None)
        and [_as_used(used) for used in recipe.adapters] == [_as_asked(choice) for choice in asked.adapters]
    )


def _as_used(used: UsedAdapter) -> tuple[Any, ...]:
    return used.sha256, used.weight, used.text_encoder_weight, used.blocks, used.steps


def _as_asked(choice: AdapterChoice) -> tuple[Any, ...]:
    own = None if choice.text_encoder_weight == choice.weight else choice.text_encoder_weight
    return adapter_hashes(user_path(choice.path))[0], choice.weight, own, choice.blocks, choice.steps


def in_groups(pictures: Sequence[Picture]) -> list[list[Picture]]:
    """Return the pictures in groups that may be made together, those with the same adapters next to one another.

    What only a loaded base can tell, such as the tokens of a prompt, may part a group again.
    """
    groups: dict[str, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(_kind(picture.request), []).append(picture)
    return [neighbours(group, lambda picture: picture.request.adapters) for group in groups.values()]


def _kind(request: GenerationRequest) -> str:
    """Return what pictures of one batch have in common, as far as requests tell."""
    values = request.model_dump(exclude={*_NOT_THE_PICTURES, *FILES, "guidance_scale", "control"})
    models = [control.model for control in request.control]
    return json.dumps([request.guidance_scale > 1, values, models], sort_keys=True)


def refuse_taken_files(pictures: Sequence[Picture], folder: Path) -> None:
    """Raise one ConfigError for the files that are there already and are other pictures."""
    faults = Faults()
    for picture in pictures:
        faults.tell(
            picture.where,
            f"{folder / picture.file} is there and is another picture; choose another name or --out, or give --overwrite",
        )
    faults.raise_all("the names of the pictures")

"""What a whole configuration must have, and what in it is at odds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from sdlora.config.data import ConceptSection, DataSection
from sdlora.config.presets import lasting_clashes
from sdlora.config.section import is_file_stem, setting_at
from sdlora.config.sections import TrainConfig
from sdlora.errors import ConfigError


def require_complete(config: TrainConfig) -> None:
    """Raise one ConfigError for everything that only a whole configuration shows to be missing or at odds."""
    problems = []
    if not config.base.path:
        problems.append('base.path is not set (for example "tiny", a folder, or a .safetensors file)')
    problems += _problems_of_data(config.data)
    if not config.output.folder:
        problems.append("output.folder is not set (where the adapter goes)")
    if not is_file_stem(config.output.name):
        problems.append(f"output.name is {config.output.name!r}; use letters, digits, '-', '_' and '.'")
    problems += [clash.sentence for clash in lasting_clashes(config)]
    _raise(problems)


def require_sound_data(data: DataSection) -> None:
    """Raise one ConfigError for everything about the data that only its settings together show to be wrong."""
    _raise([*_problems_of_data(data)])


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("configuration: " + "; ".join(problems))


def _problems_of_data(data: DataSection) -> Iterator[str]:
    if data.concepts and data.folder:
        yield "data.folder is set beside data.concepts; give each concept its folder, or set data.folder alone"
    if not data.concepts and not data.folder:
        yield "data.folder is not set (the folder of training pictures)"
    named = {f"data.concepts.{number}": concept for number, concept in enumerate(data.concepts)}
    for where, concept in named.items():
        if not concept.folder:
            yield f"{where}.folder is not set (the folder of the concept's pictures)"
    for where, concept in ({"data": data} | named).items():
        for key in ("resolution", "buckets.step", "buckets.min_side", "buckets.max_side"):
            if (value := setting_at(concept, key)) % 8:
                yield f"{where}.{key} is {value}; it must be a multiple of 8"
        yield from (f"{where}.captions.{problem}" for problem in _problems_of_captions(concept))
        low, high = concept.buckets.min_side, concept.buckets.max_side
        if high and low > high:
            yield f"{where}.buckets.min_side is {low}, more than max_side = {high}"
        if concept.masks.source == "folder" and not concept.masks.folder:
            yield f'{where}.masks.folder is not set, as {where}.masks.source = "folder" needs it'
        if concept.caption_from == "instance" and not concept.caption:
            yield f'{where}.caption is not set, as {where}.caption_from = "instance" needs it'
        if data.prior.source != "folder" and not concept.class_prompt and (concept is not data or not named):
            yield f'{where}.class_prompt is not set, as data.prior.source = "{data.prior.source}" needs it'
        if concept.buckets.short_batches != data.buckets.short_batches:
            yield f"{where}.buckets.short_batches differs from data.buckets.short_batches, which holds for all; set it there"
        for suffix in concept.caption_suffixes:
            if not re.fullmatch(r"\.?[\w.-]{1,40}", suffix) or not suffix.strip("."):
                yield f'{where}.caption_suffixes holds {suffix!r}; expected endings such as ".txt"'
    if data.prior.folder and data.prior.source != "folder":
        yield f'data.prior.folder is set beside data.prior.source = "{data.prior.source}", which does not use it; unset one'
    if data.prior.source == "training" and data.prior.target == "picture":
        yield 'data.prior.target is "picture", which data.prior.source = "training" has none of; set it to "base"'


def _problems_of_captions(concept: ConceptSection) -> Iterator[str]:
    rules = concept.captions
    if not rules.separator:
        yield "separator is empty; set it to what lies between tags, such as a comma"
    marks = {name: mark for name in ("keep_separator", "secondary_separator") if (mark := getattr(rules, name))}
    for name, mark in marks.items():
        if rules.separator and rules.separator in mark:
            yield f"{name} is {mark!r}, which holds the separator {rules.separator!r}; choose another mark"
    if len(set(marks.values())) < len(marks):
        yield f"secondary_separator is {rules.secondary_separator!r}, as keep_separator is; choose two marks"
    if rules.insert_trigger and not concept.trigger:
        yield "insert_trigger is set, and no trigger; set data.trigger"

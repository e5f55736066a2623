"""From TOML and flags to a checked configuration, and back to TOML."""

from __future__ import annotations

import difflib
import re
import reprlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError

from sdlora.config.data import ConceptSection, DataSection
from sdlora.config.section import Section
from sdlora.config.sections import TARGET_PRESETS, TrainConfig
from sdlora.errors import ConfigError
from sdlora.storage import write_text

SectionType = TypeVar("SectionType", bound=Section)


def validated(kind: type[SectionType], values: Mapping[str, Any], where: str) -> SectionType:
    """Return `kind` made of `values`. Raises one ConfigError that names every wrong key and value."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_problem(kind, dict(item)) for item in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(problems)) from error


def parse_config(values: Mapping[str, Any], where: str = "configuration") -> TrainConfig:
    """Return the checked configuration of a training run. Raises ConfigError."""
    return validated(TrainConfig, values, where)


def load_config(path: Path) -> dict[str, Any]:
    """Return the nested values of a TOML file, unchecked. Raises ConfigError when it does not parse."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such configuration file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML ({error})") from error


def require_complete(config: TrainConfig) -> None:
    """Raise one ConfigError for everything that only a whole configuration shows to be missing or at odds."""
    problems = []
    if not config.base.path:
        problems.append('base.path is not set (for example "tiny", a folder, or a .safetensors file)')
    problems += _problems_of_data(config.data)
    if not config.output.folder:
        problems.append("output.folder is not set (where the adapter goes)")
    if not re.fullmatch(r"[\w. -]+", config.output.name) or config.output.name.startswith("."):
        problems.append(f"output.name is {config.output.name!r}; use letters, digits, '-', '_' and '.'")
    if not config.adapter.targets:
        problems.append(f"adapter.targets is empty; name one of {', '.join(TARGET_PRESETS)} or module patterns")
    if config.optimizer.warmup_steps > config.training.steps:
        problems.append(
            f"optimizer.warmup_steps is {config.optimizer.warmup_steps}, more than "
            f"training.steps = {config.training.steps}"
        )
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


def write_config(config: TrainConfig, path: Path) -> None:
    """`path` holds the resolved configuration as TOML that `load_config` reads back to the same values."""
    values = config.model_dump(mode="json")
    values["data"]["concepts"] = [_unshared(values["data"], concept) for concept in values["data"]["concepts"]]
    try:
        write_text(path, tomli_w.dumps(values))
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"configuration: {error.object[:60]!r} is no text in UTF-8; rename the file or folder"
        ) from error


def _unshared(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `own` holds that `shared` does not hand down to it when it is read again."""
    kept = {}
    for key, value in own.items():
        if isinstance(value, Mapping):
            if inner := _unshared(shared[key], value):
                kept[key] = inner
        elif key == "folder" or value != shared[key]:
            kept[key] = value
    return kept


def setting_at(section: Section, key: str) -> Any:
    """Return the value of a setting by its dotted name, such as "data.captions.shuffle"."""
    return reduce(getattr, key.split("."), section)


def put_setting(values: dict[str, Any], key: str, value: Any) -> None:
    """`values`, nested tables, hold `value` under the dotted name `key`."""
    *tables, last = key.split(".")
    for name in tables:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            return  # what is there is wrong, and will be said to be
        values = inner
    values[last] = value


def field_descriptions(kind: type[Section] = TrainConfig) -> dict[str, str]:
    """Return {"section.field": description} in order, for help texts and the documentation."""
    found: dict[str, str] = {}
    for name, info in kind.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            inside = field_descriptions(info.annotation)
            found |= {f"{name}.{key}": text for key, text in inside.items()}
        else:
            found[name] = info.description or ""
    return found


def _problem(kind: type[Section], item: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(kind, key)}"
    if item["type"] == "missing":
        return f"{key} is not given"
    expectation = item["msg"].removeprefix("Value error, ")
    if not key:
        return expectation
    return f"{key} is {reprlib.repr(item['input'])}; {expectation[0].lower() + expectation[1:]}"


def _nearest(kind: type[Section], key: str) -> str:
    """Return "; did you mean ...?": the same name in another section, the nearest key, the nearest name."""
    known = sorted(field_descriptions(kind), key=lambda path: path.count("."))
    last_names = {
        path.rpartition(".")[2]: path for path in reversed(known)
    }  # the outermost, then the first section wins
    sections = {path.split(".")[0]: path.split(".")[0] for path in known if "." in path}
    last = key.rpartition(".")[2]
    if last in last_names:
        return f"; did you mean {last_names[last]}?"
    for word, names, cutoff in ((key, {path: path for path in known} | sections, 0.75), (last, last_names, 0.7)):
        if close := difflib.get_close_matches(word, names, n=1, cutoff=cutoff):
            return f"; did you mean {names[close[0]]}?"
    return f"; known are {', '.join(sections or known)}"

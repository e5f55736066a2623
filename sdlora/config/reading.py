"""From TOML and flags to a checked configuration, and back to TOML."""

from __future__ import annotations

import difflib
import re
import reprlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import tomli_w
from pydantic import ValidationError

from sdlora.config.section import Section, setting_at
from sdlora.config.sections import OPTIMIZERS, TrainConfig
from sdlora.errors import ConfigError
from sdlora.storage import write_text

_HINTS = {
    "adapter.kind locon": "adapter.conv_rank",
    "adapter.kind dora": "adapter.dora = true",
    "adapter.kind rslora": "adapter.rank_stabilized = true",
    "adapter.kind pissa": 'adapter.start = "pissa"',
    "adapter.kind olora": 'adapter.start = "olora"',
    "tokens.train true": 'tokens.train = "together"',
    "tokens.train pivotal": 'tokens.train = "together"',
    "tokens.train textual-inversion": 'tokens.train = "alone"',
}
"""What people know by another name: setting and value -> the setting here."""

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


def is_table(key: str) -> bool:
    """Return whether a setting holds tables, or names of the user's choosing, and so has no flag."""
    return key == "data.concepts" or isinstance(setting_at(TrainConfig(), key), dict)


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
            found[name] = _with_choices(info.description or "", _choices(info.annotation))
    return found


def _choices(annotation: Any) -> tuple[str, ...]:
    """Return the values that a type allows, where these are listed."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for inner in get_args(annotation) if (found := _choices(inner))), ())


def _with_choices(description: str, choices: Sequence[str]) -> str:
    """Return the description with the values it does not name itself."""
    if all(re.search(rf"(?<![\w-]){re.escape(choice)}(?![\w-])", description) for choice in choices):
        return description
    return f"{description} One of {', '.join(choices)}."


def _problem(kind: type[Section], item: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(kind, key)}"
    if item["type"] == "missing":
        return f"{key} is not given"
    expectation = item["msg"].removeprefix("Value error, ")
    if key == "optimizer.kind":
        names = ", ".join(repr(name) for name in OPTIMIZERS)
        expectation = f"Input should be {names}, or a class such as 'torch.optim.RAdam'"
    if not key:
        return expectation
    if hint := _HINTS.get(f"{key} {item['input']}".lower()):
        expectation = f"{expectation}; did you mean {hint}?"
    elif item["type"] == "literal_error":
        named = re.findall(r"'([^']+)'", item["ctx"]["expected"])
        close = difflib.get_close_matches(str(item["input"]).lower().replace("_", "-"), named, n=1, cutoff=0.5)
        expectation += f"; did you mean {close[0]}?" if close else ""
    return f"{key} is {reprlib.repr(item['input'])}; {expectation[0].lower() + expectation[1:]}"


def _nearest(kind: type[Section], key: str) -> str:
    """Return "; did you mean ...?": the same name in another section, the nearest key, the nearest name."""
    # Of equal names the outermost wins, then the first section's; few mean the new words' learning rate.
    known = sorted(field_descriptions(kind), key=lambda path: (path.count("."), path.startswith("tokens.")))
    last_names = {path.rpartition(".")[2]: path for path in reversed(known)}
    outermost = {path.partition(".")[0]: path.partition(".")[0] for path in known}
    last = key.rpartition(".")[2]
    if last in last_names:
        return f"; did you mean {last_names[last]}?"
    for word, names, cutoff in ((key, {path: path for path in known} | outermost, 0.75), (last, last_names, 0.7)):
        if close := difflib.get_close_matches(word, names, n=1, cutoff=cutoff):
            return f"; did you mean {names[close[0]]}?"
    return f"; known are {', '.join(outermost)}"

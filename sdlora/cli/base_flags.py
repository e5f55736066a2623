"""The flags by which every command that loads a base is told which, and in what form."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from sdlora import BaseSection

_FLAGS = {
    "revision": "--revision",
    "variant": "--variant",
    "config": "--base-config",
    "tokenizer": "--tokenizer",
    "precision": "--precision",
    "quantize": "--quantize",
    "prediction": "--prediction",
}


def add_base_flags(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """`parser` takes --base, required where it has no default, and one flag for each further setting of [base]."""
    fields = BaseSection.model_fields
    parser.add_argument("--base", default=default, required=default is None, help=fields["path"].description)
    for name, flag in _FLAGS.items():
        options: dict[str, Any] = {"default": fields[name].default, "help": fields[name].description}
        if choices := get_args(fields[name].annotation):
            options["choices"] = choices
        parser.add_argument(flag, **options)


def given_base_flags(options: argparse.Namespace) -> list[str]:
    """Return the flags, --base aside, that say something else of the base than they would unsaid."""
    fields = BaseSection.model_fields
    return [flag for name, flag in _FLAGS.items() if getattr(options, _destination(flag)) != fields[name].default]


def base_section(options: argparse.Namespace) -> BaseSection:
    """Return what the flags say of the base."""
    values = {name: getattr(options, _destination(flag)) for name, flag in _FLAGS.items()}
    return BaseSection(path=options.base, **values)


def _destination(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")

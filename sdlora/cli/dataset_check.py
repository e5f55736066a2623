"""`sdlora dataset check DIR`: what is wrong with the pictures and captions of a run, before the run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from sdlora.config import (
    TrainConfig,
    field_descriptions,
    load_config,
    parse_config,
    put_setting,
    require_sound_data,
    setting_at,
)
from sdlora.errors import ConfigError

_DESCRIPTION = """Say what is wrong with pictures and captions before a run, and show what the model will see.

The exit status is 1 where a training run would refuse the data; warnings and notes leave it at 0.
"""
_EPILOG = """Every --data.SETTING of sdlora train holds here too, and so do its --base.SETTING, --validation.SETTING
and --training.SETTING; see docs/training.md.

--json prints one document: ok, summary, notes, base, resolutions, resolution_assumed, headers_only,
concepts, shapes, cropped, batches, tags, tags_on_every_picture, pictures, and findings, each with kind,
severity (error, warning, note), title, advice, count, and items of text and files.
"""
_SHORT_NAMES = {"base": "base.path", "validation": "validation.folder", "resolution": "data.resolution"}
_SECTIONS = ("base", "data", "training", "validation")
_SECONDS_BETWEEN_LINES = 5.0


def add_parser(commands: Any) -> None:
    """`commands` has the subcommand "check"."""
    parser = commands.add_parser(
        "check",
        help="what is wrong with pictures and captions, before a run",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="sdlora dataset check [DIR] [--config FILE.toml] [--base BASE] [OPTIONS] [--data.SETTING VALUE ...]",
    )
    parser.add_argument("folder", nargs="?", metavar="DIR", help="folder of pictures; may be left out with --config")
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="the run's settings; flags go before them")
    descriptions = field_descriptions()
    parser.add_argument("--base", metavar="BASE", help=f"{descriptions['base.path']} Only its small files are read.")
    parser.add_argument("--validation", metavar="DIR", help=descriptions["validation.folder"])
    parser.add_argument("--resolution", metavar="PIXELS", help=descriptions["data.resolution"])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a contact sheet of all pictures as one page")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="write a contact sheet as pictures: FILE.png, FILE-2.png, ..."
    )
    parser.add_argument(
        "--headers-only", action="store_true", help="decode no picture: quick, but damage and copies are not found"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="how many findings of a kind are listed (default: 10; with --json all)"
    )
    defaults = TrainConfig()
    for key in descriptions:
        if key.partition(".")[0] in _SECTIONS and key != "data.concepts":
            names = dict.fromkeys((f"--{key}", f"--{key.replace('_', '-')}"))
            many = "*" if isinstance(setting_at(defaults, key), tuple) else None
            parser.add_argument(*names, dest=key, nargs=many, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The check is printed, and its sheets are written; returns the exit status. Raises SdloraError."""
    config = _settings(options)
    if options.limit is not None and options.limit < 0:
        raise ConfigError(f"--limit is {options.limit}; expected 0 or more")
    from sdlora.data.check import check_data, report_json, report_text, write_page, write_sheets

    base = None
    if config.base.path:
        from sdlora.families.outline import outline_base

        base = outline_base(config.base)
    report = check_data(config, base, headers_only=options.headers_only, on_progress=_progress("looked at"))
    written = []
    if options.html:
        write_page(report, options.html, on_progress=_progress("drawn"))
        written.append(options.html)
    if options.sheet:
        written += write_sheets(report, options.sheet)
    if options.json:
        print(json.dumps(report_json(report, options.limit), indent=2, ensure_ascii=False))
    else:
        print(report_text(report, options.limit))
        print("".join(f"contact sheet: {path}\n" for path in written), end="")
    return 0 if report.ok else 1


def _settings(options: argparse.Namespace) -> TrainConfig:
    """Return the run's settings: the file's, then the flags'. Raises ConfigError for data settings at odds."""
    values = load_config(options.config) if options.config else {}
    for key, value in vars(options).items():
        if "." in key:
            put_setting(values, key, value)
    for name, key in _SHORT_NAMES.items():
        if getattr(options, name) is not None:
            put_setting(values, key, getattr(options, name))
    if options.folder is not None:
        put_setting(values, "data.folder", options.folder)
    config = parse_config(values, str(options.config or "command line"))
    require_sound_data(config.data)  # what is no matter of the data need not be settled yet
    return config


def _progress(done_so: str) -> Any:
    """Return what tells on a terminal, every few seconds, how far a long check is."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if sys.stderr.isatty() and time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{done_so} {done} of {total} pictures", file=sys.stderr)

    return progress

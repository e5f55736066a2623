"""`sdlora dataset check | caption | cache`: look at pictures before a run, write captions, see to the cache."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from sdlora.cli import dataset_caption, dataset_check


def run(arguments: list[str]) -> int:
    """Do what the subcommand says; returns the exit status. Raises SdloraError."""
    options = _parser().parse_args(arguments)
    return int(options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sdlora dataset", description="Look after the pictures that are trained on.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    dataset_check.add_parser(commands)
    dataset_caption.add_parser(commands)
    cache = commands.add_parser(
        "cache",
        help="how much the encoded pictures and captions take, and removing them",
        description="Encoded pictures and captions are kept for later runs. Without options: say where and how much.",
    )
    cache.add_argument(
        "--folder", default="", metavar="FOLDER", help="another folder than the user's, as data.cache.folder"
    )
    cache.add_argument("--clear", action="store_true", help="remove it, but what a run used in the last half hour")
    cache.add_argument("--force", action="store_true", help="with --clear: remove that too; a run that needs it fails")
    cache.add_argument("--limit-gb", default="", metavar="GB", help="remove what was used least recently, down to this")
    cache.set_defaults(run=_run_cache)
    return parser


def _run_cache(options: argparse.Namespace) -> int:
    from rich.filesize import decimal

    from sdlora.config import CacheSection, DataSection, validated
    from sdlora.data.cache_folder import clear_cache, data_cache, measure_cache, trim_cache

    values = {"folder": options.folder} | ({"limit_gb": options.limit_gb} if options.limit_gb else {})
    section = validated(CacheSection, values, "command line")
    folder: Path = data_cache(DataSection(cache=section))
    if options.clear or options.limit_gb:
        trimmed = partial(trim_cache, folder, int(section.limit_gb * 1e9))
        removed = clear_cache(folder, force=options.force) if options.clear else trimmed()
        print(f"removed {removed.files} files, {decimal(removed.bytes)}")
    left = measure_cache(folder)
    print(f"{folder}: {left.files} files, {decimal(left.bytes)}")
    return 0

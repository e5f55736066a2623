"""What commands that write an adapter have in common: how it is written, checks of numbers, progress."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.adapters.names import FORMATS, PRECISIONS
from sdlora.errors import ConfigError, OutputError
from sdlora.storage import user_path

if TYPE_CHECKING:
    from sdlora.adapters.file import AdapterFile


def add_source_and_target(parser: argparse.ArgumentParser) -> None:
    """The parser takes an adapter to read and where to write."""
    parser.add_argument("source", type=Path, metavar="IN", help="adapter file of any format, or PEFT's folder")
    parser.add_argument("target", type=Path, metavar="OUT", help="file, or for peft folder, to write")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """The parser takes whether a result may replace something."""
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def add_output(parser: argparse.ArgumentParser) -> None:
    """The parser takes how a result is written: its format, its precision, and whether it may replace something."""
    parser.add_argument("--format", choices=FORMATS, default="kohya", help="kohya is read by most programs")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the weights; left out: as they are")
    add_overwrite(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """The parser takes --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def check_target(options: argparse.Namespace, keep: Sequence[Path] = ()) -> None:
    """Raise ConfigError for a target that cannot be one, OutputError for one that may not be replaced.

    `keep` are files and folders that stay whatever is said: the target is none of them, nor in one or around one.
    """
    from sdlora.adapters.convert import refuse_existing
    from sdlora.adapters.write import refuse_foreign_folder, refuse_pickle

    target = user_path(options.target)
    if not target.name:
        raise ConfigError(f"{target}: is no name of a file; name one that ends in .safetensors")
    refuse_pickle(target)
    refuse_existing(target, options.overwrite)
    for place in keep:
        one, other = target.resolve(), place.resolve()
        if one == other or (other.is_dir() and one.is_relative_to(other)) or other.is_relative_to(one):
            raise OutputError(f"{target}: holds {place} or is part of it, which stays as it is; name another")
    if options.format == "peft":
        refuse_foreign_folder(target)


def write_result(adapter: AdapterFile, options: argparse.Namespace) -> None:
    """The adapter is at the target, as a file that reads back as what it is. Raises SdloraError."""
    from sdlora.adapters.convert import write_checked

    write_checked(adapter, user_path(options.target), options.format)


def check_share(flag: str, value: float) -> None:
    """Raise ConfigError where the value is no share of something."""
    if not 0 < value <= 1:
        raise ConfigError(f"{flag} is {value:g}; expected more than 0 and at most 1")


def check_rank(flag: str, rank: int) -> None:
    """Raise ConfigError where it is no rank; 0 stands for none."""
    if rank < 0:
        raise ConfigError(f"{flag} is {rank}; expected 1 or more")


def ranks_of(adapter: AdapterFile) -> list[int]:
    """Return the ranks of an adapter's layers, each once."""
    return sorted({layer.rank for layer in adapter.layers.values()})


def span(numbers: Sequence[int]) -> str:
    """Return a range of numbers, "4" or "2 to 16"."""
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows how many layers are done, on a terminal alone."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal) as shown:
        task = shown.add_task(what)
        yield lambda done, count: shown.update(task, completed=done, total=count)

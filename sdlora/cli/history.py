"""`sdlora history [FOLDER]`: pictures found by what made them; `sdlora history rate PICTURE STARS`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, time
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.cli.adapter_output import add_json, progress
from sdlora.errors import ConfigError
from sdlora.storage import user_path

if TYPE_CHECKING:
    from sdlora.generation.history.query import HistoryEntry

_LONGEST_PROMPT = 100


def run(arguments: list[str]) -> int:
    """Print the pictures that are asked for, or rate one; returns the exit status."""
    if arguments[:1] == ["rate"]:
        return _rate(arguments[1:])
    return _search(_parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdlora history",
        description="Find the pictures below a folder by what made them, the newest first. New and changed files are read "
        "first. Pictures of other programs are found too. Rate one with: sdlora history rate PICTURE STARS",
        usage="sdlora history [FOLDER] [OPTIONS] | sdlora history rate PICTURE STARS",
    )
    parser.add_argument(
        "folder", nargs="?", default="outputs", metavar="FOLDER", help="the pictures' (default: outputs)"
    )
    parser.add_argument("--prompt", default="", metavar="WORDS", help="words of the prompt, or how they begin")
    parser.add_argument("--negative-prompt", default="", metavar="WORDS", help="the same of the negative prompt")
    parser.add_argument(
        "--adapter", default="", metavar="TEXT", help="part of an adapter's name, or the beginning of a hash"
    )
    parser.add_argument(
        "--base", default="", metavar="TEXT", help="part of the base's name, or the beginning of its hash"
    )
    parser.add_argument("--seed", type=int, default=None, help="the picture's own seed")
    parser.add_argument("--since", type=_moment, default=None, metavar="DATE", help="2026-11-22, or 2026-11-22T18:30")
    parser.add_argument("--until", type=_end, default=None, metavar="DATE", help="that day included")
    parser.add_argument("--rating", type=int, default=None, metavar="STARS", help="at least so many; 0: not rated")
    parser.add_argument("--limit", type=int, default=50, metavar="N", help="how many at most (default: 50)")
    parser.add_argument("--offset", type=int, default=0, metavar="N", help="how many to pass over")
    parser.add_argument("--rebuild", action="store_true", help="read all pictures again")
    add_json(parser)
    return parser


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no date; expected 2026-11-22 or 2026-11-22T18:30") from None


def _end(text: str) -> datetime:
    """Return the moment, of a day alone its last."""
    moment = _moment(text)
    return datetime.combine(moment, time.max) if "T" not in text and " " not in text else moment


def _search(options: argparse.Namespace) -> int:
    from sdlora import History

    history = History(options.folder)
    asked = {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "adapter": options.adapter,
        "base": options.base,
        "seed": options.seed,
        "since": options.since,
        "until": options.until,
        "rating": options.rating,
    }
    with progress("reading pictures") as on_picture:
        (history.rebuild if options.rebuild else history.refresh)(on_picture)
    found = history.search(**asked, limit=options.limit, offset=options.offset)
    if options.json:
        text = json.dumps([_document(entry) for entry in found], indent=2, ensure_ascii=False)
        print(text.encode(errors="replace").decode())
        return 0
    for entry in found:
        print(_line(entry, user_path(options.folder) / entry.path.relative_to(history.folder)))
    print(f"{len(found)} of the {history.count()} pictures in {options.folder}")
    return 0


def _document(entry: HistoryEntry) -> dict[str, object]:
    return asdict(entry) | {"path": str(entry.path), "made": entry.made.isoformat(timespec="seconds")}


def _line(entry: HistoryEntry, shown_path: Path) -> str:
    stars = "*" * entry.stars + "." * (5 - entry.stars)
    prompt = " ".join(entry.prompt.split())
    shown = prompt if len(prompt) <= _LONGEST_PROMPT else f"{prompt[: _LONGEST_PROMPT - 3]}..."
    adapters = "".join(f" + {name}:{weight:g}" for name, weight in entry.adapters)
    seed = "?" if entry.seed is None else entry.seed
    return f"{entry.made:%Y-%m-%d %H:%M}  {stars}  {shown_path}  seed {seed}  {shown}{adapters}"


def _rate(arguments: Sequence[str]) -> int:
    from sdlora.generation.history.index import history_of

    parser = argparse.ArgumentParser(prog="sdlora history rate", description="Give a picture 1 to 5 stars, or none: 0.")
    parser.add_argument("picture", help="a picture with a recipe")
    parser.add_argument("stars", help="1 to 5; 0 takes them away")
    options = parser.parse_args(arguments)
    if not options.stars.isdecimal() or len(options.stars) > 1:
        raise ConfigError(f"a rating is {options.stars[:40]!r}; expected 1 to 5 stars, or 0 for none")
    history = history_of(options.picture)
    history.rate(options.picture, int(options.stars))
    print(f"{options.picture}: {options.stars} of 5 stars")
    return 0

"""`sdlora adapter list`: the adapters of a folder, found by name, trigger, family, base, tag or hash."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.cli.adapter_output import add_json, progress
from sdlora.errors import ConfigError, FormatError
from sdlora.storage import is_there, user_path

if TYPE_CHECKING:
    from sdlora.sharing.library import AdapterLibrary
    from sdlora.sharing.library_entry import LibraryEntry, RefusedFile

_FOLDER = "runs"
"""Where training leaves adapters by default, and what the page shows."""
_LONGEST_PATH = 4096
_FILTERS = {
    "name": "part of a file's way below the folder, or of what the adapter calls itself",
    "trigger": "part of a trigger, or of a new word that comes with it",
    "family": "sd1, sd2, sdxl, or unknown where the file does not tell",
    "kind": "lora, loha, lokr, dense, dora or embedding",
    "base": "part of the name, or the beginning of a hash, of the base that it was trained on",
    "tag": "part of a tag of the captions that it was trained with",
    "hash": "beginning, 6 digits or more, of SHA-256, AutoV1, AutoV2, AutoV3 or a hash in the header",
}


def add_parsers(commands: Any) -> None:
    """`list` is among the subcommands."""
    parser = commands.add_parser(
        "list",
        help="the adapters of a folder, searched by what they are",
        description="List adapters, each content once, whatever its files are called. What is known of files is kept, so "
        "that only new and changed ones are read.",
        usage="sdlora adapter list [FOLDER] [WORD ...] [OPTIONS]",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="each must be in the name, a trigger, a tag or the base's name. The first is the FOLDER where there is such "
        f"a folder, or where it looks like a path; else that is {_FOLDER}",
    )
    for name, text in _FILTERS.items():
        parser.add_argument(f"--{name}", default="", metavar="TEXT", help=text)
    parser.add_argument("--limit", type=int, metavar="N", help="how many at most")
    parser.add_argument("--refused", action="store_true", help="list the files that are no adapters instead, and why")
    parser.add_argument("--headers-only", action="store_true", help="hash no file: quick with new ones")
    parser.add_argument("--rebuild", action="store_true", help="read all files again")
    add_json(parser)
    parser.set_defaults(run=_list)


def _list(options: argparse.Namespace) -> int:
    from sdlora.adapters.header_text import plain
    from sdlora.sharing.library import AdapterLibrary
    from sdlora.sharing.library_query import query_of

    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit is {options.limit}; expected 1 or more")
    folder, words = _folder_and_words(options.words)
    library = AdapterLibrary(folder)
    filters = {name: getattr(options, name) for name in _FILTERS}
    query_of(" ".join(words), **filters)  # what makes no sense is refused before anything is read
    with progress("reading adapters") as on_file:
        (library.rebuild if options.rebuild else library.refresh)(on_file, hashes=not options.headers_only)
    found = library.search(" ".join(words), limit=options.limit, **filters)
    refused = library.refused()
    if options.json:
        print(json.dumps(_document(library, found, refused), indent=2, ensure_ascii=False))
        return 0
    if options.refused:
        for file in refused:
            print(f"{plain(_shown(file.path), _LONGEST_PATH)}: {file.problem}")
    else:
        _print_table(found)
    print(f"{library.folder}: {len(found)} adapters, {len(refused)} files that are none", file=sys.stderr)
    return 0


def _folder_and_words(words: Sequence[str]) -> tuple[Path, Sequence[str]]:
    """Return where to look and what for. Raises FormatError for what looks like a folder and is none."""
    if not words:
        return Path(_FOLDER), words
    first = user_path(words[0])
    if is_there(first) and first.is_dir():
        return first, words[1:]
    if words[0].startswith((".", "~", "/")) or os.sep in words[0]:
        raise FormatError(f"{words[0][:300]}: there is no such folder; name the one that your adapters are in")
    return Path(_FOLDER), words


def _document(library: AdapterLibrary, found: Sequence[LibraryEntry], refused: Sequence[RefusedFile]) -> dict[str, Any]:
    return {
        "folder": _shown(library.folder),
        "adapters": [entry.to_json() for entry in found],
        "refused": [{"path": _shown(file.path), "problem": file.problem} for file in refused],
    }


def _print_table(found: Sequence[LibraryEntry]) -> None:
    """The entries are printed as a table on a terminal, elsewhere a line each with tabs between the cells."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        for entry in found:
            print("\t".join(_cells(entry)))
        return
    table = Table("name", "family", "kind", "trigger", "size", "hash", box=None, pad_edge=False)
    for column in table.columns[:4]:
        column.overflow = "fold"  # names are what one copies from here
    for column in table.columns[4:]:
        column.no_wrap = True
    for entry in found:
        table.add_row(*map(Text, _cells(entry)))  # not as markup, which a stranger's file may hold
    console.print(table)


def _cells(entry: LibraryEntry) -> list[str]:
    from rich.filesize import decimal

    facts = entry.facts
    copies = f" (and {len(entry.paths) - 1} more of it)" if len(entry.paths) > 1 else ""
    ranks = facts.rank if isinstance(facts.rank, list) else [facts.rank]
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    kinds = " and ".join(facts.kinds) or facts.format
    kind = (kinds if facts.rank is None else f"{kinds} {rank}") + (", faulty" if facts.problems else "")
    triggers = ", ".join(dict.fromkeys([*facts.triggers, *facts.words]))
    return [f"{entry.name}{copies}", facts.family or "?", kind, triggers, decimal(facts.bytes), entry.autov2 or "-"]


def _shown(path: Path) -> str:
    """Return the path as UTF-8 can hold it."""
    return str(path).encode("utf-8", "replace").decode()

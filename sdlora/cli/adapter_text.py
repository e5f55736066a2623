"""`sdlora adapter rename | strip`: the same weights under other text, or without some."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlora.adapters.names import KEPT_TEXTS
from sdlora.cli.adapter_output import add_json, add_overwrite, add_source_and_target
from sdlora.errors import ConfigError

_LONGEST_SHOWN = 60


def add_parsers(commands: Any) -> None:
    """`rename` and `strip` are among the subcommands."""
    rename = commands.add_parser(
        "rename",
        help="another name, trigger, or name of a word",
        description="Write the same weights, byte for byte, under another name. A new word's embedding file is written "
        "anew beside it; an embedding file alone is renamed as a word.",
    )
    add_source_and_target(rename)
    rename.add_argument("--name", default="", help="what other programs show; left out: the name of OUT")
    rename.add_argument("--trigger", default="", metavar="TEXT", help="the text that calls it in a prompt")
    rename.add_argument(
        "--word", action="append", default=[], metavar="OLD=NEW", help="call a new word otherwise; repeat it"
    )
    add_overwrite(rename)
    add_json(rename)
    rename.set_defaults(run=_rename)
    strip = commands.add_parser(
        "strip",
        help="without text that tells about people and machines, or without some layers",
        description="Write an adapter without what its header tells about a person, a machine or the pictures, and list "
        "what that was. The weights stay as they are.",
    )
    add_source_and_target(strip)
    strip.add_argument(
        "--keep",
        choices=KEPT_TEXTS,
        default=KEPT_TEXTS[0],
        help="text that stays: all but private and unknown, what programs need to use the file rightly, or none",
    )
    strip.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="PREFIX",
        help='leave out layers by the beginning of their path, such as text_encoder or unet.up_blocks.1, or "words"; '
        "repeat it",
    )
    add_overwrite(strip)
    add_json(strip)
    strip.set_defaults(run=_strip)


def _rename(options: argparse.Namespace) -> int:
    from sdlora.adapters.rename import rename_adapter
    from sdlora.adapters.stored import adapter_hashes

    renamed = rename_adapter(
        options.source,
        options.target,
        name=options.name,
        trigger=options.trigger,
        words=_words(options.word),
        overwrite=options.overwrite,
    )
    digest = adapter_hashes(renamed.files[0])[1]
    if options.json:
        found = {
            "target": str(renamed.files[0]),
            "name": renamed.name,
            "trigger": renamed.trigger,
            "words": dict(renamed.words),
            "files": list(map(str, renamed.files)),
            "autov3": digest[:12],
        }
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return 0
    trigger = f", trigger {renamed.trigger!r}" if renamed.trigger else ""
    print(f"{options.target}: {renamed.name!r}{trigger}; the weights are the same, autov3 {digest[:12]}")
    for old, new in renamed.words.items():
        print(f"  the word {old!r} is {new!r} now")
    _print_beside(renamed.files)
    return 0


def _strip(options: argparse.Namespace) -> int:
    from sdlora.adapters.strip import strip_adapter

    stripped = strip_adapter(
        options.source, options.target, keep=options.keep, drop=options.drop, overwrite=options.overwrite
    )
    if options.json:
        found = {
            "target": str(stripped.files[0]),
            "keep": options.keep,
            "removed": dict(stripped.removed),
            "shortened": dict(stripped.shortened),
            "dropped": dict(stripped.dropped),
            "files": list(map(str, stripped.files)),
            "telling": {str(file): list(keys) for file, keys in stripped.telling.items()},
        }
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return 0
    changed = len(stripped.removed) + len(stripped.shortened)
    print(f"{options.target}: {f'{changed} entries' if changed else 'nothing'} of the header had to go")
    _print_entries("removed", stripped.removed)
    _print_entries("shortened", stripped.shortened)
    for prefix, count in stripped.dropped.items():
        print(f"  dropped    {prefix}: {count} {'words' if prefix == 'words' else 'layers'}")
    _print_beside(stripped.files)
    for file, keys in stripped.telling.items():
        print(f"  NOTE       {file} lies there already, with {', '.join(map(_shown, keys))}; strip it too")
    return 0


def _print_entries(what: str, entries: Mapping[str, str]) -> None:
    for key, tells in entries.items():
        print(f"  {what:<10} {_shown(key)}: {tells}")


def _shown(key: str) -> str:
    """Return a stranger's text as it may be printed, so that it does not steer the terminal."""
    return (key if key.isprintable() else ascii(key))[:_LONGEST_SHOWN]


def _print_beside(files: Sequence[Path]) -> None:
    for file in files[1:]:
        print(f"  written    {file}")


def _words(given: Sequence[str]) -> dict[str, str]:
    """Return {OLD: NEW}. Raises ConfigError for anything else than OLD=NEW, each OLD once."""
    words: dict[str, str] = {}
    for text in given:
        old, equals, new = text.partition("=")
        if not equals or not old.strip():
            raise ConfigError(f"--word {text!r} is not understood; expected OLD=NEW")
        if old.strip() in words:
            raise ConfigError(f"--word gives {old.strip()!r} two names; give one")
        words[old.strip()] = new
    return words

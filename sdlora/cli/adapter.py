"""`sdlora adapter`: what adapter files are, new ones made of them, and their way to other people and back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.adapters.names import METADATA_LEVELS
from sdlora.cli import adapter_extract, adapter_library, adapter_share, adapter_text, adapter_verify, adapter_work
from sdlora.cli.adapter_output import add_json, add_output, add_source_and_target
from sdlora.errors import FormatError
from sdlora.storage import is_there, user_path

if TYPE_CHECKING:
    from sdlora.adapters.inspect import AdapterReport


def run(arguments: list[str]) -> int:
    """Do what the subcommand says; returns the exit status. Raises SdloraError."""
    options = _parser().parse_args(arguments)
    return int(options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sdlora adapter", description="Look at adapter files and work on them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="what a file is, or all files of a folder",
        description="Tell format, family, layers, rank, words and faults of an adapter. Of a folder the headers alone "
        "are read, unless it is one that PEFT has written.",
    )
    inspect.add_argument("path", type=Path, help="adapter file, PEFT's folder, or a folder of adapter files")
    inspect.add_argument("--header", action="store_true", help="read the header alone: no alpha, no hashes, quick")
    add_json(inspect)
    inspect.set_defaults(run=_inspect)
    adapter_library.add_parsers(commands)
    convert = commands.add_parser(
        "convert",
        help="write an adapter in another format",
        description="Write an adapter in another format, read it back, and compare what both do to every layer.",
    )
    add_source_and_target(convert)
    add_output(convert)
    convert.add_argument(
        "--metadata",
        choices=METADATA_LEVELS,
        default="full",
        help="text in the header: all, what programs need to use the file rightly, or none",
    )
    convert.add_argument("--bundle", action="store_true", help="new words inside kohya's file instead of beside it")
    add_json(convert)
    convert.set_defaults(run=_convert)
    adapter_verify.add_parsers(commands)
    adapter_work.add_parsers(commands)
    adapter_extract.add_parsers(commands)
    adapter_text.add_parsers(commands)
    adapter_share.add_parsers(commands, describe=_lines)
    return parser


def _inspect(options: argparse.Namespace) -> int:
    from sdlora import inspect_adapter
    from sdlora.adapters.formats import peft

    path = user_path(options.path)
    if is_there(path) and path.is_dir() and not peft.is_folder(path):
        return _inspect_folder(path, options.json)
    report = inspect_adapter(path, header_only=options.header)
    if options.json:
        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(report)))
    return 1 if report.problems else 0


def _inspect_folder(folder: Path, as_json: bool) -> int:
    from sdlora.adapters.inspect import inspect_folder

    found = inspect_folder(folder)
    reports = [entry for entry in found if not isinstance(entry, FormatError)]
    refused = [str(entry) for entry in found if isinstance(entry, FormatError)]
    if not found:
        raise FormatError(f"{folder}: holds no .safetensors file")
    if as_json:
        entries = {"adapters": [report.to_json() for report in reports], "refused": refused}
        print(json.dumps(entries, indent=2, ensure_ascii=False))
        return 0
    for report in reports:
        place = report.path.relative_to(folder)
        print(f"{place}: {_summary(report)}{'; ' + '; '.join(report.problems) if report.problems else ''}")
    for sentence in refused:
        print(sentence)
    print(f"{len(reports)} adapters, {len(refused)} other files")
    return 0


def _summary(report: AdapterReport) -> str:
    from sdlora.families.traits import family_title

    what = " and ".join(f"{count} {kind}" for kind, count in report.kinds.items()) or "no"
    where = ", ".join(f"{name} {count}" for name, count in report.modules.items() if count)
    parts = [f"{report.format}, {family_title(report.family) if report.family else 'family not told'}"]
    if report.kinds:
        parts.append(f"{what} layers ({where})")
    if report.rank is not None:
        parts.append(f"rank {_numbers(report.rank)}")
    if report.tokens:
        parts.append(f"words {', '.join(map(repr, report.tokens))}")
    return ", ".join(parts)


def _lines(report: AdapterReport) -> Iterator[str]:
    from rich.filesize import decimal

    from sdlora.adapters.header_text import plain

    yield f"{report.path}: {_summary(report)}"
    if report.alpha is not None:
        yield f"  alpha     {_numbers(report.alpha)}"
    yield f"  size      {decimal(report.bytes)}"
    if report.sha256:
        yield f"  sha256    {report.sha256}"
        yield f"  autov3    {report.autov3}"
    for key in ("ss_output_name", "modelspec.trigger_phrase", "ss_sd_model_name", "modelspec.date"):
        if text := report.metadata.get(key):
            yield f"  {key}: {plain(text)}"
    for problem in report.problems:
        yield f"  PROBLEM   {problem}"


def _numbers(found: float | list[int] | list[float]) -> str:
    return ", ".join(f"{number:g}" for number in found) if isinstance(found, list) else f"{found:g}"


def _convert(options: argparse.Namespace) -> int:
    from sdlora import convert_adapter

    found = convert_adapter(
        options.source,
        options.target,
        options.format,
        precision=options.precision,
        metadata=options.metadata,
        bundle=options.bundle,
        overwrite=options.overwrite,
    )
    if options.json:
        document = {"target": str(options.target), "format": options.format, "layers": found.layers}
        print(json.dumps(document | {"largest_difference": found.largest, "worst_layer": found.worst}, indent=2))
    else:
        print(f"{options.target}: {options.format}, {found.sentence()}")
    return 0

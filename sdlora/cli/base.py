"""`sdlora base inspect PATH [--json] [--hash]`: what a base is, without loading it."""

from __future__ import annotations

import argparse
import json

from sdlora import BaseSection


def run(arguments: list[str]) -> int:
    """Print what the base is; returns the exit status. Raises SdloraError."""
    options = _parser().parse_args(arguments)
    from sdlora.families.inspect import inspect_base

    section = BaseSection(path=options.path, variant=options.variant, revision=options.revision)
    report = inspect_base(section, compute_hashes=options.hash)
    print(json.dumps(report.to_json(), indent=2, ensure_ascii=False) if options.json else report.to_text())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sdlora base", description="Look at base models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="what a base is, told from its headers alone",
        description="Tell family, prediction type, precision, components, size, hashes and oddities of a base. "
        "Only headers are read, unless --hash is given; a Hugging Face id is downloaded first.",
    )
    fields = BaseSection.model_fields
    inspect.add_argument("path", help=fields["path"].description)
    inspect.add_argument("--variant", default="", help=fields["variant"].description)
    inspect.add_argument("--revision", default="", help=fields["revision"].description)
    inspect.add_argument("--hash", action="store_true", help="compute the hashes, which reads the files whole, once")
    inspect.add_argument("--json", action="store_true", help="print one JSON document")
    return parser

"""`sdlora generate --base BASE --adapter FILE:WEIGHT --prompt TEXT ...`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from sdlora import Engine, make_request, save_picture
from sdlora.cli.base_flags import add_base_flags, base_section
from sdlora.cli.request_flags import add_request_flags, request_values
from sdlora.errors import ConfigError
from sdlora.generation.engine import refuse_foreign_adapters
from sdlora.generation.pictures import picture_name
from sdlora.generation.request import GenerationRequest
from sdlora.sharing.library import AdapterLibrary
from sdlora.storage import check_writable


def run(arguments: list[str]) -> int:
    """Make the pictures that the command line asks for; returns the exit status."""
    options = _parser().parse_args(arguments)
    request = make_request(**request_values(options))
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size is {options.batch_size}; expected 1 or more")
    folder = Path(options.out).expanduser()
    check_writable(folder)
    return _generate(options, request, folder)


def _generate(options: argparse.Namespace, request: GenerationRequest, folder: Path) -> int:
    base = base_section(options)
    refuse_foreign_adapters(base, [choice.path for choice in request.adapters])
    engine = Engine(base, device=options.device, find_adapter=AdapterLibrary(options.library).path_of)
    for note in engine.base.notes:
        print(f"note: {note}", file=sys.stderr)
    before = engine.weights_sha256() if options.verify else ""
    started = time.perf_counter()
    for number, (picture, recipe) in enumerate(engine.generate(request, batch_size=options.batch_size), start=1):
        path = folder / picture_name(recipe)
        save_picture(picture, recipe, path)
        rate = (time.perf_counter() - started) / number
        print(f"{path}  ({number} of {request.count}, {rate:.2f} s a picture)", flush=True)
    if options.verify:
        unchanged = engine.weights_sha256() == before
        print(f"base weights {'unchanged' if unchanged else 'CHANGED'}: {before}")
        return 0 if unchanged else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sdlora generate", description="Make pictures, with or without adapters.")
    add_base_flags(parser)
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps; default: the GPU where there is one")
    add_request_flags(parser)
    parser.add_argument("--out", default="outputs", help="folder for the PNG files (default: outputs)")
    parser.add_argument(
        "--batch-size", type=int, default=1, help="pictures made at once; 1 makes each exactly repeatable alone"
    )
    parser.add_argument("--verify", action="store_true", help="prove by hash that the base weights did not change")
    return parser

"""`sdlora generate --base BASE --adapter FILE:WEIGHT --prompt TEXT ...`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from sdlora import History, make_request, save_picture
from sdlora.cli.base_flags import add_base_flags, base_section
from sdlora.cli.engine_flags import add_engine_flags, load_engine, tell
from sdlora.cli.format_flags import add_format_flags, file_format
from sdlora.cli.generate_view import step_bar
from sdlora.cli.request_flags import add_request_flags, request_values
from sdlora.errors import ConfigError
from sdlora.families.registry import describe_base
from sdlora.families.schedule import refuse_pure_noise
from sdlora.generation.asked import check_pictures
from sdlora.generation.controls import refuse_foreign_controls
from sdlora.generation.engine import refuse_foreign_adapters
from sdlora.generation.pictures.files import FileFormat
from sdlora.generation.pictures.names import DEFAULT_TEMPLATE, FIELDS, check_template, picture_path
from sdlora.generation.request import GenerationRequest
from sdlora.sharing.library import AdapterLibrary
from sdlora.storage import check_writable


def run(arguments: list[str]) -> int:
    """Make the pictures that the command line asks for; returns the exit status."""
    options = _parser().parse_args(arguments)
    request = make_request(**request_values(options))
    check_pictures(request)
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size is {options.batch_size}; expected 1 or more")
    check_template(options.name)
    form = file_format(options)
    folder = Path(options.out).expanduser()
    check_writable(folder)
    return _generate(options, request, folder, form)


def _generate(options: argparse.Namespace, request: GenerationRequest, folder: Path, form: FileFormat) -> int:
    base = base_section(options)
    if request.zero_snr == "on":
        refuse_pure_noise(describe_base(base).prediction, base.path)
    refuse_foreign_adapters(base, [choice.path for choice in request.adapters])
    refuse_foreign_controls(base, request)
    engine = load_engine(options, AdapterLibrary(options.library).path_of)
    before = engine.weights_sha256() if options.verify else ""
    history = History(folder)
    started = time.perf_counter()
    with step_bar() as on_step:
        pictures = engine.generate(request, batch_size=options.batch_size, on_step=on_step)
        for number, (picture, recipe) in enumerate(pictures, start=1):
            name = picture_path(recipe, options.name, number=number, suffix=form.suffix)
            path = save_picture(picture, recipe, folder / name, quality=form.quality, lossless=form.lossless)
            history.add(path, recipe)
            rate = (time.perf_counter() - started) / number
            print(f"{path}  ({number} of {request.count}, {rate:.2f} s a picture)", flush=True)
            tell(recipe.notes)
    if options.verify:
        unchanged = engine.weights_sha256() == before
        print(f"base weights {'unchanged' if unchanged else 'CHANGED'}: {before}")
        return 0 if unchanged else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sdlora generate", description="Make pictures, with or without adapters.")
    add_base_flags(parser)
    add_engine_flags(parser)
    add_request_flags(parser)
    parser.add_argument("--out", default="outputs", help="folder for the pictures (default: outputs)")
    parser.add_argument(
        "--name",
        default=DEFAULT_TEMPLATE,
        metavar="TEMPLATE",
        help=f"way to each file below that folder; fields are {', '.join(f'{{{field}}}' for field in FIELDS)} "
        f"(default: {DEFAULT_TEMPLATE})",
    )
    add_format_flags(parser)
    parser.add_argument(
        "--batch-size", type=int, default=1, help="pictures made at once; 1 makes each exactly repeatable alone"
    )
    parser.add_argument("--verify", action="store_true", help="prove by hash that the base weights did not change")
    return parser

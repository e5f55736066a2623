"""`sdlora replay PICTURE`: the picture made again from what it says of itself, compared, and what was not the same."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.cli.engine_flags import add_offload_flag, tell
from sdlora.errors import ConfigError, FormatError
from sdlora.storage import check_writable, is_there, user_path

if TYPE_CHECKING:
    from sdlora import BaseSection, GenerationRequest, Recipe
    from sdlora.generation.foreign.reading import ForeignAdapter, ForeignRecipe, ForeignRequest
    from sdlora.generation.recipe import UsedAdapter
    from sdlora.generation.replay.replaying import Comparison, Replayed
    from sdlora.sharing.library import AdapterLibrary


def run(arguments: list[str]) -> int:
    """Make a picture again; returns 0 where the pixels are the same, 1 where some differ."""
    options = _parser().parse_args(arguments)
    picture = user_path(options.picture)
    if not is_there(picture) or not picture.is_file():
        raise FormatError(f"{picture}: there is no such picture")
    if options.out:
        check_writable(user_path(options.out))
    return _replay(options, picture) if _is_ours(picture) else _foreign(options, picture)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdlora replay",
        description="Make a picture again from its recipe, compare the pixels, and name whatever was not the same. Of a "
        "picture of AUTOMATIC1111, Forge, ComfyUI, InvokeAI or NovelAI: make the request that comes nearest to what it says.",
    )
    parser.add_argument("picture", help="PNG, JPEG or WebP")
    parser.add_argument(
        "--base", default="", help="the base, where it is not the tiny one; its hash must be the recipe's"
    )
    parser.add_argument("--tokenizer", default="", help="as of sdlora generate, for a checkpoint")
    parser.add_argument("--base-config", default="", help="as of sdlora generate, for a checkpoint")
    parser.add_argument(
        "--models", default="", metavar="FOLDER", help="folder below which the base is looked for by its hash"
    )
    parser.add_argument(
        "--library",
        default="runs",
        metavar="FOLDER",
        help="folder below which adapters are looked for by hash (default: runs)",
    )
    parser.add_argument(
        "--inputs",
        default="",
        metavar="FOLDER",
        help="folder of what the picture was made from (start, mask, upscaler, ControlNets), where that is not beside it",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; default: as the recipe says")
    add_offload_flag(parser)
    parser.add_argument("--out", default="", metavar="FOLDER", help="keep the picture made again in this folder")
    parser.add_argument("--show", action="store_true", help="print what the picture says, and make nothing")
    return parser


# --- pictures of ours --------------------------------------------------------------------------------


def _is_ours(picture: Path) -> bool:
    from sdlora.generation.pictures.texts import RECIPE, read_texts

    return RECIPE in read_texts(picture).texts


def _replay(options: argparse.Namespace, picture: Path) -> int:
    from sdlora import read_recipe, replay
    from sdlora.generation.replay.find_base import base_finder
    from sdlora.generation.replay.find_input import input_finder

    recipe = read_recipe(picture)
    _show(recipe)
    if options.show:
        return 0
    named = _section(options) if options.base else None
    find = base_finder(named, user_path(options.models) if options.models else None, _say_hashing)
    inputs = input_finder([picture.parent, *([user_path(options.inputs)] if options.inputs else [])])
    done = replay(picture, find, _by_hash(options.library), inputs, device=options.device, offload=options.offload)
    tell(done.notes)
    _keep(options, done, picture)
    for difference in done.differences:
        print(f"not the same: {difference}")
    print(_verdict(done.comparison))
    return 0 if done.comparison.identical else 1


def _show(recipe: Recipe) -> None:
    print(f"prompt: {recipe.prompt}")
    if recipe.negative_prompt:
        print(f"negative prompt: {recipe.negative_prompt}")
    print(
        f"seed {recipe.seed}, {recipe.steps} steps, guidance {recipe.guidance_scale:g}, {recipe.width}x{recipe.height}, "
        f"{recipe.precision} on {recipe.device}, sdlora {recipe.versions.get('sdlora', '')}"
    )
    print(f"base: {recipe.base}, SHA-256 {recipe.base_sha256[:16]}...")
    for item in recipe.adapters:
        print(f"adapter: {item.name} at {item.weight:g}, SHA-256 {item.sha256[:16]}...")
    for control in recipe.controls:
        print(f"ControlNet: {control.model} at {control.strength:g}, led by {control.picture.name}")


def _verdict(found: Comparison) -> str:
    if found.identical:
        return f"identical: all {found.pixels} pixels are the same"
    return f"different: {found.differing} of {found.pixels} pixels differ, by {found.largest} of 255 at most"


def _keep(options: argparse.Namespace, done: Replayed, picture: Path) -> None:
    from sdlora import History, save_picture

    if options.out:
        folder = user_path(options.out)
        path = save_picture(done.picture, done.recipe, folder / f"{picture.stem}-replayed.png")
        History(folder).add(path, done.recipe)
        print(f"made again: {path}")


def _say_hashing(path: Path) -> None:
    print(f"hashing {path} ...", file=sys.stderr, flush=True)


def _section(options: argparse.Namespace) -> BaseSection:
    from sdlora import BaseSection

    return BaseSection(path=options.base, tokenizer=options.tokenizer, config=options.base_config)


# --- adapters ----------------------------------------------------------------------------------------


def _by_hash(folder: str) -> Callable[[UsedAdapter], Path]:
    """Return what finds an adapter by its file's hash, else by its tensors'; the library is looked through when first asked."""
    libraries: list[AdapterLibrary] = []

    def find(item: UsedAdapter) -> Path:
        if not libraries:
            libraries.append(_library(folder))
        for digest in (item.sha256, item.tensor_sha256):
            if found := libraries[0].search(hash=digest):
                return found[0].paths[0]
        raise FormatError(
            f"the picture's adapter {item.name[:100]}, SHA-256 {item.sha256[:16]}..., is not below {folder}; name the folder "
            "that it is in with --library"
        )

    return find


def _library(folder: str) -> AdapterLibrary:
    from sdlora.cli.adapter_output import progress
    from sdlora.sharing.library import AdapterLibrary

    library = AdapterLibrary(folder)
    with progress("reading adapters") as on_file:
        library.refresh(on_file)
    return library


# --- pictures of other programs ----------------------------------------------------------------------


def _foreign(options: argparse.Namespace, picture: Path) -> int:
    from sdlora.generation.foreign.reading import foreign_request, read_foreign

    recipe = read_foreign(picture)
    asked = foreign_request(recipe, _by_name(options.library, recipe))
    _show_foreign(recipe, asked)
    if options.show:
        return 0
    if not options.base:
        base = f"{recipe.base[:100]} ({recipe.base_hash[:16]})" if recipe.base else "which the picture does not name"
        raise ConfigError(f"--base is not given; name the base to make it with, {base}, or ask with --show alone")
    return _make(options, asked.request)


def _by_name(folder: str, recipe: ForeignRecipe) -> Callable[[ForeignAdapter], Path | None]:
    """Return what finds an adapter by a hash, else by its name; None where there is none, or several."""
    library = _library(folder) if recipe.adapters and is_there(user_path(folder)) else None

    def find(adapter: ForeignAdapter) -> Path | None:
        from sdlora.sharing.library_query import as_reference

        if library is None:
            return None
        for digest in filter(as_reference, adapter.hashes):
            if found := library.search(hash=digest):
                return found[0].paths[0]
        try:
            return library.find(adapter.name).paths[0]
        except FormatError:
            return None

    return find


def _show_foreign(recipe: ForeignRecipe, asked: ForeignRequest) -> None:
    request = asked.request
    print(f"made by: {recipe.program}")
    print(f"prompt: {request.prompt}")
    if request.negative_prompt:
        print(f"negative prompt: {request.negative_prompt}")
    given = request.model_dump(exclude={"prompt", "negative_prompt", "adapters"}, exclude_defaults=True)
    print(
        "settings: "
        + (", ".join(f"{name} {value}" for name, value in given.items()) or "none that differ from usual ones")
    )
    if recipe.base:
        print(f"base: {recipe.base[:100]}" + (f", {recipe.base_hash[:64]}" if recipe.base_hash else ""))
    for choice in request.adapters:
        over = [f"{name} {text}" for name, text in (("blocks", choice.blocks), ("steps", choice.steps)) if text]
        print(", ".join([f"adapter: {choice.path} at {choice.weight:g}", *over]))
    for what in asked.left_out:
        print(f"left out: {what}")


def _make(options: argparse.Namespace, request: GenerationRequest) -> int:
    from sdlora import Engine, History, save_picture
    from sdlora.generation.engine import refuse_foreign_adapters
    from sdlora.generation.pictures.names import picture_path

    section, folder = _section(options), user_path(options.out or "outputs")
    check_writable(folder)
    refuse_foreign_adapters(section, [choice.path for choice in request.adapters])
    engine = Engine(section, device=options.device, offload=options.offload)
    tell(engine.base.notes)
    for image, made in engine.generate(request):
        path = save_picture(image, made, folder / picture_path(made))
        History(folder).add(path, made)
        print(f"made: {path}")
        tell(made.notes)
    return 0

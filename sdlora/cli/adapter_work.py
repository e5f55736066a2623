"""`sdlora adapter merge | resize`: adapters made from adapters, and bases with adapters in them."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora import BaseSection
from sdlora.cli.adapter_output import (
    add_json,
    add_output,
    add_source_and_target,
    check_rank,
    check_share,
    check_target,
    progress,
    ranks_of,
    span,
    write_result,
)
from sdlora.errors import ConfigError, OutputError
from sdlora.storage import is_there, user_path

if TYPE_CHECKING:
    from sdlora import MergePart, MergeSettings


_LARGEST_WEIGHT, _MOST_MEGABYTES = 1000.0, 100_000.0


def add_parsers(commands: Any) -> None:
    """`merge` and `resize` are among the subcommands."""
    merge = commands.add_parser(
        "merge",
        help="several adapters in one",
        description="Write the weighted sum of adapters of one family as one adapter. Without --rank and --energy it is "
        "exact: LoRA with all ranks side by side. With --base OUT is a copy of that base with the sum in its weights. "
        "Printed is how far the result is from the true sum.",
    )
    merge.add_argument(
        "target", type=Path, metavar="OUT", help="what to write: file, or folder for peft and for a base folder"
    )
    merge.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="FILE:WEIGHT",
        help="repeat it. FILE alone counts once; FILE:unet=0.8,unet.up_blocks=1,text_encoder=0 weighs parts by the "
        "beginning of their path, the rest once",
    )
    merge.add_argument(
        "--method", choices=("linear", "ties", "dare"), default="linear", help="how updates are combined"
    )
    merge.add_argument("--density", type=float, default=0.2, help="ties: share of each update that counts")
    merge.add_argument("--drop", type=float, default=0.5, help="dare: share of each update that is dropped at random")
    merge.add_argument("--seed", type=int, default=0, help="dare: which")
    merge.add_argument("--rank", type=int, default=0, help="cut each layer off at this rank")
    merge.add_argument("--energy", type=float, default=1.0, help="cut each layer off at this share of its squared norm")
    merge.add_argument("--base", help="merge into a copy of this base: folder, checkpoint, hub id or tiny")
    add_base_files(merge)
    add_output(merge)
    add_json(merge)
    merge.set_defaults(run=_merge, format=None)
    resize = commands.add_parser(
        "resize",
        help="fewer ranks, a smaller file",
        description="Cut each layer's update off where its singular values say, and tell what each block keeps of it.",
    )
    add_source_and_target(resize)
    resize.add_argument("--rank", type=int, default=0, help="at this rank, at most")
    resize.add_argument("--energy", type=float, help="at this share of each layer's squared norm, such as 0.95")
    resize.add_argument("--error", type=float, help="at this relative error of each layer (Frobenius), such as 0.2")
    resize.add_argument("--megabytes", type=float, help="at the share of energy at which all weights take this much")
    add_output(resize)
    add_json(resize)
    resize.set_defaults(run=_resize)


def add_base_files(parser: argparse.ArgumentParser, whose: str = "") -> None:
    """The parser takes what tells how the files of a base are to be understood."""
    fields = BaseSection.model_fields
    parser.add_argument("--base-config", default="", help=fields["config"].description)
    parser.add_argument("--variant", default="", help=whose + (fields["variant"].description or ""))


def _merge(options: argparse.Namespace) -> int:
    from sdlora import MergeSettings, Truncation, merge
    from sdlora.adapters.convert import with_precision

    check_share("--energy", options.energy)
    check_share("--density", options.density)
    if not 0 <= options.drop < 1:
        raise ConfigError(f"--drop is {options.drop:g}; expected 0 or more and less than 1")
    check_rank("--rank", options.rank)
    if not options.base:
        for flag in ("base_config", "variant"):
            if getattr(options, flag):
                raise ConfigError(f"--{flag.replace('_', '-')} is for a base; name one with --base")
    check_target(options)
    cut = Truncation(options.rank, options.energy) if options.rank or options.energy < 1 else None
    settings = MergeSettings(options.method, cut, options.density, options.drop, options.seed)
    parts = [_part(text) for text in options.adapter]
    if options.base:
        return _merge_into_base(parts, settings, options)
    options.format = options.format or "kohya"
    with progress("merging") as on_layer:
        merged = merge(parts, settings, on_layer)
    write_result(with_precision(merged.adapter, options.precision) if options.precision else merged.adapter, options)
    ranks = ranks_of(merged.adapter)
    found: dict[str, Any] = {"target": str(options.target), "layers": len(merged.adapter.layers), "ranks": ranks}
    _print_merged(found, f"rank {span(ranks)}", merged, options.json)
    return 0


def _merge_into_base(parts: Sequence[MergePart], settings: MergeSettings, options: argparse.Namespace) -> int:
    from sdlora import AdapterFile, merge_into_base, open_base, write_adapter
    from sdlora.adapters.merge import words_of
    from sdlora.adapters.write import refuse_other_vectors, word_files

    if settings.keep:
        raise ConfigError("--rank and --energy cut adapters off; with --base the whole sum goes into the weights")
    if options.format:
        raise ConfigError(f"--format {options.format} is for adapters; with --base OUT has the layout of the base")
    base = open_base(BaseSection(path=options.base, config=options.base_config, variant=options.variant))
    target = user_path(options.target)
    check_target(options, keep=(base.facts.path, *(user_path(parse_weights(text)[0]) for text in options.adapter)))
    _refuse_target(target, base.facts.path)
    words = words_of(parts)
    files = word_files(target, words, with_layers=True)
    refuse_other_vectors(AdapterFile({}, base.family.name, {}, words), files)
    for word, file in files.items():  # before the base, which is of no use without them
        write_adapter(AdapterFile({}, base.family.name, {}, {word: words[word]}), file)
    with progress("merging") as on_layer:
        merged = merge_into_base(parts, base, target, settings, precision=options.precision or "", on_layer=on_layer)
    found = {
        "target": str(options.target),
        "layers": merged.layers,
        "embeddings": [str(file) for file in files.values()],
    }
    _print_merged(found, base.family.title, merged, options.json)
    rescaled = [part.name for part in parts if part.adapter.metadata.get("ss_zero_terminal_snr") == "True"]
    if rescaled and not base.facts.zero_terminal_snr and not options.json:
        print(
            f"  {', '.join(rescaled)}: trained for zero terminal SNR; choose that schedule wherever the merged base is used"
        )
    if files and not options.json:
        print(f"  a base has no place for new words; they lie beside it: {', '.join(map(str, files.values()))}")
    return 0


def _refuse_target(target: Path, base: Path) -> None:
    """Raise where a merged base cannot be written to `target`."""
    if base.is_file():
        if target.suffix != ".safetensors" or target.is_dir():
            raise ConfigError(f"{target}: a merged checkpoint is a .safetensors file; name one")
        return
    if not is_there(target):
        return
    known = {entry.name for entry in base.iterdir()}
    foreign = [entry.name for entry in target.iterdir() if entry.name not in known] if target.is_dir() else []
    if not (target / "model_index.json").is_file() or foreign:
        what = f"holds {foreign[0]}, which is no part of a base" if foreign else "is no base folder"
        raise OutputError(f"{target}: is there already and {what}; name another")


def _print_merged(found: dict[str, Any], what: str, merged: Any, as_json: bool) -> None:
    """Say what a merge has made, and how far it is from the true sum."""
    if as_json:
        errors = {"error": merged.error, "worst_layer": merged.worst, "worst_error": merged.worst_error}
        print(json.dumps(found | errors, indent=2))
        return
    worst = f", at most {merged.worst_error:.1e} at {merged.worst}" if merged.worst else ""
    print(
        f"{found['target']}: {found['layers']} layers, {what}, relative error against the true sum {merged.error:.1e}{worst}"
    )


def _resize(options: argparse.Namespace) -> int:
    from sdlora import Truncation, read_adapter, resize
    from sdlora.adapters.convert import with_precision

    chosen = [name for name in ("energy", "error", "megabytes") if getattr(options, name) is not None]
    if len(chosen) > 1:
        raise ConfigError(
            f"--{chosen[0]} and --{chosen[1]} both say where to cut; give one, with --rank as a limit if need be"
        )
    if not chosen and not options.rank:
        raise ConfigError("nothing says where to cut; give --rank, --energy, --error or --megabytes")
    check_rank("--rank", options.rank)
    energy = 1.0
    if options.energy is not None:
        check_share("--energy", options.energy)
        energy = options.energy
    if options.error is not None:
        check_share("--error", options.error)
        energy = 1 - options.error**2
    size = _bytes(options.megabytes)
    check_target(options)
    adapter = read_adapter(options.source)
    if options.precision:
        adapter = with_precision(adapter, options.precision)
    with progress("resizing") as on_layer:
        resized = resize(adapter, Truncation(options.rank, energy), bytes=size, on_layer=on_layer)
    write_result(resized.adapter, options)
    ranks = ranks_of(resized.adapter)
    if options.json:
        found = {"target": str(options.target), "layers": len(adapter.layers), "ranks": ranks, "energy": resized.energy}
        print(json.dumps(found, indent=2))
        return 0
    print(
        f"{options.target}: {len(adapter.layers)} layers, rank {span(ranks)}, {resized.energy['']:.2%} of the energy kept"
    )
    for block, share in resized.energy.items():
        if block:
            print(f"  {block:<22} {share:.2%}")
    return 0


def _part(text: str) -> MergePart:
    from sdlora import MergePart, read_adapter

    place, weight, weights = parse_weights(text)
    return MergePart(Path(place).stem, read_adapter(place), weight, weights)


def parse_weights(text: str) -> tuple[str, float, dict[str, float]]:
    """Return (file, weight, weights by beginning of a path) of FILE, FILE:0.8 or FILE:unet=0.8,text_encoder=0."""
    place, colon, said = text.rpartition(":")
    if not colon or is_there(user_path(text)):
        return text, 1.0, {}
    weight, weights = 1.0, dict[str, float]()
    for entry in said.split(","):
        prefix, equals, number = entry.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not abs(value) <= _LARGEST_WEIGHT:
            raise ConfigError(
                f"--adapter {text}: {number!r} is no weight; expected FILE:0.8 or FILE:unet=0.8,text_encoder=0"
            )
        if equals and (not prefix.strip() or prefix.strip() in weights):
            raise ConfigError(f"--adapter {text}: {entry!r} names no part, or one for the second time")
        if equals:
            weights[prefix.strip()] = value
        else:
            weight = value
    return place, weight, weights


def _bytes(megabytes: float | None) -> int:
    """Return --megabytes in bytes, 0 where it is not given. Raises ConfigError."""
    if megabytes is None:
        return 0
    if not 1e-6 <= megabytes <= _MOST_MEGABYTES:
        raise ConfigError(f"--megabytes is {megabytes:g}; expected more than 0 and at most {_MOST_MEGABYTES:g}")
    return int(megabytes * 1e6)

"""`sdlora adapter extract`: an adapter from a tuned base and the one that it came from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora import BaseSection
from sdlora.adapters.names import FORMATS, PRECISIONS
from sdlora.cli.adapter_output import (
    add_json,
    check_rank,
    check_share,
    check_target,
    progress,
    ranks_of,
    span,
    write_result,
)
from sdlora.cli.adapter_work import add_base_files
from sdlora.errors import ConfigError
from sdlora.storage import user_path

if TYPE_CHECKING:
    from sdlora import Truncation
    from sdlora.adapters.extract import Extracted

_RANK = 32
_NAMED = 3


def add_parsers(commands: Any) -> None:
    """`extract` is among the subcommands."""
    parser = commands.add_parser(
        "extract",
        help="an adapter from two bases",
        description="Write what a tuned base is, minus what it was, as LoRA. An interrupted extraction goes on where it "
        "stopped when it is started again.",
    )
    parser.add_argument("original", metavar="ORIGINAL", help="base before tuning: folder, checkpoint, hub id or tiny")
    parser.add_argument("tuned", metavar="TUNED", help="base after it")
    parser.add_argument("target", type=Path, metavar="OUT", help="file, or for peft folder, to write")
    parser.add_argument("--rank", type=int, default=0, help=f"of each layer, at most; without --energy {_RANK}")
    parser.add_argument(
        "--energy", type=float, default=1.0, help="cut each layer off at this share of its squared norm"
    )
    parser.add_argument(
        "--conv-rank", type=int, help="of convolutions with larger kernels; left out: as --rank; 0: none"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATH", help="layers that begin so, such as unet; repeat it"
    )
    parser.add_argument("--format", choices=FORMATS, default="kohya", help="kohya is read by most programs")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16", help="of the weights")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    add_base_files(parser, "of ORIGINAL; ")
    parser.add_argument("--tuned-variant", default="", help="of TUNED; the same")
    add_json(parser)
    parser.set_defaults(run=_extract)


def _extract(options: argparse.Namespace) -> int:
    from sdlora import ExtractSettings, extract, open_base
    from sdlora.adapters.extract import forget
    from sdlora.families.base_copy import FLOATS

    linear, convolutions = _cuts(options)
    dtype = FLOATS[options.precision][1]
    settings = ExtractSettings(linear, convolutions, tuple(options.only), dtype)
    original = open_base(_base(options, options.original))
    tuned = open_base(_base(options, options.tuned, options.tuned_variant))
    check_target(options, keep=(original.facts.path, tuned.facts.path))
    with progress("extracting") as on_layer:
        extracted = extract(original, tuned, settings, user_path(options.target), on_layer)
    write_result(extracted.adapter, options)
    forget(extracted.work)
    if options.json:
        print(json.dumps(_found(extracted, options), indent=2))
    else:
        _print(extracted, options)
    return 0


def _base(options: argparse.Namespace, path: str, variant: str | None = None) -> BaseSection:
    """Return one of the two bases; the description is for those that are checkpoints."""
    config = "" if user_path(path).is_dir() or path == "tiny" else options.base_config
    return BaseSection(path=path, config=config, variant=options.variant if variant is None else variant)


def _cuts(options: argparse.Namespace) -> tuple[Truncation, Truncation | None]:
    """Return where linear layers and where large kernels are cut off, None where those are left out."""
    from sdlora import Truncation

    check_rank("--rank", options.rank)
    check_share("--energy", options.energy)
    if options.conv_rank is not None and options.conv_rank < 0:
        raise ConfigError(f"--conv-rank is {options.conv_rank}; expected 1 or more, or 0 to leave convolutions out")
    linear = Truncation(options.rank or (_RANK if options.energy >= 1 else 0), options.energy)
    if options.conv_rank is None:
        return linear, linear
    return linear, Truncation(options.conv_rank, options.energy) if options.conv_rank else None


def _found(extracted: Extracted, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "target": str(options.target),
        "layers": len(extracted.adapter.layers),
        "unchanged": extracted.unchanged,
        "resumed": extracted.resumed,
        "ranks": ranks_of(extracted.adapter),
        "energy": dict(extracted.energy),
        "left_out": list(extracted.left_out),
    }


def _print(extracted: Extracted, options: argparse.Namespace) -> None:
    layers = extracted.adapter.layers
    resumed = f", {extracted.resumed} of them done before" if extracted.resumed else ""
    same = f", {extracted.unchanged} layers are the same in both" if extracted.unchanged else ""
    print(
        f"{options.target}: {len(layers)} layers{resumed}, rank {span(ranks_of(extracted.adapter))}, "
        f"{extracted.energy['']:.2%} of the difference's energy{same}"
    )
    for block, share in extracted.energy.items():
        if block:
            print(f"  {block:<22} {share:.2%}")
    if extracted.left_out:
        some = ", ".join(extracted.left_out[:_NAMED])
        print(f"  not in it: {len(extracted.left_out)} weights that differ too, such as {some}")

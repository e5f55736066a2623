"""`sdlora adapter merge | resize`: adapters made from adapters."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.adapters.names import FORMATS, PRECISIONS
from sdlora.errors import ConfigError
from sdlora.storage import is_there, user_path

if TYPE_CHECKING:
    from sdlora.adapters.file import AdapterFile
    from sdlora.adapters.merge import MergePart


_LARGEST_WEIGHT, _MOST_MEGABYTES = 1000.0, 100_000.0


def add_parsers(commands: Any) -> None:
    """`merge` and `resize` are among the subcommands."""
    merge = commands.add_parser(
        "merge",
        help="several adapters in one",
        description="Write the weighted sum of adapters of one family as one adapter. Without --rank and --energy it is "
        "exact: LoRA with all ranks side by side. Printed is how far the file is from the true sum.",
    )
    merge.add_argument("target", type=Path, metavar="OUT", help="file, or for peft folder, to write")
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
    add_output(merge)
    merge.add_argument("--json", action="store_true", help="print one JSON document")
    merge.set_defaults(run=_merge)
    resize = commands.add_parser(
        "resize",
        help="fewer ranks, a smaller file",
        description="Cut each layer's update off where its singular values say, and tell what each block keeps of it.",
    )
    resize.add_argument("source", type=Path, metavar="IN", help="adapter file of any format, or PEFT's folder")
    resize.add_argument("target", type=Path, metavar="OUT", help="file, or for peft folder, to write")
    resize.add_argument("--rank", type=int, default=0, help="at this rank, at most")
    resize.add_argument("--energy", type=float, help="at this share of each layer's squared norm, such as 0.95")
    resize.add_argument("--error", type=float, help="at this relative error of each layer (Frobenius), such as 0.2")
    resize.add_argument("--megabytes", type=float, help="at the share of energy at which all weights take this much")
    add_output(resize)
    resize.add_argument("--json", action="store_true", help="print one JSON document")
    resize.set_defaults(run=_resize)


def add_output(parser: argparse.ArgumentParser) -> None:
    """The parser takes how a result is written: its format, its precision, and whether it may replace something."""
    parser.add_argument("--format", choices=FORMATS, default="kohya", help="kohya is read by most programs")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the weights; left out: as they are")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _merge(options: argparse.Namespace) -> int:
    from sdlora.adapters.algebra import Truncation
    from sdlora.adapters.convert import with_precision
    from sdlora.adapters.merge import MergeSettings, merge

    _check_share("--energy", options.energy)
    _check_share("--density", options.density)
    if not 0 <= options.drop < 1:
        raise ConfigError(f"--drop is {options.drop:g}; expected 0 or more and less than 1")
    _check_rank(options.rank)
    _check_target(options)
    cut = Truncation(options.rank, options.energy) if options.rank or options.energy < 1 else None
    settings = MergeSettings(options.method, cut, options.density, options.drop, options.seed)
    parts = [_part(text) for text in options.adapter]
    with _progress("merging") as on_layer:
        merged = merge(parts, settings, on_layer)
    _write(with_precision(merged.adapter, options.precision) if options.precision else merged.adapter, options)
    ranks = _ranks(merged.adapter)
    found = {
        "target": str(options.target),
        "layers": len(merged.adapter.layers),
        "ranks": ranks,
        "error": merged.error,
        "worst_layer": merged.worst,
        "worst_error": merged.worst_error,
    }
    worst = f", at most {merged.worst_error:.1e} at {merged.worst}" if merged.worst else ""
    print(
        json.dumps(found, indent=2)
        if options.json
        else f"{options.target}: {len(merged.adapter.layers)} layers, rank {_span(ranks)}, relative error against the "
        f"true sum {merged.error:.1e}{worst}"
    )
    return 0


def _resize(options: argparse.Namespace) -> int:
    from sdlora import read_adapter
    from sdlora.adapters.algebra import Truncation
    from sdlora.adapters.convert import with_precision
    from sdlora.adapters.resize import resize

    chosen = [name for name in ("energy", "error", "megabytes") if getattr(options, name) is not None]
    if len(chosen) > 1:
        raise ConfigError(
            f"--{chosen[0]} and --{chosen[1]} both say where to cut; give one, with --rank as a limit if need be"
        )
    if not chosen and not options.rank:
        raise ConfigError("nothing says where to cut; give --rank, --energy, --error or --megabytes")
    _check_rank(options.rank)
    energy = 1.0
    if options.energy is not None:
        _check_share("--energy", options.energy)
        energy = options.energy
    if options.error is not None:
        _check_share("--error", options.error)
        energy = 1 - options.error**2
    size = _bytes(options.megabytes)
    _check_target(options)
    adapter = read_adapter(options.source)
    if options.precision:
        adapter = with_precision(adapter, options.precision)
    with _progress("resizing") as on_layer:
        resized = resize(adapter, Truncation(options.rank, energy), bytes=size, on_layer=on_layer)
    _write(resized.adapter, options)
    ranks = _ranks(resized.adapter)
    if options.json:
        found = {"target": str(options.target), "layers": len(adapter.layers), "ranks": ranks, "energy": resized.energy}
        print(json.dumps(found, indent=2))
        return 0
    print(
        f"{options.target}: {len(adapter.layers)} layers, rank {_span(ranks)}, {resized.energy['']:.2%} of the energy kept"
    )
    for block, share in resized.energy.items():
        if block:
            print(f"  {block:<22} {share:.2%}")
    return 0


def _part(text: str) -> MergePart:
    from sdlora import read_adapter
    from sdlora.adapters.merge import MergePart

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
        if equals:
            weights[prefix.strip()] = value
        else:
            weight = value
    return place, weight, weights


def _write(adapter: AdapterFile, options: argparse.Namespace) -> None:
    """The adapter is at the target, as a file that reads back as what it is. Raises SdloraError."""
    from sdlora.adapters.convert import write_checked

    write_checked(adapter, user_path(options.target), options.format)


def _check_target(options: argparse.Namespace) -> None:
    from sdlora.adapters.convert import refuse_existing

    refuse_existing(user_path(options.target), options.overwrite)


def _bytes(megabytes: float | None) -> int:
    """Return --megabytes in bytes, 0 where it is not given. Raises ConfigError."""
    if megabytes is None:
        return 0
    if not 1e-6 <= megabytes <= _MOST_MEGABYTES:
        raise ConfigError(f"--megabytes is {megabytes:g}; expected more than 0 and at most {_MOST_MEGABYTES:g}")
    return int(megabytes * 1e6)


def _check_share(flag: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ConfigError(f"{flag} is {value:g}; expected more than 0 and at most 1")


def _check_rank(rank: int) -> None:
    if rank < 0:
        raise ConfigError(f"--rank is {rank}; expected 1 or more")


def _ranks(adapter: AdapterFile) -> list[int]:
    return sorted({layer.rank for layer in adapter.layers.values()})


def _span(ranks: list[int]) -> str:
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows how many layers are done, on a terminal alone."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal) as shown:
        task = shown.add_task(what)
        yield lambda done, count: shown.update(task, completed=done, total=count)

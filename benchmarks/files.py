"""How long work on adapter files takes, on the layers of true SDXL: `python benchmarks/files.py`.

Merging and resizing go through products of factors, extraction through randomised SVD; beside each stands the same work
done naively, with the singular values of every whole weight. Numbers are random, of the true shapes, with singular
values that fall off; listing reads a folder of copies.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import machine
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from sdlora import AdapterFile, LoraLayer, write_adapter
from sdlora.adapters.algebra import Truncation
from sdlora.adapters.extract import ExtractSettings, extract, forget
from sdlora.adapters.merge import MergePart, MergeSettings, merge
from sdlora.adapters.resize import resize
from sdlora.assets import CONFIGS
from sdlora.families.base import match_targets
from sdlora.families.detect import BaseFacts
from sdlora.families.stored_base import StoredBase
from sdlora.families.traits import SDXL_TRAITS
from sdlora.families.weights import Place

_LISTED, _RANKS = 2000, 20
Given = TypeVar("Given")
Result = TypeVar("Result")


def layer_shapes(family: str, patterns: Sequence[str] = ("transformer_blocks.*",)) -> dict[str, tuple[int, ...]]:
    """Return {module path: shape} of those layers of a true UNet; as it is, the linear ones in transformer blocks."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / family / "unet"))
    paths = match_targets(unet, patterns)
    return {f"unet.{path}": tuple(unet.get_submodule(path).weight.shape) for path in paths}


def adapter_of(shapes: Mapping[str, tuple[int, ...]], rank: int, seed: int = 0, family: str = "sdxl") -> AdapterFile:
    """Return a random adapter whose singular values fall off, as those of trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    fall = 0.85 ** torch.arange(rank)
    layers = {}
    for path, (out, inside) in shapes.items():
        up = torch.randn(out, rank, generator=generator) * fall / out**0.5
        layers[path] = LoraLayer(torch.randn(rank, inside, generator=generator) / inside**0.5, up, float(rank))
    return AdapterFile(layers, family)


def naive(adapters: list[AdapterFile], rank: int) -> float:
    """Cut the sum of adapters off at a rank by an SVD of every whole weight; returns the share of energy kept."""
    kept = total = 0.0
    for path in adapters[0].layers:
        delta = torch.stack([adapter.layers[path].delta_weight() for adapter in adapters]).sum(dim=0)  # type: ignore[attr-defined]
        u, values, v = torch.linalg.svd(delta, full_matrices=False)
        _ = (u[:, :rank] * values[:rank].sqrt(), values[:rank, None].sqrt() * v[:rank])
        kept, total = kept + float(values[:rank].square().sum()), total + float(values.square().sum())
    return kept / total


def timed(work: Callable[[Given], Result], given: Given) -> tuple[float, Result]:
    """Return the seconds that work took, and what it returned."""
    started = time.perf_counter()
    result = work(given)
    return time.perf_counter() - started, result


Work = Callable[[list[AdapterFile]], float]
"""Does something to adapters and returns the share of energy that is left."""


def compare(name: str, work: Work, count: int, options: argparse.Namespace) -> tuple[list[object], dict[str, float]]:
    """Return a row and numbers: ours on all layers; ours and the naive way on every so many of them."""
    shapes = layer_shapes("sdxl")
    whole = [adapter_of(shapes, options.rank, seed) for seed in range(count)]
    some = dict(list(shapes.items())[:: options.every])
    sample = [adapter_of(some, options.rank, seed) for seed in range(count)]
    seconds = machine.median([timed(work, whole)[0] for _ in range(options.rounds)])
    ours = [timed(work, sample) for _ in range(options.rounds)]
    theirs = [timed(lambda found: naive(found, options.cut), sample) for _ in range(options.rounds)]
    our_time, their_time = (machine.median([time for time, _ in times]) for times in (ours, theirs))
    our_energy, their_energy = ours[0][1], theirs[0][1]
    numbers = {"seconds": seconds, "ratio": their_time / our_time, "energy difference": our_energy - their_energy}
    cells = [f"{seconds:.1f}", f"{our_time:.2f}", f"{their_time:.1f}", f"{their_time / our_time:.0f}"]
    row: list[object] = [name, f"{options.rank} to {options.cut}", *cells, f"{our_energy:.4%}", f"{their_energy:.4%}"]
    return row, {f"{name}: {key}": value for key, value in numbers.items()}


def extraction(folder: Path, options: argparse.Namespace) -> tuple[list[object], dict[str, float]]:
    """Return a row and numbers: two bases of every so many layers, convolutions too, and the adapter between them."""
    shapes = dict(list(layer_shapes("sdxl", ["transformer_blocks.*", "resnets.*"]).items())[:: options.every])
    before, after = write_pair(folder, shapes)
    settings = ExtractSettings(Truncation(rank=options.cut), Truncation(rank=options.cut), precision=torch.float32)

    def ours(pair: tuple[StoredBase, StoredBase]) -> float:
        extracted = extract(*pair, settings, folder / "out.safetensors")
        forget(extracted.work)
        return extracted.energy[""]

    def theirs(pair: tuple[StoredBase, StoredBase]) -> float:
        kept = total = 0.0
        for path in shapes:
            one, other = (base.read(f"{path}.weight").float().flatten(1) for base in pair)
            u, values, v = torch.linalg.svd(other - one, full_matrices=False)
            _ = (
                u[:, : options.cut] * values[: options.cut].sqrt(),
                values[: options.cut, None].sqrt() * v[: options.cut],
            )
            kept, total = kept + float(values[: options.cut].square().sum()), total + float(values.square().sum())
        return kept / total

    found = [timed(ours, (before, after)) for _ in range(options.rounds)]
    naively = [timed(theirs, (before, after)) for _ in range(options.rounds)]
    our_time, their_time = (machine.median([time for time, _ in times]) for times in (found, naively))
    our_energy, their_energy = found[0][1], naively[0][1]
    numbers = {
        "sample seconds": our_time,
        "ratio": their_time / our_time,
        "energy difference": our_energy - their_energy,
    }
    cells = ["-", f"{our_time:.2f}", f"{their_time:.1f}", f"{their_time / our_time:.0f}"]
    row: list[object] = ["extract", f"full to {options.cut}", *cells, f"{our_energy:.4%}", f"{their_energy:.4%}"]
    return row, {f"extract: {key}": value for key, value in numbers.items()}


def write_pair(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[StoredBase, StoredBase]:
    """Return two bases of these layers in float16, as files: the second is the first plus a difference of full rank.

    The k-th singular value of the difference falls off as 1 / k, as those of full fine-tuning fall slowly.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, dict[str, torch.Tensor]] = {"before": {}, "after": {}}
    for path, shape in shapes.items():
        out, inside = shape[0], math.prod(shape[1:])
        width = min(out, inside)
        left = torch.randn(out, width, generator=generator) / out**0.5
        right = torch.randn(width, inside, generator=generator) / inside**0.5
        difference = (left / torch.arange(1, width + 1)) @ right
        weight = torch.randn(out, inside, generator=generator) / inside**0.5
        tensors["before"][path] = weight.reshape(shape).half()
        tensors["after"][path] = (weight + 0.3 * difference).reshape(shape).half()
    bases = []
    for name, weights in tensors.items():
        file = folder / f"{name}.safetensors"
        save_file({f"{path}.weight": weight for path, weight in weights.items()}, file)
        places = {f"{path}.weight": Place(file, f"{path}.weight") for path in shapes}
        facts = BaseFacts(file, SDXL_TRAITS, "epsilon", "", False, {}, {"unet": (file,)}, ())
        bases.append(
            StoredBase(name, facts, places, {f"{path}.weight": shape for path, shape in shapes.items()}, tuple(shapes))
        )
    return bases[0], bases[1]


def listing(folder: Path, rounds: int) -> dict[str, float]:
    """Return how long a folder of 2,000 files takes to list, half of SD 1.x, half of SDXL.

    All layers are there but of 8 x 8 numbers, since only headers are read, and 2,000 true files fill 10 GB. The files
    are of _RANKS ranks in turn: headers that list the same tensors are told once, so copies of one would flatter.
    """
    for family in ("sd1", "sdxl"):
        shapes = dict.fromkeys(layer_shapes(family), (8, 8))
        for number in range(_LISTED // 2):
            file = folder / f"{family}-{number}.safetensors"
            if number < _RANKS:
                write_adapter(adapter_of(shapes, number + 1, family=family), file)
            else:
                shutil.copy(folder / f"{family}-{number % _RANKS}.safetensors", file)
    return {"listing: seconds": machine.median([timed(_inspect, folder)[0] for _ in range(rounds)])}


def _inspect(folder: Path) -> None:
    command = [sys.executable, "-m", "sdlora.cli.main", "adapter", "inspect", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    """Measure, print and write files.md and files.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32, help="of the adapters")
    parser.add_argument("--cut", type=int, default=8, help="rank that they are cut down to")
    parser.add_argument("--every", type=int, default=30, help="the naive way takes every so many layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    cut = Truncation(rank=options.cut)

    def resized(found: list[AdapterFile]) -> float:
        return resize(found[0], cut).energy[""]

    def merged(found: list[AdapterFile]) -> float:
        return 1 - merge([MergePart("a", found[0]), MergePart("b", found[1])], MergeSettings(keep=cut)).error ** 2

    row_1, numbers = compare("resize", resized, 1, options)
    row_2, more = compare("merge two", merged, 2, options)
    with tempfile.TemporaryDirectory() as folder:
        row_3, most = extraction(Path(folder), options)
    rows, numbers = [row_1, row_2, row_3], numbers | more | most
    with tempfile.TemporaryDirectory() as folder:
        numbers |= listing(Path(folder), options.rounds)
    columns = [
        "",
        "rank",
        "all 722 layers, s",
        "sample, s",
        "sample naively, s",
        "times faster",
        "energy",
        "energy naively",
    ]
    tables = [
        machine.table(columns, rows),
        f"Sample: every {options.every}th layer, to extract from with convolutions, two files in float16. Naively: an SVD of "
        "each whole weight. Merging includes its measured error.",
        f"`sdlora adapter inspect` of {_LISTED} files, half of SD 1.x and half of SDXL, of {_RANKS} ranks, headers in the disk's cache: {numbers['listing: seconds']:.1f} s.",
    ]
    machine.report("files", "Work on adapter files", tables, {"machine": machine.describe(), **numbers}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

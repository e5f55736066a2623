"""How much of the pictures is cropped away: our fitted shapes beside the buckets of kohya's trainer.

    python benchmarks/buckets.py --out benchmarks/results

Both get the same pictures, resolution, limits of the sides and number of shapes. Kohya's way, as
library/model_util.py and BucketManager.select_bucket of sd-scripts have it: a fixed list, the least
difference of width / height, scaled to cover, cropped.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np

from sdlora.config import BucketsSection
from sdlora.data.buckets import Bucket, assign_buckets, bucket_step, classic_buckets, cropped_share

Size = tuple[int, int]
_SEED = 2026
_NOTES = """\
Crop: mean share of a picture's area that is cropped away. Area: mean area of the shapes, of the
resolution's. Shapes: how many pictures are in, of how many there may be: both methods may have as many
as kohya's list. As few: ours where it may have only as many as kohya's pictures are in. Both: sides from
half to double the resolution; pictures smaller than their shape are enlarged. Kohya's sides are multiples
of 64, ours of 16 but in the last columns."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The sets are made, measured, printed and, with --out, written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the .md and .json report; left out: only printed")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[512, 1024])
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    sets = {f"{name}, {count}": (make, count) for name, (make, counts) in _SETS.items() for count in counts}
    runs = [
        {"resolution": resolution, "set": name, **compare(make(np.random.default_rng(_SEED), count), resolution)}
        for resolution in options.resolutions
        for name, (make, count) in sets.items()
    ]
    result = {"machine": machine.describe(), "seed": _SEED, "runs": runs}
    parts = [_table(runs), f"{_NOTES}\n\n{_verdict(runs)}"]
    machine.report("buckets", "Cropped away by aspect-ratio buckets", parts, result, options.out)


def compare(sizes: Sequence[Size], resolution: int) -> dict[str, Any]:
    """Return what both methods crop from pictures of these sizes, on average."""
    listed = kohya_list(resolution)
    theirs = [kohya_bucket(size, listed) for size in sizes]
    ours = assign_buckets(sizes, BucketsSection(count=len(listed)), resolution)
    as_few = assign_buckets(sizes, BucketsSection(count=len(set(theirs))), resolution)
    same_step = assign_buckets(sizes, BucketsSection(count=len(listed), step=bucket_step(resolution)), resolution)
    return {
        "pictures": len(sizes),
        "shapes": len(listed),
        "kohya": _outcome(sizes, theirs, resolution),
        "ours": _outcome(sizes, ours, resolution),
        "ours_as_few": _outcome(sizes, as_few, resolution),
        "ours_same_step": _outcome(sizes, same_step, resolution),
    }


def kohya_list(resolution: int) -> list[Bucket]:
    """Return kohya's buckets, which are our classic ones."""
    return classic_buckets(resolution, bucket_step(resolution), resolution // 2, resolution * 2)


def kohya_bucket(size: Size, listed: Sequence[Bucket]) -> Bucket:
    """Return the bucket of exactly this size, else the first of those with the nearest width / height."""
    if size in listed:
        return size
    return min(listed, key=lambda bucket: abs(bucket[0] / bucket[1] - size[0] / size[1]))


def _outcome(sizes: Sequence[Size], buckets: Sequence[Bucket], resolution: int) -> dict[str, float]:
    cropped = [cropped_share(*size, bucket) for size, bucket in zip(sizes, buckets, strict=True)]
    areas = [width * height / resolution**2 for width, height in buckets]
    return {
        "crop": sum(cropped) / len(cropped),
        "most_cropped": max(cropped),
        "area": sum(areas) / len(areas),
        "used": len(set(buckets)),
    }


def _phone(rng: np.random.Generator, count: int) -> list[Size]:
    """Photos of a phone: upright more often than not, 3:4 more often than 9:16."""
    frames = [(3024, 4032), (4032, 3024), (2160, 3840), (3840, 2160)]
    return [frames[index] for index in rng.choice(len(frames), count, p=[0.4, 0.3, 0.2, 0.1])]


def _scans(rng: np.random.Generator, count: int) -> list[Size]:
    """Pages and prints cut by hand: about 1:1.41, 2:3 or 4:5, either way up."""
    aspects = rng.choice([1 / math.sqrt(2), 2 / 3, 4 / 5], count) * np.exp(rng.normal(0, 0.03, count))
    turned = rng.random(count) < 0.3
    return _with_aspects(np.where(turned, 1 / aspects, aspects), rng.uniform(3e6, 1.2e7, count))


def _random(rng: np.random.Generator, count: int) -> list[Size]:
    """Any aspect between 1:2.2 and 2.2:1, as likely on a logarithmic scale."""
    return _with_aspects(np.exp(rng.uniform(-math.log(2.2), math.log(2.2), count)), rng.uniform(5e5, 5e6, count))


def _art(rng: np.random.Generator, count: int) -> list[Size]:
    """Drawings: a third in usual formats, the others of odd sizes, mostly upright, a few very long."""
    formats = np.array([1.0, 3 / 4, 4 / 3, 2 / 3, 3 / 2, 5 / 7, 9 / 16, 16 / 9])
    odd = np.exp(rng.normal(-0.25, 0.4, count)).clip(1 / 5, 5)
    aspects = np.where(rng.random(count) < 1 / 3, rng.choice(formats, count), odd)
    return _with_aspects(aspects, rng.uniform(4e5, 8e6, count))


def _with_aspects(aspects: np.ndarray, areas: np.ndarray) -> list[Size]:
    widths, heights = np.sqrt(areas * aspects), np.sqrt(areas / aspects)
    return [(round(width), round(height)) for width, height in zip(widths.tolist(), heights.tolist(), strict=True)]


_SETS: dict[str, tuple[Callable[[np.random.Generator, int], list[Size]], tuple[int, ...]]] = {
    "phone photos": (_phone, (30, 300)),
    "scans": (_scans, (30, 300)),
    "random aspects": (_random, (30, 300, 3000)),
    "art": (_art, (30, 300, 3000)),
}


def _verdict(runs: Sequence[dict[str, Any]]) -> str:
    halved = sum(run["ours"]["crop"] <= run["kohya"]["crop"] / 2 for run in runs)
    few = sum(run["ours_as_few"]["crop"] <= run["kohya"]["crop"] / 2 for run in runs)
    return f"At most half of kohya's crop: in {halved} of {len(runs)} rows, with as few shapes in {few}."


def _table(runs: Sequence[dict[str, Any]]) -> str:
    columns = ["pixels", "set, pictures", "kohya shapes", "kohya crop", "kohya area"]
    columns += ["our shapes", "our crop", "our area", "ratio of crops", "our crop, as few", "ratio"]
    columns += ["our crop, steps of 64", "ratio", "area"]
    rows = []
    for run in runs:
        theirs, ours, as_few, same = run["kohya"], run["ours"], run["ours_as_few"], run["ours_same_step"]
        row = [run["resolution"], run["set"], f"{theirs['used']} of {run['shapes']}", f"{theirs['crop']:.2%}"]
        row += [f"{theirs['area']:.0%}", f"{ours['used']} of {run['shapes']}", f"{ours['crop']:.2%}"]
        row += [f"{ours['area']:.0%}", f"{ours['crop'] / theirs['crop']:.2f}"]
        row += [f"{as_few['crop']:.2%}", f"{as_few['crop'] / theirs['crop']:.2f}"]
        rows.append([*row, f"{same['crop']:.2%}", f"{same['crop'] / theirs['crop']:.2f}", f"{same['area']:.0%}"])
    return machine.table(columns, rows)


if __name__ == "__main__":
    main()

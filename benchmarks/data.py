"""What preparing a data set takes, in time and memory: the first run, the next one, and the steps' reading.

Each is a process of its own that prepares a run as `sdlora train` does, up to the first step. The pictures are
drawn for it: JPEGs of mixed aspect, each with a caption of its own.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import machine

_SHAPES = ((4, 3), (3, 4), (16, 9), (9, 16), (1, 1), (3, 2), (2, 3), (5, 4))
_WORDS = ("a red ball", "on the beach", "at night", "in the snow", "seen from above", "two trees", "a small house")
_BATCHES_READ = 300


def main(arguments: Sequence[str] | None = None) -> None:
    """The measurements are made, printed and, with --out, written."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = {"folder": {"required": True}, "cache": {"required": True}}
    if machine.ran_as_child(words, measure, **options):
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the .md and .json report; left out: only printed")
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 10_000], help="sizes of the data sets")
    parser.add_argument(
        "--photos", type=int, default=24, help="pictures of 12 megapixels for the true-size VAE; 0: none"
    )
    chosen = parser.parse_args(words)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for count in chosen.counts:
            folder = draw_pictures(place / f"pictures-{count}", count, 0.05)
            runs += _runs("tiny, 64 pixels", "tiny", folder, place / f"cache-{count}", 64, ("first", "next"))
        if chosen.photos:
            base = machine.make_random_base("sd1", place / "sd1", "float32")
            folder = draw_pictures(place / "photos", chosen.photos, 12.0)
            runs += _runs("SD 1.5, 512 pixels", str(base), folder, place / "cache-photos", 512, ("first", "next"))
    result = {"machine": machine.describe(), "runs": runs}
    machine.report("data", "Preparing a data set", [_times(runs), _memory(runs)], result, chosen.out)


def draw_pictures(folder: Path, count: int, megapixels: float) -> Path:
    """Return the folder, with `count` JPEGs of about that size in mixed aspect, and captions."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)

    def draw(number: int) -> None:
        across, down = _SHAPES[number % len(_SHAPES)]
        unit = (megapixels * 1e6 / (across * down)) ** 0.5
        noise = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        size = (round(across * unit), round(down * unit))
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=90)
        words = random.Random(number).sample(_WORDS, 3)
        (folder / f"{number:06d}.txt").write_text(f"{', '.join(words)}, number {number}\n", encoding="utf-8")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(draw, range(count)))
    return folder


def _runs(title: str, base: str, folder: Path, cache: Path, pixels: int, names: Sequence[str]) -> list[dict[str, Any]]:
    job = {"base": base, "precision": "fp32", "pixels": pixels, "folder": folder, "cache": cache}
    return [{"title": title, "run": name, **machine.run_child("data.py", job)} for name in names]


def measure(options: argparse.Namespace) -> Mapping[str, Any]:
    """Return seconds and memory of one preparation."""
    from sdlora import load_base, parse_config
    from sdlora.data.cache_folder import measure_cache
    from sdlora.data.store import Together
    from sdlora.training.material import open_data, prepare_material

    config = parse_config(
        {
            "base": {"path": options.base, "precision": options.precision},
            "data": {"folder": options.folder, "resolution": options.pixels, "cache": {"folder": options.cache}},
            "training": {"batch_size": 8},
        }
    )
    started = time.perf_counter()
    base = load_base(config.base, "cpu", unet=False)
    loaded, before = time.perf_counter(), machine.peak_memory_gb()
    data = open_data(config)
    opened = time.perf_counter()
    said: list[str] = []
    material = prepare_material(config, base, data, Together(), said.append, None)
    prepared = time.perf_counter()
    for number in range(_BATCHES_READ):
        turns, _ = material.batch(number)
        for turn in turns:
            turn.example.posterior()
            material.texts[turn.text]
    read = time.perf_counter()
    cache = measure_cache(Path(options.cache))
    return {
        "pictures": len(material.examples),
        "load_seconds": loaded - started,
        "open_seconds": opened - loaded,
        "prepare_seconds": prepared - opened,
        "batch_milliseconds": (read - prepared) / _BATCHES_READ * 1000,
        "waiting_share": material.report.seconds_waiting / material.report.seconds if material.report.encoded else 0.0,
        "encoded": material.report.encoded,
        "memory_before_gb": before,
        "peak_gb": machine.peak_memory_gb(),
        "cache_gb": cache.bytes / 1e9,
    }


def _times(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            run["title"],
            f"{run['pictures']:,}",
            run["run"],
            f"{run['open_seconds']:.2f} s",
            f"{run['prepare_seconds']:.2f} s",
            f"{run['encoded'] / run['prepare_seconds']:.1f}" if run["encoded"] else "-",
            f"{run['waiting_share']:.0%}" if run["encoded"] else "-",
            f"{run['batch_milliseconds']:.2f} ms",
        )
        for run in runs
    ]
    columns = [
        "base",
        "pictures",
        "run",
        "opened in",
        "prepared in",
        "pictures/s",
        "waiting for files",
        "batch of 8 read in",
    ]
    return machine.table(columns, rows)


def _memory(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            run["title"],
            f"{run['pictures']:,}",
            run["run"],
            f"{run['memory_before_gb'] * 1000:.0f} MB",
            f"{run['peak_gb'] * 1000:.0f} MB",
            f"{run['cache_gb'] * 1000:.0f} MB",
        )
        for run in runs
    ]
    return machine.table(["base", "pictures", "run", "peak once loaded", "peak at the end", "cache on disk"], rows)


if __name__ == "__main__":
    main()

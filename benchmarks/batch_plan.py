"""How long a batch takes to be read and planned, before anything is made: `python benchmarks/batch_plan.py`.

Jobs files of 10,000 lines for the tiny base: prompts alone, names from a template, and jobs that start from twenty pictures
with masks in turn, of 1024 x 1024 pixels. Every round has files of its own, so that nothing is known of them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
from PIL import Image

from sdlora import BaseSection
from sdlora.generation.batch.jobs import read_jobs
from sdlora.generation.batch.plan import plan_batch

_WORDS = ("red", "green", "blue", "ball", "cat", "dog", "house", "tree", "river", "mountain", "portrait", "ink", "fog")
_SOURCES, _SIDE = 20, 1024


def prompts(count: int, folder: Path) -> str:
    """Return lines of a jobs file with settings as people give them."""
    draw = random.Random(0)
    lines = (f"a photo of {' '.join(draw.choices(_WORDS, k=12))} --n blurry, dull --d {n} --s 20" for n in range(count))
    return "".join(f"{line}\n" for line in lines)


def named(count: int, folder: Path) -> str:
    """Return the same lines, each with a name that is filled in."""
    return prompts(count, folder).replace(" --s 20", " --s 20 --name {base}/{prompt}-{steps}")


def from_pictures(count: int, folder: Path) -> str:
    """Return lines that start from pictures, which lie in the folder then."""
    for number in range(_SOURCES):
        Image.effect_noise((_SIDE, _SIDE), 20 + number).convert("RGB").save(folder / f"start-{number}.png")
        Image.new("L", (_SIDE, _SIDE), 255 - number).save(folder / f"mask-{number}.png")
    lines = prompts(count, folder).splitlines()
    ends = (f"--image start-{n % _SOURCES}.png --mask mask-{n % _SOURCES}.png" for n in range(count))
    return "".join(f"{line} {end}\n" for line, end in zip(lines, ends, strict=True))


_SETS = {
    "prompts": prompts,
    "prompts, named by a template": named,
    f"from {_SOURCES} pictures with masks": from_pictures,
}


def timed(text: str, folder: Path) -> tuple[float, float]:
    """Return the seconds of the processor that reading and planning take; waiting for others does not count."""
    jobs = folder / "jobs.txt"
    jobs.write_text(text, encoding="utf-8")
    started = time.process_time()
    found = read_jobs(jobs)
    read = time.process_time()
    plan_batch(found, BaseSection(path="tiny"))
    return read - started, time.process_time() - read


def main() -> int:
    """Measure, print and write batch_plan.md and batch_plan.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the .md and .json report; left out: only printed")
    options = parser.parse_args()
    numbers: dict[str, Any] = {"jobs": options.jobs, "rounds": options.rounds}
    rows: list[list[object]] = []
    for title, lines in _SETS.items():
        times = []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as name:
                times.append(timed(lines(options.jobs, Path(name)), Path(name)))
        read, plan = (statistics.median(seconds) for seconds in zip(*times, strict=True))
        least = min(map(sum, times))
        numbers |= {f"{title}: read, s": round(read, 2), f"{title}: plan, s": round(plan, 2)}
        numbers |= {f"{title}: least of both, s": round(least, 2)}
        rows.append([title, f"{read:.2f}", f"{plan:.2f}", f"{read + plan:.2f}", f"{least:.2f}"])
    tables = [
        machine.table(["jobs", "read, s", "planned, s", "both, s", "the quickest round, s"], rows),
        f"{options.jobs:,} jobs, seconds of the processor, medians of {options.rounds} rounds; planning finds every picture's final prompts, identity and file.",
    ]
    machine.report("batch_plan", "Planning a batch", tables, {"machine": machine.describe(), **numbers}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

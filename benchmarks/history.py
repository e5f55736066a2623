"""How long a history of 100,000 pictures takes to search: `python benchmarks/history.py`.

Recipes are drawn from small lists of words, adapters and bases, so that some searches find a few pictures and some nearly
all. Each search opens the index anew, as a command does. Files of a few bytes stand in for pictures where only names,
sizes and times are read.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import machine
from PIL import Image

from sdlora import History, Recipe, save_picture
from sdlora.generation.history.row import insert, row_of
from sdlora.generation.recipe import UsedAdapter

_WORDS = (
    "red",
    "green",
    "blue",
    "ball",
    "cat",
    "dog",
    "house",
    "tree",
    "river",
    "mountain",
    "portrait",
    "landscape",
    "oil",
    "watercolour",
    "ink",
    "night",
    "dawn",
    "fog",
)
_CHARACTERS = "\u8d64\u3044\u5e3d\u5b50\u306e\u5973\u306e\u5b50\u304c\u591c\u306e\u6771\u4eac\u3092\u6b69\u304f\u7d75"
"""Of Japanese, from which every fourth picture's prompt has some in a row."""
_RARE = 997
"""Every so many pictures one shows what none of the others does."""
_RARE_CHARACTERS = "\u9ed2\u3044\u732b"
_BEGUN = 1_700_000_000
_SECONDS_BETWEEN = 300


def recipes(count: int) -> list[Recipe]:
    """Return recipes as they come about: prompts of 6 to 40 words and some in Japanese, up to two of 50 adapters, three bases."""
    draw, draw_characters = random.Random(0), random.Random(1)
    adapters = [UsedAdapter(f"style-{n}", f"{n:064x}", f"{n + 1000:064x}", 0.8) for n in range(50)]
    found = []
    for number in range(count):
        words = draw.choices(_WORDS, k=draw.randint(6, 40))
        if number % 4 == 0:
            words.append("".join(draw_characters.choices(_CHARACTERS, k=draw_characters.randint(4, 30))))
        if number % _RARE == 0:
            words += ["zorblin", f"\u5927\u304d\u306a{_RARE_CHARACTERS}\u306e\u7d75"]
        base = draw.randrange(3)
        found.append(
            Recipe(
                prompt=f"a photo of {' '.join(words)}",
                negative_prompt="blurry, low quality, text",
                seed=draw.randrange(2**32),
                steps=25,
                guidance_scale=7.5,
                width=512,
                height=512,
                base=f"base-{base}",
                base_family="sd1",
                base_sha256=f"{base + 1:064x}",
                adapters=tuple(draw.sample(adapters, draw.randint(0, 2))),
                scheduler="EulerDiscreteScheduler",
                scheduler_config={"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012},
                noise_device="cpu",
                precision="fp32",
                device="cpu",
                versions={"sdlora": "0.1.0", "torch": "2.13.0"},
                emphasis="original",
            )
        )
    return found


def fill(folder: Path, found: list[Recipe]) -> float:
    """Return how long the index took to be filled with pictures that lie in `folder`, a hundred a subfolder."""
    rows = []
    for number, recipe in enumerate(found):
        place = f"{number // 100:04}/{number:06}.png"
        file = folder / place
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"-")
        when = _BEGUN + number * _SECONDS_BETWEEN
        os.utime(file, (when, when))
        rows.append(row_of(os.fsencode(place), f"1:{file.stat().st_mtime_ns}", recipe))
    history = History(folder)
    started = time.perf_counter()
    for start in range(0, len(rows), 500):
        some = rows[start : start + 500]
        history._index.do(lambda connection, some=some: insert(connection, some))  # type: ignore[misc]
    return time.perf_counter() - started


def searches(found: list[Recipe]) -> dict[str, dict[str, Any]]:
    """Return what is searched for, by what it is called in the report."""
    day = datetime.fromtimestamp(_BEGUN + len(found) // 2 * _SECONDS_BETWEEN)
    return {
        "the newest 50": {},
        "a word of every prompt": {"prompt": "photo"},
        "a rare word": {"prompt": "zorblin"},
        "three words": {"prompt": "red cat watercolour"},
        "the beginning of a word": {"prompt": "water"},
        "words that no prompt has": {"prompt": "giraffe"},
        "characters of a script without spaces": {"prompt": "\u72ac"},
        "such characters beside a word of every prompt": {"prompt": "\u72ac photo"},
        "rare characters": {"prompt": _RARE_CHARACTERS},
        "rare characters beside a common word": {"prompt": f"{_RARE_CHARACTERS} photo"},
        "a character of most such prompts": {"prompt": "\u306e"},
        "an adapter by name": {"adapter": "style-7"},
        "an adapter by hash": {"adapter": f"{7:064x}"[-64:]},
        "a seed": {"seed": found[len(found) // 3].seed},
        "a base and a word": {"base": "base-1", "prompt": "portrait"},
        "an adapter and a word": {"adapter": "style-7", "prompt": "portrait"},
        "a seed and a word": {"seed": found[len(found) // 3].seed, "prompt": "photo"},
        "a week": {"since": day, "until": day + timedelta(days=7)},
        "a rare word, rated 4 or more": {"prompt": "zorblin", "rating": 4},
        "rated 4 or more": {"rating": 4},
        "eighteen words": {"prompt": " ".join(_WORDS)},
        "adapters of one name": {"adapter": "style"},
        "adapters of one name and a rare word": {"adapter": "style", "prompt": "zorblin"},
        "adapters of one name, a base and a word, rated 4 or more": {
            "adapter": "style",
            "base": "base-1",
            "prompt": "portrait",
            "rating": 4,
        },
        "everything of a word, counted": {"prompt": "river", "limit": 1, "offset": 10_000},
    }


def timed(work: Callable[[], object], rounds: int) -> list[float]:
    """Return the milliseconds of each round."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - started))
    return times


def main() -> int:
    """Measure, print and write history.md and history.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--read", type=int, default=2000, help="true pictures that are read for a rebuild")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="folder for the .md and .json report; left out: only printed")
    options = parser.parse_args()
    numbers: dict[str, Any] = {"pictures": options.pictures, "rounds": options.rounds}
    found = recipes(options.pictures)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        numbers["fill: seconds"] = round(fill(folder, found), 2)
        numbers["megabytes"] = round(sum(file.stat().st_size for file in folder.glob(".sdlora*")) / 1e6, 1)
        rate_some(folder, found)
        rows: list[list[object]] = []
        for title, asked in searches(found).items():
            count = len(History(folder).search(**{**asked, "limit": None, "offset": 0}))
            times = timed(lambda asked=asked: History(folder).search(**asked), options.rounds)  # type: ignore[misc]
            median, p95 = statistics.median(times), statistics.quantiles(times, n=20)[-1]
            numbers |= {
                f"{title}: median ms": round(median, 2),
                f"{title}: p95 ms": round(p95, 2),
                f"{title}: found": count,
            }
            rows.append([title, f"{count:,}", f"{median:.1f}", f"{p95:.1f}"])
        refreshing = timed(lambda: History(folder).refresh(), 3)
        numbers["refresh: seconds"] = round(statistics.median(refreshing) / 1000, 2)
    with tempfile.TemporaryDirectory() as name:
        numbers["rebuild: pictures a second"] = read_rate(Path(name), found[: options.read])
    tables = [
        machine.table(["searched for", "pictures found", "median, ms", "95 of 100 below, ms"], rows),
        f"{options.pictures:,} pictures, the newest 50 of those found, {options.rounds} rounds each, the index opened anew each "
        f"time; it takes {numbers['megabytes']} MB.",
        f"Filling it: {numbers['fill: seconds']} s. Looking through the folder where nothing has changed: "
        f"{numbers['refresh: seconds']} s. Reading pictures of 64 x 64 pixels anew: "
        f"{numbers['rebuild: pictures a second']:.0f} a second.",
    ]
    machine.report("history", "Searching a history", tables, {"machine": machine.describe(), **numbers}, options.out)
    return 0


def rate_some(folder: Path, found: list[Recipe]) -> None:
    """Every hundredth picture has 1 to 5 stars; written as `History.rate` writes them, whose pictures would have to be real."""
    history = History(folder)
    for number in range(0, len(found), 100):
        row = row_of(b"", "", found[number])
        history._ratings.add(row.identity, number // 100 % 5 + 1, f"{number:06}.png")


def read_rate(folder: Path, found: list[Recipe]) -> float:
    """Return how many true pictures a second are read into an empty history."""
    picture = Image.new("RGB", (64, 64))
    for number, recipe in enumerate(found):
        save_picture(picture, replace(recipe, seed=number), folder / f"{number}.png")
    started = time.perf_counter()
    History(folder).refresh()
    return round(len(found) / (time.perf_counter() - started), 1)


if __name__ == "__main__":
    sys.exit(main())

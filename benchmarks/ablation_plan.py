"""Which runs the rows of the ablation need, and the folder that keeps what each measured."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ablation_rows import CONCEPT, ROWS, Row, Settings, settings_of
from ablation_run import Job

from sdlora.storage import write_json

Result = dict[str, Any]
SWEEP_SEED = 0
"""The seed of the runs that choose a value, never one of those in a table."""
PRECISIONS = ("fp32", "int8", "nf4")
_SOURCES = Path(__file__).parents[1]
_BY_NAME = {row.name: row for row in ROWS}


@dataclass(frozen=True)
class Scale:
    """How much is run for each row."""

    steps: int = 300
    seeds: tuple[int, ...] = (1, 2, 3)
    prompts: int = 16
    sweep_steps: int = 150
    """Optimizer steps of the runs that choose a value."""


@dataclass(frozen=True)
class Book:
    """The results in a folder, one JSON file a run, named after everything that decides the outcome."""

    folder: Path

    def newest(self, job: Job) -> Result | None:
        """Return what the job measured last, by any version of the code; a failure only where nothing else is."""
        results = self._results(job, "*")
        return max(results, key=lambda result: ("error" not in result, result["measured"]), default=None)

    def holds(self, job: Job, code: str) -> bool:
        """Tell whether the job was measured by this code ("*": by any), and did not fail."""
        return any("error" not in result for result in self._results(job, code))

    def keep(self, job: Job, code: str, result: Result) -> None:
        """The result is in the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f"*-{key_of(job)}-{code}.json"):
            path.unlink()
        slug = re.sub(r"[^a-z0-9]+", "-", job.row.lower()).strip("-")
        write_json(self.folder / f"{slug}-{job.seed}-{key_of(job)}-{code}.json", result)

    def take(self, report: Mapping[str, Any], scale: Scale) -> None:
        """The folder holds what a report's ablation.json does, which has of a sweep no more than its losses."""
        measured = [*report["bases"].values(), *(run for row in report["rows"] for run in row["runs"])]
        for run in measured:
            job = Job(**{field.name: run[field.name] for field in fields(Job)})
            if not self.holds(job, "*"):
                self.keep(job, run["code"], run)
        chosen = {row["name"]: row["chosen"]["losses"] for row in report["rows"] if row["chosen"]}
        rows = [row for row in ROWS if row.name in chosen]
        for row in sorted(rows, key=lambda row: bool(row.swept_as)):  # those that others inherit from, first
            for job in sweep_jobs(row, self, scale):
                loss = chosen[row.name].get(str(job.settings[row.sweep.key])) if row.sweep else None
                if loss is not None and not self.holds(job, "*"):
                    kept = {**asdict(job), "loss_after": loss, "measured": ""}
                    self.keep(job, "reported", kept)

    def _results(self, job: Job, code: str) -> list[Result]:
        paths = self.folder.glob(f"*-{key_of(job)}-{code}.json")
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def key_of(job: Job) -> str:
    """Return a name of all that decides what a job measures; rows of equal settings share their runs."""
    content = json.dumps({**asdict(job), "row": ""}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:10]


def code_id() -> str:
    """Return a name of the program and of what judges it, as they are on the disk now."""
    files = sorted(
        [*_SOURCES.glob("sdlora/**/*.py"), *(_SOURCES / "benchmarks" / name for name in ("exam.py", "judge.py"))]
    )
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(_SOURCES)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:10]


@dataclass(frozen=True)
class Choice:
    """The outcome of a row's sweep."""

    key: str
    losses: dict[float, float]
    """Held-out loss of each value that was run to the end."""

    @cached_property
    def value(self) -> float:
        """The value with the lowest loss."""
        return min(self.losses, key=lambda value: self.losses[value])

    @property
    def at_edge(self) -> bool:
        """Whether a value beyond those tried might be better still."""
        return self.value in (min(self.losses), max(self.losses))


def sweep_jobs(row: Row, book: Book, scale: Scale) -> list[Job]:
    """Return the runs that choose the row's swept value; those of the row it is swept as must be there already."""
    if row.sweep is None:
        return []
    given = {**_inherited(row, book, scale), "training.steps": scale.sweep_steps}
    return [
        Job(row.name, settings_of(row, {**given, row.sweep.key: value}), SWEEP_SEED, prompts=0)
        for value in row.sweep.values
    ]


def choice_of(row: Row, book: Book, scale: Scale) -> Choice | None:
    """Return what the row's sweep chose; None without a sweep. Raises LookupError when none of its runs succeeded."""
    if row.sweep is None:
        return None
    losses, problem = {}, "its sweep was not run"
    for value, job in zip(row.sweep.values, sweep_jobs(row, book, scale), strict=True):
        result = book.newest(job)
        if result and result.get("loss_after") is not None:
            losses[value] = result["loss_after"]
        elif result:
            problem = result.get("error", problem)
    if not losses:
        raise LookupError(problem)
    return Choice(row.sweep.key, losses)


def table_jobs(row: Row, book: Book, scale: Scale) -> list[Job]:
    """Return the row's runs, one a seed. Raises LookupError when its sweep, or the one it depends on, came to nothing."""
    given = {**_inherited(row, book, scale), "training.steps": scale.steps}
    if choice := choice_of(row, book, scale):
        given[choice.key] = choice.value
    return [Job(row.name, settings_of(row, given), seed, scale.prompts) for seed in scale.seeds]


def _inherited(row: Row, book: Book, scale: Scale) -> dict[str, float]:
    """Return the value that another row's sweep chose for this one, if there is such a row."""
    if not row.swept_as:
        return {}
    choice = choice_of(_BY_NAME[row.swept_as], book, scale)
    assert choice is not None, f"{row.swept_as} has no sweep"
    return {choice.key: choice.value}


def base_jobs(scale: Scale) -> list[Job]:
    """Return the runs that judge the base alone, one a precision."""
    settings = {form: {**CONCEPT, "base.quantize": "none" if form == "fp32" else form} for form in PRECISIONS}
    return [Job(f"base {form}", settings[form], SWEEP_SEED, scale.prompts, trains=False) for form in PRECISIONS]


def time_jobs(row: Row, scale: Scale, every: int) -> list[Job]:
    """Return the runs that show how a row's held-out loss falls, one a seed; the row says how many steps."""
    return [Job(row.name, settings_of(row), seed, scale.prompts, every) for seed in scale.seeds]


def waves(rows: Sequence[Row]) -> Iterator[tuple[list[Row], list[Row]]]:
    """Yield (rows to sweep, rows to measure) in an order in which each finds what it depends on."""
    parents = {name: _BY_NAME[name] for row in rows if (name := row.swept_as)}
    free = {row.name: row for row in [*parents.values(), *rows] if not row.swept_as}
    yield list(free.values()), []
    yield [row for row in rows if row.swept_as], []
    yield [], list(rows)


def chosen_rows(rows: Iterable[Row], patterns: Sequence[str]) -> list[Row]:
    """Return the rows whose "|name|group" holds one of the patterns, in order; all where there are none."""
    wanted = [pattern.lower() for pattern in patterns]
    return [row for row in rows if not wanted or any(word in f"|{row.name}|{row.group}".lower() for word in wanted)]


def settings_text(settings: Settings) -> str:
    """Return settings as a reader would write them."""
    return ", ".join(
        f"{key} = {json.dumps(value)}" if value is not None else f"no {key}" for key, value in settings.items()
    )

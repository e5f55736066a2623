"""docs/ablation.md: means and spreads of what the runs measured, and what follows from them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import machine
from ablation_plan import Choice, Result, settings_text
from ablation_rows import Row, Settings


@dataclass(frozen=True)
class Measured:
    """A row with the results of its seeds; `problem` says why there are fewer than there should be."""

    row: Row
    runs: Sequence[Result]
    choice: Choice | None = None
    problem: str = ""


@dataclass(frozen=True)
class Spread:
    """A number measured with several seeds."""

    values: tuple[float, ...]
    counting_error: float = 0.0
    """For a share of judged pictures: what it may differ by with other pictures."""

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def width(self) -> float:
        """The distance from the smallest to the largest value, or the counting error where that is more."""
        return max(max(self.values) - min(self.values), self.counting_error)

    def text(self, form: Callable[[float], str]) -> str:
        """Return the mean, and the smallest and the largest value where they look different."""
        low, high = form(min(self.values)), form(max(self.values))
        return form(self.mean) if low == high else f"{form(self.mean)} ({low} - {high})"


_FEWEST_SEEDS, _SEEDS_TO_PERMUTE, _LARGEST_P = 3, 5, 0.01


def supported(one: Spread, other: Spread, usual: float = 0.0) -> bool:
    """Tell whether the means lie further apart than both spreads together, each taken as `usual` or more.

    Or, with seeds enough for it, whether a permutation test says that this is hardly chance. The range of a few seeds
    is small by chance now and then; among many rows that would pass for a finding.
    """
    seeds = min(len(one.values), len(other.values))
    if seeds >= _SEEDS_TO_PERMUTE and permutation_p(one.values, other.values) < _LARGEST_P:
        return True
    return seeds >= _FEWEST_SEEDS and abs(one.mean - other.mean) > max(one.width, usual) + max(other.width, usual)


def permutation_p(one: Sequence[float], other: Sequence[float]) -> float:
    """Return how often values shared out by chance have means as far apart as these: an exact permutation test."""
    together = [*one, *other]
    total, found = sum(together), abs(statistics.fmean(one) - statistics.fmean(other))
    apart = [
        abs(sum(chosen) / len(one) - (total - sum(chosen)) / len(other))
        for chosen in itertools.combinations(together, len(one))
    ]
    return sum(distance >= found - 1e-9 for distance in apart) / len(apart)


@dataclass(frozen=True)
class Column:
    """One measured number: its title in tables, its name in sentences, and where it lies in a result."""

    title: str
    said: str
    key: str
    form: Callable[[float], str]
    unit: float = 1.0
    """The result's value is divided by this."""
    better: int = 0
    """1: more is better; -1: less; 0: no matter of better, and no sentences about it."""
    pictures_a_prompt: int = 0

    def of(self, runs: Iterable[Result]) -> Spread | None:
        """Return the number over the runs; None where none has it."""
        found = [run for run in runs if run.get(self.key) is not None]
        values = tuple(run[self.key] / self.unit for run in found)
        return Spread(values, self._counting_error(found)) if values else None

    def _counting_error(self, runs: Sequence[Result]) -> float:
        """Return the standard error of a share of so many pictures, Laplace's estimate, so that 0 and 1 have one too."""
        if not self.pictures_a_prompt:
            return 0.0
        pictures = self.pictures_a_prompt * min(run["prompts"] for run in runs)
        share = statistics.fmean(run[self.key] for run in runs)
        smooth = (share * pictures + 1) / (pictures + 2)
        return math.sqrt(smooth * (1 - smooth) / pictures)


COLUMNS = (
    Column("weights", "trained weights", "parameters", "{:,.0f}".format),
    Column("file, KB", "file", "adapter_bytes", "{:.0f}".format, unit=1000),
    Column("UNet, MB", "UNet", "unet_bytes", "{:.1f}".format, unit=1e6),
    Column("peak, MB", "peak memory", "peak_gb", "{:.0f}".format, unit=1e-3),
    Column("CPU, s", "processor seconds", "cpu_seconds", "{:.0f}".format),
    Column("held-out loss", "held-out loss", "loss_after", "{:.4f}".format, better=-1),
    Column("concept", "concept share", "concept_share", "{:.0%}".format, better=1, pictures_a_prompt=2),
    Column("followed", "other prompts followed", "following", "{:.0%}".format, better=1, pictures_a_prompt=1),
)
_JUDGED = COLUMNS[-3:]


def head(results: Sequence[Result]) -> str:
    """Return one paragraph: commits, devices, versions and dates of the results."""
    machines = [result["machine"] for result in results]

    def all_of(key: str) -> str:
        return ", ".join(sorted({str(found[key]) for found in machines}))

    versions = sorted(
        {", ".join(f"{name} {version}" for name, version in found["versions"].items()) for found in machines}
    )
    days = sorted({result["measured"][:10] for result in results})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    side = sorted({str(result["side_by_side"]) for result in results})
    return (
        f"Commit {all_of('commit')}; {all_of('device')}, {all_of('cores')} cores, {' or '.join(side)} run(s) at once of one "
        f"thread each; Python {all_of('python')}; {'; '.join(versions)}; {when}."
    )


def groups(rows: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Return the rows by group, in order; before them the rows of other groups that they are compared with."""
    found: dict[str, list[Measured]] = {}
    for row in rows:
        found.setdefault(row.row.group, []).append(row)
    for name, members in found.items():
        wanted = {other for row in members for other in row.row.against}
        found[name] = [row for row in rows if row.row.name in wanted and row not in members] + members
    return found


def row_table(rows: Sequence[Measured]) -> str:
    """Return a table of the rows that ran, the best mean of each judged column in bold."""
    ran = [row for row in rows if row.runs]
    spreads = [[column.of(row.runs) for column in COLUMNS] for row in ran]
    best = [_best(column, [line[number] for line in spreads]) for number, column in enumerate(COLUMNS)]
    lines = []
    for row, line in zip(ran, spreads, strict=True):
        cells = [
            "-" if spread is None else _marked(spread.text(column.form), column.form(spread.mean) == top)
            for spread, column, top in zip(line, COLUMNS, best, strict=True)
        ]
        lines.append([row.row.name, *cells, len(row.runs)])
    return machine.table(["", *(column.title for column in COLUMNS), "seeds"], lines)


def _best(column: Column, spreads: Sequence[Spread | None]) -> str | None:
    """Return the best mean as it is printed; None for a column that is not judged, or with nothing to compare."""
    means = [spread.mean for spread in spreads if spread]
    if column not in _JUDGED or len(means) < 2:
        return None
    return column.form(max(means, key=lambda mean: mean * column.better))


def _marked(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def base_table(bases: Mapping[str, Result], rows: Sequence[Measured]) -> str:
    """Return a table of the bases without any adapter; their held-out loss is that before training."""
    lines = []
    for form, result in bases.items():
        quantize = "none" if form == "fp32" else form
        runs = [run for row in rows for run in row.runs if run["settings"].get("base.quantize", "none") == quantize]
        loss = next((f"{run['loss_before']:.4f}" for run in runs), "-")
        cells = [
            f"{result['unet_bytes'] / 1e6:.1f}",
            loss,
            f"{result['concept_share']:.0%}",
            f"{result['following']:.0%}",
        ]
        lines.append([form, *cells])
    return machine.table(["base", "UNet, MB", "held-out loss", "concept", "followed"], lines)


def findings(rows: Sequence[Measured]) -> list[str]:
    """Return a sentence for each comparison: what differs by more than the spreads, or that nothing does."""
    by_name = {row.row.name: row for row in rows}
    usual = {column.key: _usual_width(column, rows) for column in COLUMNS}
    sentences: list[str] = []
    alike: list[tuple[str, str]] = []
    for row in rows:
        for name in row.row.against:
            other = by_name.get(name)
            if not (row.runs and other and other.runs):
                continue
            said = list(_differences(row.runs, other.runs, usual))
            if said:
                sentences.append(f"{row.row.name}, against {name}: {'; '.join(said)}.")
            else:
                alike.append((name, row.row.name))
    for name in dict.fromkeys(name for name, _ in alike):
        sentences.append(
            f"No difference from {name} beyond the spreads: {'; '.join(row for other, row in alike if other == name)}."
        )
    return sentences


def _usual_width(column: Column, rows: Sequence[Measured]) -> float:
    """Return the median of the rows' spreads."""
    return statistics.median([spread.width for row in rows if (spread := column.of(row.runs))] or [0.0])


def _differences(runs: Sequence[Result], others: Sequence[Result], usual: Mapping[str, float]) -> Iterator[str]:
    for column in COLUMNS:
        one, other = column.of(runs), column.of(others)
        if column.better and one and other and supported(one, other, usual[column.key]):
            verdict = "better" if (one.mean - other.mean) * column.better > 0 else "worse"
            yield f"{column.said} {column.form(one.mean)} instead of {column.form(other.mean)}, {verdict}"


def choices_table(rows: Sequence[Measured]) -> str:
    """Return a table of what the sweeps tried and chose."""
    lines = []
    for row in rows:
        if row.choice:
            tried = ", ".join(f"{value:g}: {loss:.4f}" for value, loss in row.choice.losses.items())
            edge = " (at the edge)" if row.choice.at_edge else ""
            lines.append([row.row.name, row.choice.key, f"{row.choice.value:g}{edge}", tried])
    return machine.table(["", "setting", "chosen", "held-out loss of each value"], lines)


def ablation_text(rows: Sequence[Measured], bases: Mapping[str, Result], start: Settings, sweep_steps: int) -> str:
    """Return the whole page; `start` holds the settings that the rows change."""
    results = [*bases.values(), *(run for row in rows for run in row.runs)]
    parts = [
        "# Ablation",
        head(results),
        _HOW.format(start="\n    ".join(settings_text({key: start[key]}) for key in start)),
    ]
    if bases:
        parts += ["## The base alone", base_table(bases, rows)]
    for name, members in groups(rows).items():
        parts += [f"## {name}", row_table(members)]
    supports = [f"- {sentence}" for sentence in findings(rows)]
    parts += ["## What the tables support", _RULE, "\n".join(supports) or "Nothing: no two rows can be compared."]
    parts += ["## Chosen values", _CHOSEN.format(steps=sweep_steps), choices_table(rows)]
    changed = [f"- {row.row.name}: {settings_text(row.row.settings)}" for row in rows if row.row.settings]
    parts += ["## What each row changes", "\n".join(changed)]
    if failed := [f"- {row.row.name}: {row.problem}" for row in rows if row.problem]:
        parts += ["## Not measured", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


_HOW = """`benchmarks/ablation.py` makes this page; no number in it is written by hand. Each run teaches the tiny base the
example concept, in a process of its own, and the judge of the demo looks at what came of it. The seed of a run decides
the adapter's start, the order of the pictures and the noise; prompts and seeds of the judged pictures are the same for
all. Rows change one thing in these settings, and all train for equally many steps:

    {start}

- weights: trained parameters. file: the adapter's, and those of new words. UNet: its frozen weights as they are held.
- peak: the largest resident memory of the process up to the saved adapter, libraries included.
- CPU: processor seconds of the whole run, start-up included, judging not. Other processes slow caches down, and these
  runs had some beside them, so nothing is concluded from it.
- held-out loss: unweighted squared error with fixed noise on pictures of the concept that are never trained on. A row
  that weighs timesteps otherwise is measured with the same loss.
- concept: the share of pictures that show the concept, where the prompt has its trigger. followed: the share that shows
  what was asked for, where it has not.
- Each number is a mean over the seeds, with the smallest and the largest in brackets. Bold: the best mean of its table."""

_RULE = """A difference counts where the means of at least three seeds each lie further apart than both spreads together. A
spread is the largest minus the smallest value, at least that of the median row and, for shares, at least the standard
error of so many pictures. With five seeds and more a difference counts too where an exact permutation test of the two
rows gives p < 0.01. What is not listed here is not claimed. It is said of this base and concept, this number of
steps and these rates; a larger model may differ."""

_CHOSEN = """By held-out loss after {steps} steps, with one seed that is in no table, then taken for all seeds; the pictures
held out are those of the tables. A value at the edge of those tried may have a better one beyond. Rows that are not
named here train at the rate chosen for the row that they change, which favours that row where they change the size of
the loss."""


def reached(curve: Sequence[Sequence[float]], target: float) -> tuple[int, float] | None:
    """Return the step and the training seconds of the first measurement at or below `target`; None where there is none."""
    return next(((int(step), seconds) for step, seconds, loss in curve if loss <= target), None)


def time_table(rows: Sequence[Measured], target: float) -> str:
    """Return a table of how long each row takes until its held-out loss is `target`, and how good it is at its end.

    Where a run never gets there, its whole time is a lower bound.
    """
    first = next((_time_of(row, target) for row in rows if row.runs and not row.row.against), None)
    lines = []
    for row in rows:
        if not row.runs:
            lines.append([row.row.name, *"-" * 8, row.problem])
            continue
        steps, seconds = _steps_of(row, target), _time_of(row, target)
        startup = Spread(tuple(run["startup_seconds"] for run in row.runs))
        ratio = f"{'< ' if first.bound else ''}{seconds.mean / first.mean:.2f}" if first and not seconds.bound else "-"
        ends = [spread.text(column.form) for column in _JUDGED if (spread := column.of(row.runs))]
        cells = [
            steps,
            seconds.text(),
            f"{'> ' if seconds.bound else ''}{seconds.mean + startup.mean:.0f}",
            ratio,
            *ends,
        ]
        lines.append([row.row.name, row.runs[0]["steps"], *cells, len(row.runs), ""])
    columns = [
        "",
        "of steps",
        "step",
        "training, s",
        "with start-up, s",
        "ratio",
        *(c.title for c in _JUDGED),
        "seeds",
        "",
    ]
    return machine.table(columns, lines)


@dataclass(frozen=True)
class _Time:
    spread: Spread
    bound: bool
    """Some seed never got there; its time is only a lower bound."""

    @property
    def mean(self) -> float:
        return self.spread.mean

    def text(self) -> str:
        return f"{'> ' if self.bound else ''}{self.spread.text('{:.0f}'.format)}"


def _time_of(row: Measured, target: float) -> _Time:
    found = [reached(run["curve"], target) for run in row.runs]
    seconds = (hit[1] if hit else run["seconds"] for hit, run in zip(found, row.runs, strict=True))
    return _Time(Spread(tuple(seconds)), not all(found))


def _steps_of(row: Measured, target: float) -> str:
    found = [reached(run["curve"], target) for run in row.runs]
    steps = tuple(float(hit[0]) for hit in found if hit)
    return f"{Spread(steps).text('{:.0f}'.format)}{'' if all(found) else ' *'}" if steps else "never"


def time_notes(rows: Sequence[Measured], target: float, every: int) -> str:
    """Return what the table of times means, and what its rows set."""
    changed = "\n".join(f"- {row.row.name}: {settings_text(row.row.settings) or 'nothing'}" for row in rows)
    return (
        f"Until the held-out loss is {target:g} or less, measured every {every} steps. Training: seconds of the optimizer\n"
        "steps alone, measuring and saving left out; with start-up: imports, loading and encoding too. Ratio: to the\n"
        "training seconds of the first row. '>': never reached by some seed, which counts with its whole run; '*': steps\n"
        "of the seeds that got there. Loss and shares are those of the end.\n\n"
        f"What each row sets:\n\n{changed}"
    )


def plain(rows: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return the rows for the JSON report, from which `Book.take` fills a book again."""
    return [
        {
            "name": row.row.name,
            "group": row.row.group,
            "settings": dict(row.row.settings),
            "chosen": {"key": row.choice.key, "value": row.choice.value, "losses": row.choice.losses}
            if row.choice
            else None,
            "problem": row.problem,
            "runs": row.runs,
        }
        for row in rows
    ]

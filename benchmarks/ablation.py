"""What each option of training does to the example concept: the table in docs/ablation.md.

    python benchmarks/ablation.py run               all rows, three seeds each: hours; go on with it by the same line
    python benchmarks/ablation.py report            docs/ablation.md from what was run
    python benchmarks/ablation.py time-to-concept   how long settings take to the demo's held-out loss

Each run is a process of its own and leaves a JSON file in --out; what is there already, measured by the same
code, is not run again; with --any-code, by any. A row that fails leaves its error there and stops no other.
`--reported benchmarks/results/ablation.json` fills --out with what a report holds, to go on from it with other rows.
`--rows words dora "|lora|"` takes the rows whose name or group holds one of these, or is one between bars.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import ablation_report
import machine
from ablation_plan import (
    Book,
    Choice,
    Result,
    Scale,
    base_jobs,
    choice_of,
    chosen_rows,
    code_id,
    key_of,
    sweep_jobs,
    table_jobs,
    time_jobs,
    waves,
)
from ablation_report import Measured
from ablation_rows import ROWS, TIME_ROWS, Row, settings_of
from ablation_run import Job

from sdlora.storage import write_json, write_text

_HERE = Path(__file__).resolve().parent
_DEMO_LOSS = 0.0318


@dataclass(frozen=True)
class Runner:
    """Runs jobs side by side, each once; results and errors go into the book."""

    book: Book
    side_by_side: int
    any_code: bool = False
    """Whether what earlier versions of the code measured is not run again."""

    def run(self, title: str, jobs: Sequence[Job]) -> None:
        """Every job's result is in the book, or its error."""
        code = code_id()
        missing = {key_of(job): job for job in jobs if not self.book.holds(job, "*" if self.any_code else code)}
        print(f"{title}: {len(missing)} of {len(jobs)} runs to make", flush=True)
        started = time.monotonic()
        with ThreadPoolExecutor(self.side_by_side) as pool:
            try:
                for done, result in enumerate(pool.map(self._run_one, missing.values()), start=1):
                    left = (time.monotonic() - started) / done * (len(missing) - done) / 60
                    print(f"  {done}/{len(missing)} {_line(result)}; {left:.0f} min left", flush=True)
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise

    def _run_one(self, job: Job) -> Result:
        code = code_id()  # as it is now: somebody may have changed it since the last run
        result: Result
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "job.json"
            write_json(file, asdict(job))
            try:
                result = machine.run_child("ablation_run.py", {"job": file})
            except RuntimeError as error:
                result = {**asdict(job), "error": str(error).strip().splitlines()[-1]}
        facts = {"code": code, "machine": machine.describe(), "side_by_side": self.side_by_side}
        result |= {**facts, "measured": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
        self.book.keep(job, code, result)
        return result


def _line(result: Result) -> str:
    words = [f"{result['row']}, seed {result['seed']}"]
    if "error" in result:
        return f"{words[0]}: FAILED: {result['error'][:200]}"
    for key, form in (
        ("loss_after", "loss {:.4f}"),
        ("concept_share", "concept {:.0%}"),
        ("following", "followed {:.0%}"),
    ):
        if result.get(key) is not None:
            words.append(form.format(result[key]))
    return ", ".join([*words, f"{result.get('seconds', 0):.0f} s"])


def run(rows: Sequence[Row], runner: Runner, scale: Scale) -> None:
    """Everything that the rows' tables need is in the book, as far as it can be had."""
    book = runner.book
    runner.run("the bases alone", base_jobs(scale))
    for number, (sweeps, measured) in enumerate(waves(rows), start=1):
        jobs: list[Job] = []
        for row in (*sweeps, *measured):
            try:
                jobs += sweep_jobs(row, book, scale) if not measured else table_jobs(row, book, scale)
            except LookupError as error:
                print(f"  {row.name}: left out, {error}")
        runner.run(f"part {number} of 3, {'the rows' if measured else 'choosing rates'}", jobs)


def measured_rows(rows: Sequence[Row], book: Book, scale: Scale) -> list[Measured]:
    """Return what the book holds of the rows."""
    found = []
    for row in rows:
        choice: Choice | None = None
        try:
            choice = choice_of(row, book, scale)
            found.append(_measured(row, table_jobs(row, book, scale), book, choice))
        except LookupError as error:
            found.append(Measured(row, [], choice, str(error)))
    return found


def _measured(row: Row, jobs: Sequence[Job], book: Book, choice: Choice | None = None) -> Measured:
    results = [book.newest(job) for job in jobs]
    runs = [result for result in results if result and "error" not in result]
    errors = [result["error"] for result in results if result and "error" in result]
    missing = "" if len(runs) >= min(3, len(jobs)) else f"{len(jobs) - len(runs)} of {len(jobs)} seeds were not run"
    return Measured(row, runs, choice, errors[0] if errors else missing)


def report(rows: Sequence[Row], book: Book, scale: Scale, docs: Path, results: Path) -> str:
    """docs/ablation.md and ablation.json hold what the book does; returns the page."""
    found = measured_rows(rows, book, scale)
    bases = {job.row.removeprefix("base "): result for job in base_jobs(scale) if (result := book.newest(job))}
    bases = {form: result for form, result in bases.items() if "error" not in result}
    if not any(row.runs for row in found):
        raise SystemExit(f"{book.folder}: holds no run of these rows with {scale}; start with: ablation.py run")
    start = settings_of(Row("", ""), {"training.steps": scale.steps})
    text = ablation_report.ablation_text(found, bases, start, scale.sweep_steps)
    write_text(docs / "ablation.md", text)
    write_json(results / "ablation.json", {**asdict(scale), "bases": bases, "rows": ablation_report.plain(found)})
    return text


def time_to_concept(rows: Sequence[Row], runner: Runner, scale: Scale, every: int, target: float, out: Path) -> None:
    """The times of the rows are measured, printed and written as time_to_concept.md and .json."""
    jobs = {row.name: time_jobs(row, scale, every) for row in rows}
    runner.run("time to concept", [job for members in jobs.values() for job in members])
    found = [_measured(row, jobs[row.name], runner.book) for row in rows]
    tables = [ablation_report.time_table(found, target), ablation_report.time_notes(found, target, every)]
    result = {"machine": machine.describe(), "target": target, "rows": ablation_report.plain(found)}
    machine.report("time_to_concept", "Time to concept", tables, result, out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit status."""
    options = _options(arguments)
    scale = Scale(options.steps, tuple(options.seeds), options.prompts, options.sweep_steps)
    book = Book(options.out)
    runner = Runner(book, options.jobs, options.any_code)
    if options.reported:
        book.take(json.loads(options.reported.read_text(encoding="utf-8")), scale)
    try:
        if options.command == "run":
            run(chosen_rows(ROWS, options.rows), runner, scale)
        elif options.command == "report":
            print(report(chosen_rows(ROWS, options.rows), book, scale, options.docs, options.results))
        else:
            rows = chosen_rows(TIME_ROWS, options.rows)
            time_to_concept(rows, runner, scale, options.every, options.target, options.results)
    except KeyboardInterrupt:
        print("stopped; the same line goes on with it")
        return 130
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report", "time-to-concept"))
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of the runs' results")
    parser.add_argument("--rows", nargs="+", default=[], help="parts of names of rows or groups; left out: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(Scale.seeds), help="seeds of each row")
    parser.add_argument("--steps", type=int, default=Scale.steps, help="optimizer steps of each row of the tables")
    parser.add_argument(
        "--sweep-steps", type=int, default=Scale.sweep_steps, help="the same for runs that choose a value"
    )
    parser.add_argument("--prompts", type=int, default=Scale.prompts, help="judged prompts of each kind")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each of one thread")
    parser.add_argument("--any-code", action="store_true", help="do not repeat what earlier code has measured")
    parser.add_argument("--reported", type=Path, help="an ablation.json: what it holds is not run again either")
    parser.add_argument("--every", type=int, default=10, help="time-to-concept: steps between measurements")
    parser.add_argument("--target", type=float, default=_DEMO_LOSS, help="time-to-concept: the held-out loss to reach")
    parser.add_argument("--docs", type=Path, default=_HERE.parent / "docs", help="folder for the report's page")
    parser.add_argument("--results", type=Path, default=_HERE / "results", help="folder for the numbers")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

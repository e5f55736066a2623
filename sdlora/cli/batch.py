"""`sdlora batch JOBS --base BASE [--grid AXIS=VALUES ...] [--out DIR]`: many pictures, which go on where they stopped."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdlora.cli.base_flags import add_base_flags, base_section
from sdlora.cli.batch_progress import BatchView, duration
from sdlora.cli.engine_flags import add_engine_flags, load_engine
from sdlora.cli.format_flags import add_format_flags, file_format
from sdlora.cli.request_flags import add_request_flags, request_values
from sdlora.errors import ConfigError
from sdlora.generation.asked import FindAdapter
from sdlora.generation.batch.faults import Faults
from sdlora.generation.batch.grid import parse_axis
from sdlora.generation.batch.job_fields import check_name
from sdlora.generation.batch.jobs import read_jobs
from sdlora.generation.batch.making import Standing, make_pictures, standing
from sdlora.generation.batch.manifest import NAME, ManifestWriter, part_name, read_manifest, settle
from sdlora.generation.batch.plan import BatchPlan, Picture, in_groups, plan_batch
from sdlora.generation.batch.ranks import Ranks, deal
from sdlora.generation.batch.rate import measured_rate
from sdlora.generation.batch.sheets import Layout, parse_layout, planes, write_contact_sheets, write_grids
from sdlora.generation.pictures.files import FileFormat
from sdlora.generation.pictures.names import FIELDS, FIELDS_OF_THE_MOMENT
from sdlora.sharing.library import AdapterLibrary
from sdlora.storage import check_writable, user_path

_LISTED_FAILURES = 20


def run(arguments: list[str]) -> int:
    """Make the pictures of a jobs file; returns the exit status: 1 where some could not be made."""
    options = _parser().parse_args(arguments)
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size is {options.batch_size}; expected 1 or more")
    if options.measure and not options.dry_run:
        raise ConfigError("--measure belongs to --dry-run, which tells what a batch would take")
    form = file_format(options)
    ranks = Ranks(on_cpu=options.device == "cpu")
    if ranks.count > 1 and options.device not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device is {options.device!r}; launched processes are given a device each, leave it out")
    try:
        return _run(options, form, ranks)
    finally:
        ranks.leave()


def _run(options: argparse.Namespace, form: FileFormat, ranks: Ranks) -> int:
    folder = user_path(options.out)
    find_adapter = functools.cache(AdapterLibrary(options.library).path_of)
    if options.dry_run:
        if ranks.is_main:
            _tell(options, _prepare(options, form, folder, find_adapter), find_adapter)
        return 0
    prepared: Prepared | None = None

    def shares() -> list[list[Picture]]:
        nonlocal prepared
        prepared = _prepare(options, form, folder, find_adapter)
        print(_summary(prepared), flush=True)
        return deal(prepared.standing.pending, ranks.count, options.batch_size)

    dealt = ranks.from_main(shares)
    if dealt is None:
        return 0  # the main process says why, and its status is the launcher's: it ends all when one fails
    try:
        if dealt[ranks.rank]:
            _make(options, dealt[ranks.rank], form, folder, ranks, find_adapter)
        ranks.wait()
    except KeyboardInterrupt:
        if ranks.is_main:
            print(
                f"\ninterrupted; what is done is in {folder}, and the same command goes on from there", file=sys.stderr
            )
        return 130
    return _finish(prepared, folder) if prepared is not None else 0


@dataclass(frozen=True)
class Prepared:
    """A checked batch and how far it is."""

    plan: BatchPlan
    standing: Standing
    layout: Layout | None
    contact: bool


def _prepare(options: argparse.Namespace, form: FileFormat, folder: Path, find_adapter: FindAdapter) -> Prepared:
    """Return the batch, everything about it checked. Raises ConfigError with all that is wrong."""
    path = user_path(options.jobs) if options.jobs else None
    grid = [parse_axis(text) for text in options.grid]
    faults = Faults()
    defaults = request_values(options)
    if options.name is not None:
        check_name(options.name)
        defaults["name"] = options.name
    jobs = read_jobs(path, defaults, grid, find_adapter, faults)
    plan = plan_batch(jobs, base_section(options), find_adapter, faults, form)
    layout = None
    if options.xyz is not None:
        layout = parse_layout(options.xyz, plan.pictures)
        planes(plan.pictures, layout)
    if not options.dry_run:
        check_writable(folder)
    there = standing(plan, folder, find_adapter, settled=not options.dry_run, replace=options.overwrite)
    return Prepared(plan, there, layout, options.sheet)


def _make(
    options: argparse.Namespace,
    pictures: Sequence[Picture],
    form: FileFormat,
    folder: Path,
    ranks: Ranks,
    find_adapter: FindAdapter,
) -> None:
    """This process's share is made."""
    engine = load_engine(options, find_adapter, speak=ranks.is_main)
    manifest = ManifestWriter(folder / part_name(ranks.rank, ranks.count))
    with BatchView(len(pictures), visible=ranks.is_main, processes=ranks.count) as view:
        make_pictures(
            engine,
            pictures,
            folder,
            manifest,
            batch_size=options.batch_size,
            find_adapter=find_adapter,
            on_batch=view.show,
            form=form,
        )


def _finish(prepared: Prepared, folder: Path) -> int:
    """The manifest is one file and the sheets are drawn; returns the exit status."""
    settle(folder)
    lines = read_manifest(folder)
    there = {line.identity: line.file for line in lines.values() if not line.failed}
    there |= prepared.standing.files
    failed = [picture for picture in prepared.standing.pending if picture.identity not in there]
    pictures = prepared.plan.pictures
    sheets = write_contact_sheets(prepared.plan.different(), there, folder) if prepared.contact else []
    if prepared.layout is not None:
        sheets += write_grids(pictures, there, prepared.layout, folder)
    for sheet in sheets:
        print(sheet)
    print(f"{len(prepared.plan.different()) - len(failed)} pictures are in {folder}, listed in {folder / NAME}")
    if not failed:
        return 0
    print(f"{len(failed)} could not be made; the same command tries them again:", file=sys.stderr)
    for picture in failed[:_LISTED_FAILURES]:
        reason = lines[picture.identity].failed if picture.identity in lines else "its process ended"
        print(f"  {picture.where}: {picture.file}: {reason}", file=sys.stderr)
    if len(failed) > _LISTED_FAILURES:
        print(f"  and {len(failed) - _LISTED_FAILURES} more, which {folder / NAME} tells", file=sys.stderr)
    return 1


def _summary(prepared: Prepared) -> str:
    """Return how many pictures there are to be, and how many of them are there."""
    plan, pending = prepared.plan, prepared.standing.pending
    different = len(plan.different())
    lines = [f"{different} pictures"]
    if len(plan.pictures) > different:
        lines.append(f"asked for {len(plan.pictures)} times")
    if len(pending) < different:
        lines.append(f"{different - len(pending)} of them there already")
    lines.append(f"{len(pending)} to make")
    return ", ".join(lines)


def _tell(options: argparse.Namespace, prepared: Prepared, find_adapter: FindAdapter) -> None:
    """What the batch would take is printed; nothing is written."""
    pending = prepared.standing.pending
    groups = in_groups(pending)
    batches = sum(-(-len(group) // options.batch_size) for group in groups)
    print(_summary(prepared))
    adapters = {choice.path for picture in pending for choice in picture.request.adapters}
    print(f"batches of up to {options.batch_size}: {batches}, in {len(groups)} kinds; {len(adapters)} adapter files")
    rate, source = prepared.standing.seconds_per_cost, "as earlier pictures in this folder took"
    if options.measure and pending:
        engine = load_engine(options, find_adapter)
        rate, source = measured_rate(engine, pending, options.batch_size, find_adapter), "as two batches took just now"
    work = sum(picture.cost for picture in pending)
    print(
        f"time: about {duration(work * rate)}, {source}" if rate else "time: not known yet; --measure makes two batches"
    )
    pixels = sum(picture.pixels for picture in pending)
    print(f"disk: at most {pixels * 3 / 1e6:.1f} MB")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdlora batch",
        description="Make the pictures of a jobs file. A run that was interrupted goes on where it stopped. "
        "The flags of a request are what jobs have that say nothing else.",
        epilog="Several GPUs: accelerate launch -m sdlora.cli.main batch JOBS ...",
    )
    parser.add_argument(
        "jobs",
        nargs="?",
        metavar="JOBS",
        help=".txt (a prompt a line), .csv, .jsonl or .toml; left out: the one job that the flags are",
    )
    add_base_flags(parser)
    add_engine_flags(parser)
    add_request_flags(parser, prompt_required=False)
    parser.add_argument(
        "--grid",
        nargs="+",
        action="extend",
        default=[],
        metavar="AXIS=VALUES",
        help="make each job for all values and their combinations: seed=1..8 weight=0.4,0.8 adapter=a,b prompt=@FILE "
        "replace=red,green (search and replace in the prompt)",
    )
    parser.add_argument("--out", default="outputs", help="folder for pictures and manifest (default: outputs)")
    fields = ", ".join(f"{{{field}}}" for field in FIELDS if field not in FIELDS_OF_THE_MOMENT)
    parser.add_argument(
        "--name",
        metavar="TEMPLATE",
        help=f"way to the files of jobs that name none, below that folder; fields are {fields}",
    )
    add_format_flags(parser)
    parser.add_argument("--batch-size", type=int, default=4, help="pictures made at once (default: 4)")
    parser.add_argument("--sheet", action="store_true", help="write contact sheets of all pictures")
    parser.add_argument(
        "--xyz",
        nargs="*",
        metavar="PLACE=AXIS",
        help="write labelled grids: x=seed y=weight z=adapter; with nothing behind it, by the axes of --grid in their order",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, count, and tell the time; make nothing"
    )
    parser.add_argument(
        "--measure", action="store_true", help="with --dry-run: make two batches, not kept, to know the time"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are in the way of a job's name")
    return parser

"""Jobs: what a batch is to make, read from a file and multiplied by grids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.config import validated
from sdlora.errors import ConfigError, SdloraError
from sdlora.generation.asked import FindAdapter
from sdlora.generation.batch.faults import Faults
from sdlora.generation.batch.grid import MOST_PICTURES, Axis, Point, grid_points, product_size, refuse_doubles
from sdlora.generation.batch.job_draft import Draft
from sdlora.generation.batch.job_fields import Read, files_of, place_of, read_values
from sdlora.generation.batch.jobs_tables import read_csv_jobs, read_jsonl_jobs
from sdlora.generation.batch.jobs_text import read_text_jobs
from sdlora.generation.batch.jobs_toml import read_toml_jobs
from sdlora.generation.request import GenerationRequest
from sdlora.storage import is_there, user_path

_READERS: Mapping[str, Callable[[Path, Faults], Iterator[Draft]]] = {
    ".txt": read_text_jobs,
    ".csv": read_csv_jobs,
    ".tsv": read_csv_jobs,
    ".jsonl": read_jsonl_jobs,
    ".toml": read_toml_jobs,
}
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Job:
    """A request, and where it was written."""

    where: str
    """"jobs.txt:12"."""
    request: GenerationRequest
    name: str = ""
    """Of its file, with suffix or without; "": one is made up."""
    point: Point = ()
    """Where in a grid it is."""


def read_jobs(
    path: Path | None,
    defaults: Mapping[str, Any] | None = None,
    grid: Sequence[Axis] = (),
    find_adapter: FindAdapter | None = None,
    faults: Faults | None = None,
) -> list[Job]:
    """Return the jobs of a file, each at every point of the grid; without a file the one that `defaults` are.

    `defaults` are values by setting, which the file's own replace. Files and folders are looked for as
    `place_of` says; an adapter may be what `find_adapter` knows. Raises one ConfigError for everything that is wrong, line by line; with
    `faults` these are told there, and the jobs are those that are right.
    """
    together = [(axis,) for axis in grid]
    refuse_doubles(together)
    told = Faults() if faults is None else faults
    drafts = list(_drafts(path, defaults or {}, told))
    if (size := len(drafts) * product_size(together)) > MOST_PICTURES:
        raise ConfigError(f"{size:,} jobs are asked for; a batch has at most {MOST_PICTURES:,} pictures")
    folder = path.parent if path else Path()
    find = _adapter_finder(folder, find_adapter)
    jobs: list[Job] = []
    defaults_used: dict[str, bool] = {}
    for draft in drafts:
        axes = {axis.field for axis in grid}
        left, here = draft.defaults - axes, draft.here | axes
        with told.of(draft.where):
            for values, point in grid_points(together, draft.values):
                with told.of(draft.where):
                    read = read_values(values, left)
                    defaults_used |= {name: defaults_used.get(name, False) or name not in read.idle for name in left}
                    jobs.append(
                        _job(Draft(draft.where, values, (*draft.point, *point), left, here), read, folder, find)
                    )
    for name in (name for name, used in defaults_used.items() if not used):
        told.tell(str(path or COMMAND_LINE), f"the default {name} does nothing for any job; leave it out")
    what = str(path) if path else "what is asked for"
    if faults is None or not jobs:
        told.raise_all(what)
    if not jobs:
        raise ConfigError(f"{what}: holds no jobs")
    if (pictures := sum(job.request.count for job in jobs)) > MOST_PICTURES:
        raise ConfigError(f"{pictures:,} pictures are asked for; a batch has at most {MOST_PICTURES:,}")
    return jobs


def _drafts(path: Path | None, defaults: Mapping[str, Any], faults: Faults) -> Iterator[Draft]:
    if path is None:
        yield Draft(COMMAND_LINE, defaults)
        return
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{path}: is no jobs file; expected {', '.join(_READERS)}")
    yield from (draft.on(defaults, here=True) for draft in reader(path, faults))


def _job(draft: Draft, read: Read, folder: Path, find: Callable[[str, bool], str]) -> Job:
    """Return the checked job. Raises one ConfigError for all that is wrong with it."""
    made, problems = read.request, read.problems
    for adapter in made.get("adapters", ()):
        try:
            if "path" in adapter:
                adapter["path"] = find(adapter["path"], "adapters" in draft.here)
        except ConfigError as error:
            problems.append(str(error))
    for control in (one for one in made.get("control", ()) if isinstance(one, dict)):
        for name in ("model", "image"):
            if isinstance(control.get(name), str):
                control[name] = place_of(control[name], folder, "control" in draft.here)
    folders = {"wildcards": made["wildcards"]} if isinstance(made.get("wildcards"), str) and made["wildcards"] else {}
    for name, place in {**files_of(made), **folders}.items():
        made[name] = place_of(place, folder, name in draft.here)
    try:
        request = validated(GenerationRequest, made, draft.where)
    except ConfigError as error:
        problems.append(str(error).removeprefix(f"{draft.where}: "))
    if problems:
        raise ConfigError("; ".join(problems))
    return Job(draft.where, request, read.name, draft.point)


def _adapter_finder(folder: Path, find_adapter: FindAdapter | None) -> Callable[[str, bool], str]:
    """Return what finds an adapter's file by what jobs call it, or the command line if that is `here`, and asks for each once."""
    found: dict[tuple[str, bool], str] = {}
    missing: dict[tuple[str, bool], str] = {}

    def look(name: str, here: bool) -> str:
        if is_there(user_path(path := place_of(name, folder, here))):
            return path
        if find_adapter is None:
            raise ConfigError(f"{name}: there is no such adapter file")
        return str(find_adapter(name))

    def find(name: str, here: bool) -> str:
        asked = name, here
        if asked not in found and asked not in missing:
            try:
                found[asked] = look(name, here)
            except SdloraError as error:
                missing[asked] = str(error)
        if asked in missing:
            raise ConfigError(missing[asked])
        return found[asked]

    return find

"""Making the pictures of a batch: full batches, files written whole, a line in the manifest for each."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.errors import (
    ConfigError,
    DataError,
    FormatError,
    GenerationCancelled,
    GenerationError,
    ModelError,
    SdloraError,
)
from sdlora.generation.asked import FindAdapter, asked_pictures, read_folder
from sdlora.generation.batch.manifest import Line, ManifestWriter, part_name, read_manifest, settle
from sdlora.generation.batch.names import identity_mark
from sdlora.generation.batch.plan import (
    BatchPlan,
    Picture,
    in_groups,
    recipe_fits,
    refuse_taken_files,
)
from sdlora.generation.batches import Likeness, likeness
from sdlora.generation.engine import Engine
from sdlora.generation.pictures.files import PNG, SUFFIXES, FileFormat, read_recipe, save_picture
from sdlora.generation.recipe import Recipe

_LEFT_BEHIND_SECONDS = 60.0
_OF_A_PICTURE = (GenerationError, FormatError, ModelError, ConfigError, DataError)
"""What one picture of a batch may fail with; a file that cannot be written ends the run."""


@dataclass(frozen=True)
class Standing:
    """How far the batch in a folder is."""

    pending: tuple[Picture, ...]
    """Not there yet, each once."""
    files: Mapping[str, str]
    """{identity: file below the folder} of the pictures that are there."""
    seconds_per_cost: float
    """As measured by earlier runs in this folder; 0 where there were none."""


def standing(
    plan: BatchPlan,
    folder: Path,
    find_adapter: FindAdapter | None = None,
    *,
    settled: bool = True,
    replace: bool = False,
) -> Standing:
    """Return what is there and what is to be made.

    A picture is there where the manifest has a line with its identity whose file exists, and where its file carries its
    recipe though a crash kept the line from being written; with `settled` that line is written now, halves of lines and
    files are cleared away, and no process may be at work in the folder. Raises one ConfigError for files in the way of
    pictures that are to be made, unless these are to `replace` them.
    """
    if settled and folder.is_dir():
        _clear_halves(folder)
        settle(folder)
    lines = read_manifest(folder)
    there = {line.identity: line.file for line in lines.values() if not line.failed and _is_picture(folder / line.file)}
    missing = [picture for picture in plan.different() if picture.identity not in there]
    there |= _adopt(missing, plan, folder, find_adapter, settled, set(there.values()))
    pending = tuple(picture for picture in missing if picture.identity not in there)
    if not replace:
        refuse_taken_files([picture for picture in pending if (folder / picture.file).exists()], folder)
    ours = {picture.identity for picture in plan.pictures}
    files = {identity: file for identity, file in there.items() if identity in ours}
    return Standing(pending, files, _seconds_per_cost(lines.values()))


def _seconds_per_cost(lines: Iterable[Line]) -> float:
    timed = [line for line in lines if 0 < line.seconds < math.inf and 0 < line.cost < math.inf]
    return sum(line.seconds for line in timed) / sum(line.cost for line in timed) if timed else 0.0


def _adopt(
    missing: Sequence[Picture],
    plan: BatchPlan,
    folder: Path,
    find_adapter: FindAdapter | None,
    settled: bool,
    others: Collection[str],
) -> dict[str, str]:
    """Return {identity: file} of pictures that are there without a line, which is written now where `settled`; `others` have one."""
    marked = {}
    if missing and folder.is_dir():
        marked = {mark: path.name for path in folder.iterdir() if (mark := identity_mark(path.name))}
    writer = ManifestWriter(folder / part_name(0, 1))
    adopted = {}
    for picture in missing:
        mark = identity_mark(picture.file, picture.identity)
        file = marked.get(mark, picture.file) if mark else picture.file
        if file in others or not _is_picture(folder / file):
            continue
        with suppress(SdloraError):
            recipe = read_recipe(folder / file)
            if recipe_fits(recipe, picture, plan, find_adapter):
                if settled:
                    writer.made({**_told(picture), "file": file}, recipe)
                adopted[picture.identity] = file
    return adopted


def _is_picture(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except (OSError, ValueError):
        return False


def _clear_halves(folder: Path) -> None:
    """What killed runs left of files that they were writing is gone; what was begun just now may be another program's."""
    for path in folder.rglob(".writing-*"):
        with suppress(OSError):
            if path.suffix in SUFFIXES and time.time() - path.stat().st_mtime > _LEFT_BEHIND_SECONDS:
                path.unlink()


@dataclass(frozen=True)
class BatchProgress:
    """How far this process is with its share."""

    done: int
    failed: int
    pictures: int
    seconds: float
    work_done: float
    """Of 1, as `Picture.cost` counts."""

    @property
    def seconds_left(self) -> float:
        """As the work done so far tells."""
        return self.seconds / self.work_done * (1 - self.work_done) if self.work_done else 0.0


OnBatch = Callable[[BatchProgress], None]


def make_pictures(
    engine: Engine,
    pictures: Sequence[Picture],
    folder: Path,
    manifest: ManifestWriter,
    *,
    batch_size: int,
    find_adapter: FindAdapter | None = None,
    on_batch: OnBatch | None = None,
    form: FileFormat = PNG,
) -> BatchProgress:
    """Make the pictures and return how that went. Each file is there whole, and then its line in the manifest.

    A picture that cannot be made gets a line that says why, and the others go on. Raises OutputError where
    nothing can be written.
    """
    started = time.perf_counter()
    total = sum(picture.cost for picture in pictures) or 1.0
    done, failed, work = 0, 0, 0.0
    progress = BatchProgress(0, 0, len(pictures), 0.0, 0.0)
    for batch in full_batches(engine, pictures, batch_size, find_adapter):
        begun = time.perf_counter()
        results = _make(engine, batch)
        seconds = (time.perf_counter() - begun) / len(batch)
        for picture, result in zip(batch, results, strict=True):
            kept = result if isinstance(result, str) else _kept(picture, *result, folder, form)
            if isinstance(kept, str):
                manifest.failed(_told(picture), kept)
                failed += 1
            else:
                manifest.made({**_told(picture), "seconds": round(seconds, 4), "cost": picture.cost}, kept)
                done += 1
        work += sum(picture.cost for picture in batch)
        progress = BatchProgress(done, failed, len(pictures), time.perf_counter() - started, work / total)
        if on_batch:
            on_batch(progress)
    return progress


def _kept(picture: Picture, image: Image.Image, recipe: Recipe, folder: Path, form: FileFormat) -> Recipe | str:
    """Return the recipe of the picture, which is in its file then, or why its format cannot hold it."""
    try:
        path = folder / picture.file
        save_picture(image, recipe, path, quality=form.quality, lossless=form.lossless, replace=True)
    except ConfigError as error:
        return str(error)
    return recipe


def full_batches(
    engine: Engine, pictures: Sequence[Picture], batch_size: int, find_adapter: FindAdapter | None
) -> Iterator[list[Picture]]:
    """Yield the pictures in full batches, whatever their prompts and adapters, as far as there are enough alike.

    Only as many are looked at ahead as wait for their batch to be full, so that memory stays flat.
    """
    read = functools.cache(read_folder)
    for group in in_groups(pictures):
        waiting: dict[Likeness, list[Picture]] = {}
        for picture in group:
            try:
                (asked,) = asked_pictures(picture.request, 0, find_adapter, read)
            except _OF_A_PICTURE:  # a file of it is gone since: whoever makes it is told, and the others are made
                yield [picture]
                continue
            alike = likeness(engine.base, asked)
            waiting.setdefault(alike, []).append(picture)
            if len(waiting[alike]) == batch_size:
                yield waiting.pop(alike)
        yield from waiting.values()


def _make(engine: Engine, batch: Sequence[Picture]) -> list[tuple[Image.Image, Recipe] | str]:
    """Return for each picture what it became, or why not; where one of several fails each is made alone."""
    requests = [picture.request for picture in batch]
    try:
        made = {
            number: (image, recipe) for number, image, recipe in engine.generate_all(requests, batch_size=len(batch))
        }
        return [made[number] for number in range(len(batch))]
    except GenerationCancelled:
        raise
    except _OF_A_PICTURE as error:
        if len(batch) == 1:
            return [str(error)]
    return [result for picture in batch for result in _make(engine, [picture])]


def _told(picture: Picture) -> dict[str, Any]:
    """Return what a manifest's line says of any picture."""
    told: dict[str, Any] = {"file": picture.file, "identity": picture.identity, "job": picture.where}
    return {**told, "axes": dict(picture.point)} if picture.point else told

"""The manifest of a batch: a line of JSON for each picture that was made or failed, written when its file is there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.errors import OutputError
from sdlora.generation.recipe import Recipe

NAME = "manifest.jsonl"
_PARTS = "manifest.rank*.jsonl"


@dataclass(frozen=True)
class Line:
    """What the manifest says of one picture."""

    identity: str
    file: str
    failed: str
    """Why it is not there; "" where it is."""
    seconds: float
    """It took, its share of the batch that it was made in; 0 where that is not known."""
    cost: float
    """How much work it was, as `Picture.cost` counts."""


def part_name(rank: int, processes: int) -> str:
    """Return the file that a process writes to: of several each its own."""
    return NAME if processes == 1 else f"manifest.rank{rank}.jsonl"


def settle(folder: Path) -> None:
    """What earlier runs wrote is one manifest of whole lines; no process may be writing to it."""
    manifest = folder / NAME
    _cut_half_line(manifest)
    for part in sorted(folder.glob(_PARTS)):
        _cut_half_line(part)
        with suppress(FileNotFoundError):
            _append(manifest, part.read_bytes())  # twice, where it ends before the next line: that says nothing else
            part.unlink()


def read_manifest(folder: Path) -> dict[str, Line]:
    """Return {identity: what was last said of it}; lines that are none count as nothing."""
    found: dict[str, Line] = {}
    owners: dict[str, str] = {}
    for values in _lines(folder / NAME):
        with suppress(KeyError, TypeError, ValueError):
            line = Line(
                identity=str(values["identity"]),
                file=str(values["file"]),
                failed=str(values.get("failed", "")),
                seconds=float(values.get("seconds", 0)),
                cost=float(values.get("cost", 0)),
            )
            found[line.identity] = line
            if not line.failed:
                owners[line.file] = line.identity  # another picture may have taken its place since
    return {line.identity: line for line in found.values() if line.failed or owners[line.file] == line.identity}


class ManifestWriter:
    """Appends lines, each on the disk when the call returns."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def made(self, picture: Mapping[str, Any], recipe: Recipe) -> None:
        """That picture is in its file."""
        self._write({**picture, **_told(recipe)})

    def failed(self, picture: Mapping[str, Any], reason: str) -> None:
        """That picture could not be made."""
        self._write({**picture, "failed": reason})

    def _write(self, values: Mapping[str, Any]) -> None:
        _append(self._path, (json.dumps(values, ensure_ascii=False) + "\n").encode(errors="replace"))


def _told(recipe: Recipe) -> dict[str, Any]:
    """Return what a line tells of a recipe; the picture carries all of it."""
    return {
        "prompt": recipe.prompt,
        "negative_prompt": recipe.negative_prompt,
        "seed": recipe.seed,
        "steps": recipe.steps,
        "guidance_scale": recipe.guidance_scale,
        "width": recipe.width,
        "height": recipe.height,
        "base": recipe.base,
        "adapters": [{"name": used.name, "weight": used.weight, "sha256": used.sha256} for used in recipe.adapters],
    }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                with suppress(ValueError, RecursionError):
                    values = json.loads(line)
                    if isinstance(values, dict):
                        yield values
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror or error}); choose another --out") from error


def _cut_half_line(path: Path) -> None:
    """The file ends with a whole line: what a crash left of the next one is gone."""
    try:
        with path.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            whole = end
            while whole > 0:
                start = max(0, whole - 4096)
                file.seek(start)
                block = file.read(whole - start)
                if b"\n" in block:
                    whole = start + block.rindex(b"\n") + 1
                    break
                whole = start
            if whole < end:
                file.truncate(whole)
                os.fsync(file.fileno())
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); choose another --out") from error


def _append(path: Path, data: bytes) -> None:
    """The data are at the end of the file, on the disk."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while data:
                data = data[os.write(handle, data) :]
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error

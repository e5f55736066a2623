"""What a history keeps of one picture."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdlora.errors import FormatError
from sdlora.generation.foreign.reading import foreign_recipe
from sdlora.generation.foreign.recipe import ForeignRecipe
from sdlora.generation.history.words import folded, indexed, utf8
from sdlora.generation.pictures.texts import RECIPE, PictureTexts, read_texts
from sdlora.generation.recipe import Recipe

_LONGEST = 20_000
"""Characters of a prompt that are kept."""
_LATEST_NS = 2**62
"""Files of later times than 2116 stand there: SQLite holds not much more."""


@dataclass(frozen=True)
class PictureRow:
    """A row of the history, with the names and hashes of base and adapters, which have tables of their own."""

    place: bytes
    signature: str
    problem: str = ""
    identity: str = ""
    base: tuple[str, str] = ("", "")
    """(name, SHA-256 or what is known of it)."""
    adapters: tuple[tuple[str, str, str], ...] = ()
    """(name, SHA-256, tensors' SHA-256)."""
    facts: Mapping[str, Any] = field(default_factory=dict)


def signature_of(file: Path | os.DirEntry[str]) -> str:
    """Return size and time of a file, by which it is known to be unchanged."""
    state = file.stat()
    return f"{state.st_size}:{state.st_mtime_ns}"


def read_row(path: Path, place: bytes) -> PictureRow:
    """Return what a picture tells, or why it tells nothing. What is hidden in its pixels is not looked for."""
    try:
        signature = signature_of(path)
        carried = read_texts(path)
        if text := carried.texts.get(RECIPE):
            return row_of(place, signature, Recipe.from_json(text))
        return _foreign_row(place, signature, carried, foreign_recipe(carried))
    except OSError as error:
        return PictureRow(place, "", f"cannot be read ({error.strerror or error})")
    except FormatError as error:
        return PictureRow(place, signature, str(error).removeprefix(f"{path}: ")[:400])


def row_of(place: bytes, signature: str, recipe: Recipe) -> PictureRow:
    """Return the row of a picture of ours."""
    return PictureRow(
        place=place,
        signature=signature,
        identity=_digest(recipe.to_json()),
        base=(recipe.base, recipe.base_sha256),
        adapters=tuple((item.name, item.sha256, item.tensor_sha256) for item in recipe.adapters),
        facts={
            "program": "sdlora",
            "prompt": recipe.prompt[:_LONGEST],
            "negative_prompt": recipe.negative_prompt[:_LONGEST],
            "seed": recipe.seed,
            "steps": recipe.steps,
            "guidance_scale": recipe.guidance_scale,
            "width": recipe.width,
            "height": recipe.height,
            "base": recipe.base,
            "adapters": [(item.name, item.weight) for item in recipe.adapters],
        },
    )


def _foreign_row(place: bytes, signature: str, carried: PictureTexts, recipe: ForeignRecipe) -> PictureRow:
    said = recipe.settings
    texts = json.dumps(dict(sorted(carried.texts.items())))
    return PictureRow(
        place=place,
        signature=signature,
        identity=_digest(texts),
        base=(recipe.base, recipe.base_hash),
        adapters=tuple((item.name, *(*item.hashes, "", "")[:2]) for item in recipe.adapters),  # type: ignore[misc]
        facts={
            "program": recipe.program,
            "prompt": recipe.prompt[:_LONGEST],
            "negative_prompt": recipe.negative_prompt[:_LONGEST],
            "seed": said.get("seed"),
            "steps": said.get("steps"),
            "guidance_scale": said.get("guidance_scale"),
            "width": carried.width,
            "height": carried.height,
            "base": recipe.base,
            "adapters": [(item.name, item.weight) for item in recipe.adapters],
        },
    )


def insert(connection: sqlite3.Connection, rows: Sequence[PictureRow]) -> None:
    """The tables hold the rows, in place of what they had of these places."""
    for row in rows:
        connection.execute("DELETE FROM pictures WHERE place = ?", (row.place,))
        base = _id(connection, "bases", ("name", "sha256"), tuple(map(folded, row.base)))
        facts = row.facts
        values = (
            _free(connection, min(int(row.signature.rpartition(":")[2] or 0), _LATEST_NS)),
            row.place,
            row.signature,
            row.problem,
            row.identity,
            "" if facts.get("seed") is None else str(facts["seed"]),
            base,
            indexed(facts.get("prompt", "")),
            indexed(facts.get("negative_prompt", "")),
            utf8(json.dumps(facts, ensure_ascii=False)),
        )
        command = (
            "INSERT INTO pictures (id, place, signature, problem, identity, seed, base, prompt, negative, facts) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        )
        connection.execute(command, values)
        for adapter in row.adapters:
            known = _id(connection, "adapters", ("name", "sha256", "tensor_sha256"), tuple(map(folded, adapter)))
            connection.execute("INSERT OR IGNORE INTO uses VALUES (?, ?)", (known, values[0]))


def _free(connection: sqlite3.Connection, wanted: int) -> int:
    """Return the first number from there on that no picture has."""
    while connection.execute("SELECT 1 FROM pictures WHERE id = ?", (wanted,)).fetchone():
        wanted += 1
    return wanted


def _id(connection: sqlite3.Connection, table: str, columns: Sequence[str], values: tuple[str, ...]) -> int:
    """Return the number of a row with these values, which is made where there is none."""
    same = " AND ".join(f"{column} = ?" for column in columns)
    found = connection.execute(f"SELECT id FROM {table} WHERE {same}", values).fetchone()
    if found:
        return int(found[0])
    marks = ", ".join("?" * len(values))
    made = connection.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", values)
    return int(made.lastrowid or 0)


def _digest(text: str) -> str:
    return hashlib.sha256(utf8(text).encode()).hexdigest()

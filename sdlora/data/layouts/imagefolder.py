"""The imagefolder layout: pictures, and a table metadata.jsonl, .csv or .parquet that names them and their captions."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdlora.config import ConceptSection
from sdlora.data.layouts.columns import (
    NEEDS_EXTRA,
    Kind,
    caption_column,
    caption_lines,
    file_below,
    file_name_column,
    same_name,
)
from sdlora.data.layouts.listing import Group, Listed, Listing, pictures_below
from sdlora.data.layouts.splits import choose_split, left_out, split_of_folder
from sdlora.errors import DataError, first_line

NAME = "imagefolder"

_TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_FIRST_LINE_BYTES = 1 << 20


def recognises(path: Path) -> bool:
    """Return whether the folder or one below holds a table of this layout."""
    return path.is_dir() and any(_names_pictures(table) for table in _tables_below(path))


def read(settings: ConceptSection, problems: list[str]) -> Listing:
    """Return the pictures of the chosen split, with the captions that the tables give them.

    Several rows of one picture are alternatives. Pictures that no row names have no caption.
    """
    folder = Path(settings.folder).expanduser()
    tables = list(_tables_below(folder))
    if not tables:
        raise DataError(f"{folder}: holds no {', '.join(_TABLES)}, which data.layout = {NAME!r} needs")
    found = pictures_below(folder)
    counts = Counter(split_of_folder(path.relative_to(folder), settings.split) for path in found)
    if not found:
        raise DataError(f"{folder}: holds {tables[0].name} but no pictures; put them beside it")
    split = choose_split(settings.split, counts, str(folder))
    pictures = [path for path in found if split_of_folder(path.relative_to(folder), settings.split) == split]
    captions = _Captions({same_name(path): path for path in found})
    used = [table for table in tables if table.parent == folder or _in_split(table, folder, settings.split, split)]
    for table in used:
        captions.add(table, settings, problems)
    listed = [Listed(path, captions.lines(path)) for path in pictures]
    notes = left_out(counts, split, "picture") + captions.notes(pictures)
    return Listing("Hugging Face imagefolder", [Group(settings, listed)], notes)


@dataclass
class _Captions:
    """What the rows say about each picture."""

    pictures: dict[str, Path]
    """The pictures that are there, by `same_name` of their paths."""
    rows: dict[Path, list[tuple[str, ...] | None]] = field(default_factory=dict)

    def add(self, table: Path, settings: ConceptSection, problems: list[str]) -> None:
        """Take up the rows of one table."""
        before = len(problems)
        rows = list(_rows_of(table, problems))
        if not rows:
            if len(problems) == before:
                problems.append(f"{table}: holds no rows; write one for each picture, or remove the file")
            return
        kinds = _kinds(rows, table)
        name_column = file_name_column(kinds, settings, str(table))
        texts = {name: kind for name, kind in kinds.items() if not name.endswith(("file_name", "file_names"))}
        column = caption_column(texts, settings, str(table))
        for place, row in rows:
            where = f"{table}, {place}"
            picture = self._picture(where, table.parent, row.get(name_column), name_column, problems)
            if picture:
                lines = _lines(where, row, column, problems)
                self.rows.setdefault(picture, []).append(lines)

    def _picture(self, where: str, folder: Path, name: Any, column: str, problems: list[str]) -> Path | None:
        """Return the file that a row names; None, and a problem more, where there is none."""
        if not isinstance(name, str) or not name:
            problems.append(f'{where}: has no text in column "{column}"; name the picture\'s file there')
            return None
        path = file_below(folder, name)
        if path is None:
            problems.append(f"{where}: {name!r} leads out of the table's folder; name a file in it or below")
            return None
        if picture := self.pictures.get(same_name(path)):
            return picture
        fault = "is not a picture that is read" if path.exists() else "is not there"
        problems.append(f"{where}: {name} {fault}; correct the name, or remove the row")
        return None

    def lines(self, picture: Path) -> tuple[str, ...] | None:
        """Return all captions of a picture, each once."""
        found = [lines for lines in self.rows.get(picture, []) if lines is not None]
        return tuple(dict.fromkeys(line for lines in found for line in lines)) if found else None

    def notes(self, pictures: Iterable[Path]) -> list[str]:
        """Return what a person should know about the rows of these pictures."""
        rows = [len(self.rows.get(picture, [])) for picture in pictures]
        notes = []
        if several := sum(count > 1 for count in rows):
            notes.append(f"{_pictures(several)} named by more than one row, whose captions are alternatives")
        if unnamed := rows.count(0):
            notes.append(f"{_pictures(unnamed)} not named by any row")
        return notes


def _pictures(count: int) -> str:
    return f"{count} picture{'s are' if count != 1 else ' is'}"


def _tables_below(folder: Path) -> Iterator[Path]:
    """Yield the tables in the folder and those below, in a fixed order, hidden folders left out."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in _TABLES if name in files)


def _in_split(table: Path, folder: Path, wanted: str, split: str) -> bool:
    return split_of_folder(table.relative_to(folder), wanted) == split


def _names_pictures(table: Path) -> bool:
    """Return whether the table's beginning shows a column of file names; of parquet, its mark is enough."""
    try:
        with table.open("rb") as file:
            start = file.readline(_FIRST_LINE_BYTES)
    except OSError:
        return False
    if table.suffix == ".parquet":
        return start.startswith(b"PAR1")
    return b"file_name" in start


def _rows_of(table: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row, and where it is: "line 3"; rows that cannot be read are problems."""
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    try:
        yield from readers[table.suffix](table, problems)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(f"{table}: cannot be read ({first_line(error)}); save it again, as UTF-8")


def _jsonl_rows(table: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with table.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(line) if line else {}
            except (ValueError, RecursionError) as error:
                problems.append(f"{table}, line {number}: is not JSON ({first_line(error)}); correct or remove it")
                continue
            if not isinstance(row, dict):
                problems.append(
                    f'{table}, line {number}: is not an object such as {{"file_name": "1.png"}}; correct it'
                )
            elif line:
                yield f"line {number}", row


def _csv_rows(table: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows with None for empty cells."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row:
                problems.append(
                    f"{table}, line {reader.line_num}: has more cells than the first line; "
                    'put text that holds a comma in quotes ("...")'
                )
                continue
            yield f"line {reader.line_num}", {name: cell or None for name, cell in row.items()}


def _parquet_rows(table: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{table}: {NEEDS_EXTRA}; or save the table as metadata.jsonl") from error
    try:
        with ParquetFile(table) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
    except ArrowException as error:
        problems.append(f"{table}: is not a whole parquet file ({first_line(error)}); save it again")


def _kinds(rows: list[tuple[str, dict[str, Any]]], table: Path) -> dict[str, Kind]:
    """Return the columns in the order of their appearance, and which are text: of CSV, not those of mere numbers."""
    kinds: dict[str, Kind] = {}
    for _, row in rows:
        for name, cell in row.items():
            text = isinstance(cell, str) or (isinstance(cell, list) and any(isinstance(item, str) for item in cell))
            if text and not (table.suffix == ".csv" and _is_number(cell)):
                kinds[name] = "text"
            else:
                kinds.setdefault(name, "other")
    return kinds


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _lines(where: str, row: dict[str, Any], column: str | None, problems: list[str]) -> tuple[str, ...] | None:
    """Return a row's caption; None, and a problem more, where it is not text."""
    try:
        return caption_lines(row.get(column)) if column else None
    except TypeError as error:
        problems.append(f'{where}: column "{column}" is not text but {error}; put the caption in quotes')
        return None

"""Jobs as tables: CSV with a header row, and JSON objects a line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from sdlora.errors import ConfigError
from sdlora.generation.batch.faults import Faults
from sdlora.generation.batch.job_draft import Draft, file_text
from sdlora.generation.batch.job_fields import by_field, field_of

_DELIMITERS = ",;\t|"


def read_csv_jobs(path: Path, faults: Faults) -> Iterator[Draft]:
    """Yield the jobs of a .csv file, one a row; an empty cell says nothing, an empty row does not count.

    Cells are parted by whatever parts the header's names best: comma, semicolon, tab or bar.
    """
    text = file_text(path)
    if text[:4].lower() == "sep=":  # a line by which Excel is told what parts the cells
        text = "\n" + text.partition("\n")[2]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    header: list[str] = []
    end = 0
    try:
        for row in rows:
            line, end = end + 1, rows.line_num  # a cell may hold ends of lines
            where = f"{path}:{line}"
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = [name.strip() for name in row]
                _check_header(header, where)
                continue
            with faults.of(where):
                yield Draft(where, _row_values(header, row))
    except csv.Error as error:
        faults.tell(f"{path}:{rows.line_num}", f"is no row of a CSV file ({error})")
    if not header:
        faults.tell(str(path), "is empty; expected a header row such as prompt,seed,steps")


def _delimiter(text: str) -> str:
    """Return what parts the names in the first line that says something."""
    first = next((line for line in text.splitlines() if line.strip()), "")

    def known(delimiter: str) -> int:
        cells = next(csv.reader([first], delimiter=delimiter), [])
        return sum(_is_field(cell) for cell in cells)

    return max(_DELIMITERS, key=lambda delimiter: (known(delimiter), first.count(delimiter)))


def _is_field(name: str) -> bool:
    try:
        return bool(field_of(name))
    except ConfigError:
        return False


def _check_header(header: list[str], where: str) -> None:
    """Raise ConfigError for unknown and doubled names."""
    try:
        by_field([(name, "1") for name in header if name])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _row_values(header: list[str], row: list[str]) -> dict[str, object]:
    if any(cell.strip() for cell in row[len(header) :]):
        raise ConfigError(
            f"has {len(row)} cells, the header {len(header)}; put quotes around a prompt that holds the sign between cells"
        )
    cells = [(name, cell.strip()) for name, cell in zip(header, row, strict=False) if cell.strip()]
    if unnamed := [cell for name, cell in cells if not name]:
        raise ConfigError(f"{unnamed[0]!r} stands in a column without a name")
    return by_field(cells)


def read_jsonl_jobs(path: Path, faults: Faults) -> Iterator[Draft]:
    """Yield the jobs of a .jsonl file, an object a line; empty lines do not count, null says nothing."""
    for number, line in enumerate(file_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        with faults.of(where):
            yield Draft(where, _object_values(line))


def _object_values(line: str) -> dict[str, object]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError('is no object; expected for example {"prompt": "a cat", "seed": 7}')
    return by_field([(name, value) for name, value in values.items() if value is not None])

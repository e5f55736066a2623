"""Parquet and Arrow files with a column of pictures, read a few rows at a time.

The files are read with pyarrow itself. The streaming of the `datasets` library (5.2 on pyarrow 26) keeps
most of a parquet file in memory, and a program that used it may hang or abort when it ends
(github.com/apache/arrow/issues/45214); nor can it start in the middle of a file.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sdlora.config import ConceptSection
from sdlora.data.layouts.columns import NEEDS_EXTRA, Kind, caption_column, caption_lines, file_below, picture_column
from sdlora.data.layouts.origin import Origin, Row
from sdlora.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

_CAPTIONS_AT_ONCE = 1024
_PICTURES_AT_ONCE = 8
_BATCHES_KEPT = 4
_CAPTIONS_AHEAD, _PICTURES_AHEAD = 1 << 20, 8 << 20
"""Bytes that are fetched at once from a file over the network."""


class Table:
    """One file of a data set: its rows, and the picture in each. Not for several threads at once."""

    def __init__(self, origin: Origin, settings: ConceptSection) -> None:
        """Open the file and find its columns. Raises DataError."""
        self._origin = origin
        self._errors: tuple[type[Exception], ...] = (*_read_errors(), *origin.errors)
        self._file: _File | None = None
        self._batches: Iterator[tuple[int, pa.RecordBatch]] = iter(())
        self._recent: deque[tuple[int, pa.RecordBatch]] = deque(maxlen=_BATCHES_KEPT)
        self._position = 0
        file = self._open(_CAPTIONS_AHEAD)
        self.rows = file.rows
        self._picture, self._caption = self._columns(file, settings) if self.rows else ("", None)

    def list_rows(self, problems: list[str]) -> Iterator[Row]:
        """Yield the rows that have a picture, with their captions; the others are problems."""
        file = self._open(_CAPTIONS_AHEAD)
        try:
            if not self.rows:
                return
            bare = {row for first, batch in file.suspects(self._picture) for row in self._bare(first, batch, problems)}
            if self._caption is None:
                yield from (Row(row, str(row), None) for row in range(self.rows) if row not in bare)
                return
            for first, batch in file.batches(self._caption, 0, _CAPTIONS_AT_ONCE):
                for row, value in enumerate(batch.column(0).to_pylist(), first):
                    if row not in bare:
                        yield Row(row, str(row), caption_lines(value))
        except self._errors as error:
            problems.append(f"{self._origin.name}: cannot be read to its end ({first_line(error)}); fetch it again")
        finally:
            self.close()

    def picture(self, row: int) -> bytes:
        """Return the picture file in a row. Rows near the last one are at hand. Raises DataError."""
        try:
            value = self._cell(row).as_py()
            data, path = _data_and_path(value)
            file = self._local(path)
            if not data and file is not None:
                data = file.read_bytes()
        except self._errors as error:
            self.close()
            raise DataError(f"{self._origin.name}#{row}: cannot be read ({first_line(error)})") from error
        if not data:
            raise DataError(f'{self._origin.name}#{row}: has no picture in column "{self._picture}"; remove the row')
        return data

    def close(self) -> None:
        """Let go of the file; it is opened again when it is needed."""
        self._batches = iter(())
        self._recent.clear()
        if self._file is not None:
            self._file.close()
        self._file = None

    def _open(self, ahead: int) -> _File:
        try:
            if self._file is None:
                kind = _Arrow if Path(self._origin.name).suffix.lower() == ".arrow" else _Parquet
                self._file, self._position = kind(self._origin, ahead), 0
        except ImportError as error:
            raise DataError(f"{self._origin.name}: {NEEDS_EXTRA}") from error
        except self._errors as error:
            raise DataError(f"{self._origin.name}: cannot be read ({first_line(error)}); fetch it again") from error
        return self._file

    def _columns(self, file: _File, settings: ConceptSection) -> tuple[str, str | None]:
        """Return the column of the pictures and that of the captions. Raises DataError."""
        try:
            kinds = _kinds(file.schema)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._origin.name}: cannot be read ({first_line(error)}); fetch it again") from error
        picture = picture_column(kinds, settings, self._origin.name)
        others = {name: kind for name, kind in kinds.items() if name != picture}
        return picture, caption_column(others, settings, self._origin.name)

    def _cell(self, row: int) -> Any:
        """Return the picture's cell, going on from the last one where that is shorter than starting anew."""
        file = self._open(_PICTURES_AHEAD)
        for first, batch in self._recent:
            if first <= row < first + batch.num_rows:
                return batch.column(0)[row - first]
        if not self._recent or row < self._position or self._position < file.start(row):
            self._batches = file.batches(self._picture, row, _PICTURES_AT_ONCE)
        for first, batch in self._batches:
            self._recent.append((first, batch))
            self._position = first + batch.num_rows
            if row < self._position:
                return batch.column(0)[row - first]
        raise OSError(f"row {row} of {self.rows} is missing")

    def _bare(self, first: int, batch: pa.RecordBatch, problems: list[str]) -> Iterator[int]:
        """Yield the rows of a batch that have no picture; each is a problem."""
        for row, cell in enumerate(batch.column(0), first):
            data, path = _data_and_path(cell.as_py())
            file = self._local(path)
            if data or (file is not None and file.is_file()):
                continue
            fault = f"only the name of a picture that is not there ({path})" if path else "no picture"
            problems.append(f'{self._origin.name}#{row}: column "{self._picture}" holds {fault}; remove the row')
            yield row

    def _local(self, path: str | None) -> Path | None:
        """Return the file that a cell without a picture names, beside the table or below."""
        folder = self._origin.folder
        return file_below(folder, path) if path and folder else None


def _read_errors() -> tuple[type[Exception], ...]:
    """Return what reading a damaged file ends in."""
    try:
        from pyarrow import ArrowException
    except ImportError:
        return ()
    return (EOFError, ValueError, ArrowException)


def _kinds(schema: pa.Schema) -> dict[str, Kind]:
    """Return what each column holds, by its type and by what the `datasets` library noted in the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        images = {name for name, feature in features.items() if feature["_type"] == "Image"}
    except (KeyError, TypeError, ValueError, AttributeError):
        images = set()
    return {field.name: "picture" if field.name in images else _kind(field.type) for field in schema}


def _kind(kind: pa.DataType) -> Kind:
    from pyarrow import types

    if types.is_struct(kind):
        return "picture" if kind.get_field_index("bytes") >= 0 else "other"
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return "bytes"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return "text" if text else "other"


def _data_and_path(value: object) -> tuple[bytes | None, str | None]:
    """Return the bytes and the file name in a picture's cell."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
    return data if isinstance(data, bytes) else None, path if isinstance(path, str) else None


class _File(Protocol):
    """An open file of rows."""

    schema: pa.Schema
    rows: int

    def start(self, row: int) -> int:
        """Return the row from which reading must start to come to `row`."""
        ...

    def batches(self, column: str, row: int, size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield batches of one column from `start(row)` on, each with the number of its first row."""
        ...

    def suspects(self, column: str) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the batches in which a picture may be missing."""
        ...

    def close(self) -> None: ...


class _Parquet:
    """A parquet file; reading can start at each of its row groups."""

    def __init__(self, origin: Origin, ahead: int) -> None:
        from pyarrow.parquet import ParquetFile

        # Without the buffer a whole row group is fetched at once, with pre_buffer the whole file is kept.
        self._file = ParquetFile(origin.path or origin.open(ahead), pre_buffer=False, buffer_size=ahead)
        self._local = origin.path is not None
        self.schema, metadata = self._file.schema_arrow, self._file.metadata
        self._starts = list(
            accumulate((metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)), initial=0)
        )
        self.rows = self._starts[-1]

    def start(self, row: int) -> int:
        return self._starts[bisect_right(self._starts, row) - 1]

    def batches(self, column: str, row: int, size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        for group in range(bisect_right(self._starts, row) - 1, len(self._starts) - 1):
            yield from self._group(group, column, size)

    def suspects(self, column: str) -> Iterator[tuple[int, pa.RecordBatch]]:
        # To look at every picture would be to read the file, and the statistics of a damaged one end the program
        # (pyarrow 26). Where the first rows have their pictures, one that lacks is found when it is read.
        if not self._local:
            return
        for _, batch in islice(self.batches(column, 0, _PICTURES_AT_ONCE), 1):
            if all(_data_and_path(cell.as_py())[0] for cell in batch.column(0)):
                return
        yield from self.batches(column, 0, _PICTURES_AT_ONCE)

    def _group(self, group: int, column: str, size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        first = self._starts[group]
        for batch in self._file.iter_batches(size, row_groups=[group], columns=[column]):
            yield first, batch
            first += batch.num_rows

    def close(self) -> None:
        self._file.close(force=True)


class _Arrow:
    """An Arrow file on this machine, in the stream or the file format; mapped into memory rather than read."""

    def __init__(self, origin: Origin, ahead: int) -> None:
        import pyarrow as pa

        self._map = pa.memory_map(str(origin.path))
        try:
            reader = pa.ipc.open_stream(self._map)
            self._batches = list(reader)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(self._map)
            self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self.schema = reader.schema
        self._starts = list(accumulate((batch.num_rows for batch in self._batches), initial=0))
        self.rows = self._starts[-1]

    def start(self, row: int) -> int:
        return row

    def batches(self, column: str, row: int, size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        for index in range(bisect_right(self._starts, row) - 1, len(self._batches)):
            batch = self._batches[index].select([column])
            for offset in range(max(row - self._starts[index], 0), batch.num_rows, size):
                part = batch.slice(offset, size)
                part.validate(full=True)  # a damaged file would lead anywhere in memory
                yield self._starts[index] + offset, part

    def suspects(self, column: str) -> Iterator[tuple[int, pa.RecordBatch]]:
        for first, batch in self.batches(column, 0, _PICTURES_AT_ONCE):
            cells = batch.column(0)
            data = cells.field("bytes") if _kind(cells.type) == "picture" else cells
            if cells.null_count or data.null_count or _kind(data.type) != "bytes":
                yield first, batch

    def close(self) -> None:
        self._batches.clear()
        self._map.close()

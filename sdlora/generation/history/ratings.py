"""Ratings of pictures: a line of JSON for each, appended to one file beside the history's index."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from sdlora.errors import OutputError

RATINGS_NAME = ".sdlora-ratings.jsonl"


class Ratings:
    """The ratings of a folder's pictures, {"picture": SHA-256 of its recipe, "stars": 4, "file": "a.png"} a line.

    The last line of a picture counts. Rated is what a recipe makes, so that a copy or a renamed file keeps its stars.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / RATINGS_NAME

    def add(self, identity: str, stars: int, name: str) -> None:
        """The picture has so many stars, on the disk. Raises OutputError where the file cannot be written."""
        line = json.dumps({"picture": identity, "stars": stars, "file": name}) + "\n"
        try:
            with self._file.open("ab+") as file:  # each write goes to the end, whoever else appends meanwhile
                size = file.seek(0, os.SEEK_END)
                if size:
                    file.seek(size - 1)
                    line = line if file.read(1) == b"\n" else f"\n{line}"  # after a line that a crash cut off
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self._file}: cannot be written ({error.strerror or error}), so nothing was rated"
            ) from error

    def load(self, connection: sqlite3.Connection) -> None:
        """The table of ratings says what the file does; only what was appended since the last time is read."""
        (read,) = connection.execute("SELECT read FROM sources WHERE name = 'ratings'").fetchone() or (0,)
        size = self._file.stat().st_size if self._file.is_file() else 0
        if size == read:
            return
        if size < read:  # another file than the last time
            connection.execute("DELETE FROM ratings")
            read = 0
        with self._file.open("rb") as file:
            file.seek(read)
            whole, newline, _ = file.read(size - read).rpartition(b"\n")  # the last line may still be being written
        connection.executemany("INSERT OR REPLACE INTO ratings VALUES (?, ?)", _ratings(whole))
        connection.execute("INSERT OR REPLACE INTO sources VALUES ('ratings', ?)", (read + len(whole) + len(newline),))


def _ratings(lines: bytes) -> Iterator[tuple[str, int]]:
    """Yield (picture, stars) of every sound line."""
    for line in lines.splitlines():
        try:
            said = json.loads(line)
            identity, stars = str(said["picture"]), int(said["stars"])
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # cut off, or of somebody else
        if 0 <= stars <= 5:
            yield identity, stars

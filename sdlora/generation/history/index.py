"""`History`: the pictures of a folder, found by what made them. The pictures themselves are what is true; this is an index."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path

from sdlora.errors import ConfigError, FormatError
from sdlora.generation.history.query import HistoryEntry, HistoryQuery, Row, select
from sdlora.generation.history.ratings import Ratings
from sdlora.generation.history.row import PictureRow, insert, read_row, row_of, signature_of
from sdlora.generation.history.tables import SCHEMA, TABLES
from sdlora.generation.pictures.files import SUFFIXES
from sdlora.generation.recipe import Recipe
from sdlora.sqlite_index import SqliteIndex
from sdlora.storage import is_there, user_path

INDEX_NAME = ".sdlora-history.sqlite"
OnPicture = Callable[[int, int], None]
"""Called with how many pictures were read, and how many are to be."""
_PICTURES_A_TRANSACTION = 500
_STARS = 5


class History:
    """The pictures below a folder, with what made them and how they were rated.

    The index lies in the folder itself, and can be made again from the pictures at any time. Ratings cannot, so they lie in a
    text file beside it, which is only ever appended to. Several processes may write at once.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = user_path(folder).absolute()
        self._index = SqliteIndex(self.folder / INDEX_NAME, SCHEMA, TABLES)
        self._ratings = Ratings(self.folder)

    def add(self, path: Path | str, recipe: Recipe) -> None:
        """The history knows the picture at `path`, which was just saved with that recipe."""
        place = self._place(path)
        try:
            row = row_of(place, signature_of(self.folder / os.fsdecode(place)), recipe)
        except OSError:  # gone already
            return
        self._index.do(lambda connection: insert(connection, [row]))

    def refresh(self, on_picture: OnPicture | None = None) -> None:
        """The history knows the pictures as they lie on the disk now; only new and changed ones are read.

        Raises FormatError where there is no such folder.
        """
        if not is_there(self.folder) or not self.folder.is_dir():
            raise FormatError(f"{self.folder}: there is no such folder; name the one that your pictures are in")
        before = self._index.times_begun_anew
        self._refresh(on_picture)
        if self._index.times_begun_anew != before:  # what it knew of unchanged pictures is lost
            self._refresh(on_picture)

    def rebuild(self, on_picture: OnPicture | None = None) -> None:
        """The index is made again from the pictures, all of which are read. Raises FormatError as `refresh` does."""
        self._index.do(_clear)
        self.refresh(on_picture)

    def search(
        self,
        prompt: str = "",
        *,
        negative_prompt: str = "",
        adapter: str = "",
        base: str = "",
        seed: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        rating: int | None = None,
        limit: int | None = 50,
        offset: int = 0,
    ) -> list[HistoryEntry]:
        """Return the pictures of which all of that is true, the newest first.

        Each word of `prompt` begins a word of the picture's prompt, without regard to case and accents; in scripts without
        spaces it stands anywhere. Punctuation is passed over; a search for nothing else is a ConfigError. `adapter` and
        `base` are parts of a name or the beginning, 6 digits or more, of a hash; `rating` is the fewest stars, 0 for
        pictures without any; `since` and `until` bound the time of the file.
        """
        query = HistoryQuery(prompt, negative_prompt, adapter, base, seed, since, until, rating, limit, offset)
        before = self._index.times_begun_anew
        found = self._select(query)
        if self._index.times_begun_anew != before:
            self._refresh(None)
            found = self._select(query)
        return found

    def count(self) -> int:
        """Return how many pictures with a recipe the history knows."""
        command = "SELECT count(*) FROM pictures WHERE problem = ''"
        return int(self._index.do(lambda connection: connection.execute(command).fetchone()[0]))

    def rate(self, path: Path | str, stars: int) -> None:
        """The picture has so many stars, 1 to 5, or none: 0. All copies of one recipe have the same.

        Raises ConfigError for another number, FormatError for a file that carries no recipe or lies elsewhere.
        """
        if not 0 <= stars <= _STARS:
            raise ConfigError(f"a rating is {stars}; expected 1 to {_STARS} stars, or 0 for none")
        place = self._place(path)
        row = read_row(self.folder / os.fsdecode(place), place)
        if row.problem:
            raise FormatError(f"{path}: {row.problem}, so there is nothing by which its rating could be remembered")
        self._ratings.add(row.identity, stars, os.fsdecode(place))

        def keep(connection: sqlite3.Connection) -> None:
            insert(connection, [row])
            self._ratings.load(connection)

        self._index.do(keep)

    # --- the index ---------------------------------------------------------------------------------------

    def _refresh(self, on_picture: OnPicture | None) -> None:
        # Asked first: what another process adds while the folder is listed is not taken for gone.
        known = dict(self._index.do(_known))
        there = dict(_pictures_below(self.folder))
        changed = sorted(place for place, signature in there.items() if known.get(place) != signature)
        done, remaining = 0, iter(changed)
        while some := list(islice(remaining, _PICTURES_A_TRANSACTION)):
            rows = [read_row(self.folder / os.fsdecode(place), place) for place in some]
            self._index.do(partial(_insert, rows))
            done += len(some)
            if on_picture:
                on_picture(done, len(changed))
        gone = [(place,) for place in known.keys() - there.keys()]
        self._index.do(partial(_forget, gone))

    def _select(self, query: HistoryQuery) -> list[HistoryEntry]:
        try:
            return [self._entry(*row) for row in self._index.do(partial(self._rows, query))]
        except (ValueError, TypeError):  # what stands in the index was not written by us
            self.rebuild()
            return [self._entry(*row) for row in self._index.do(partial(self._rows, query))]

    def _rows(self, query: HistoryQuery, connection: sqlite3.Connection) -> list[Row]:
        self._ratings.load(connection)
        return select(connection, query)

    def _entry(self, place: bytes, made: int, facts: str, stars: int | None) -> HistoryEntry:
        when = datetime.fromtimestamp(made / 1e9)
        return HistoryEntry(self.folder / os.fsdecode(place), when, stars=stars or 0, **json.loads(facts))

    def _place(self, path: Path | str) -> bytes:
        """Return the way from the folder to a picture. Raises FormatError for one that lies elsewhere."""
        place = Path(os.path.normpath(user_path(path).absolute()))
        if not place.is_relative_to(self.folder):
            raise FormatError(f"{path}: lies outside of {self.folder}, whose history this is")
        return os.fsencode(place.relative_to(self.folder))


def history_of(picture: Path | str) -> History:
    """Return the history that a picture belongs to: of the nearest folder above it that has one, else of its own folder."""
    place = user_path(picture).absolute()
    return History(next((folder for folder in place.parents if is_there(folder / INDEX_NAME)), place.parent))


def _pictures_below(folder: Path) -> Iterator[tuple[bytes, str]]:
    """Yield (way from the folder, size and time) of every picture; hidden files and folders do not count."""
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            entries = list(os.scandir(folder / below))
        except OSError:
            continue
        for entry in entries:
            place = os.path.join(below, entry.name)  # noqa: PTH118 - a Path for each of 100,000 takes a second
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(place)
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file():  # noqa: PTH122
                    yield os.fsencode(place), signature_of(entry)
            except OSError:
                continue


def _known(connection: sqlite3.Connection) -> list[tuple[bytes, str]]:
    return connection.execute("SELECT place, signature FROM pictures").fetchall()


def _insert(rows: Sequence[PictureRow], connection: sqlite3.Connection) -> None:
    insert(connection, rows)


def _forget(places: Sequence[tuple[bytes]], connection: sqlite3.Connection) -> None:
    connection.executemany("DELETE FROM pictures WHERE place = ?", places)


def _clear(connection: sqlite3.Connection) -> None:
    for table in ("pictures", "uses", "adapters", "bases", "ratings"):
        connection.execute(f"DELETE FROM {table}")
    connection.execute("DELETE FROM sources")

"""An index: one SQLite file that can always be made again, and never keeps anyone from working."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from sdlora.errors import FormatError, first_line

_SECONDS_TO_WAIT = 30.0
_BUSY = (
    "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_FULL", "SQLITE_IOERR",
    "SQLITE_PROTOCOL", "SQLITE_SCHEMA",
)  # fmt: skip
"""Errors that may be gone the next time."""
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
_OTHER_TABLE = ("no such table", "no such column", "no such module", "table ")
"""How the messages begin of a file that holds other tables than ours."""
_ATTEMPTS = 5
Result = TypeVar("Result")


class SqliteIndex:
    """The tables of an index, kept at `file`, or in memory where nothing can be written there.

    `tables` are the statements that make them, `version` their number, raised whenever they or what is told in them changes:
    an index of another number is emptied.
    """

    def __init__(self, file: Path, version: int, tables: Sequence[str]) -> None:
        self._file, self._version, self._tables = file, version, tables
        self._memory: sqlite3.Connection | None = None
        self._lock = threading.Lock()  # of the connection in memory; one to a file is nobody else's
        self.times_begun_anew = 0
        """How often it was found damaged, and lost what was in it."""

    def do(self, action: Callable[[sqlite3.Connection], Result]) -> Result:
        """Return what the action does with the tables in one transaction; it may run again, on empty ones.

        An index that is damaged is begun anew. Other processes wait for the transaction. Raises FormatError where the
        action itself cannot be done; the index stays then.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return self._in_memory(action) if self._memory else self._in_file(action)
            except sqlite3.Error as error:
                name = str(getattr(error, "sqlite_errorname", ""))
                if name.startswith(_DAMAGED) or str(error).startswith(_OTHER_TABLE):
                    self._begin_anew()
                elif not name.startswith(_BUSY):
                    raise FormatError(
                        f"{self._file}: the index cannot answer that ({first_line(error)}); ask for less"
                    ) from error
                time.sleep(0.1 * attempt)
            except OSError:  # no folder for it
                break
        self.times_begun_anew += 1
        self._memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        return self._in_memory(action)

    def _begin_anew(self) -> None:
        self.times_begun_anew += 1
        for suffix in ("", "-wal", "-shm"):
            with suppress(OSError):
                self._file.with_name(self._file.name + suffix).unlink()

    def _in_file(self, action: Callable[[sqlite3.Connection], Result]) -> Result:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._file, timeout=_SECONDS_TO_WAIT, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # many small transactions stay quick
            connection.execute("PRAGMA synchronous = NORMAL")  # what a power cut takes is read again from the files
            return self._done(action, connection)

    def _in_memory(self, action: Callable[[sqlite3.Connection], Result]) -> Result:
        assert self._memory
        with self._lock:
            return self._done(action, self._memory)

    def _done(self, action: Callable[[sqlite3.Connection], Result], connection: sqlite3.Connection) -> Result:
        """Return what the action does, in one transaction, with tables that are empty where another version made them."""
        with _transaction(connection):
            if connection.execute("PRAGMA user_version").fetchone() != (self._version,):
                _drop_everything(connection)
                for statement in self._tables:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {self._version}")
            return action(connection)


def _drop_everything(connection: sqlite3.Connection) -> None:
    """The file holds no table, whatever version made it; what belongs to a virtual table goes with that."""
    virtual = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE 'CREATE VIRTUAL%'"
    for command in (virtual, "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"):
        for (name,) in connection.execute(command).fetchall():
            quoted = str(name).replace('"', '""')
            connection.execute(f'DROP TABLE IF EXISTS "{quoted}"')


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """What the block did is kept if it ends well, and undone if not."""
    connection.execute("BEGIN IMMEDIATE")  # a lock asked for later would be refused at once, without waiting
    try:
        yield
    except BaseException:
        connection.rollback()
        raise
    connection.commit()

"""The index of a library: one SQLite file that can always be made again, and never keeps anyone from working."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from sdlora.errors import FormatError, first_line

_SCHEMA = 2
"""To be raised whenever the table, or what is told of a file, changes: an index of another number is made anew."""
_TABLE = """
CREATE TABLE files (
    place BLOB PRIMARY KEY,        -- way from the library's folder, in the system's own bytes
    signature TEXT NOT NULL,       -- size and time of change
    inode TEXT NOT NULL,
    changed TEXT NOT NULL,         -- when the system last changed anything about it
    modified_ns INTEGER NOT NULL,
    problem TEXT NOT NULL,         -- why it is no adapter; '' of one
    ends TEXT NOT NULL,            -- hash of header and last 64 KiB; '' of a folder
    sha256 TEXT NOT NULL,          -- '' until it is hashed, and so the next two
    data_sha256 TEXT NOT NULL,
    autov1 TEXT NOT NULL,
    claimed TEXT NOT NULL,         -- sshs_model_hash, which may be wrong
    legacy TEXT NOT NULL,          -- sshs_legacy_hash
    family TEXT NOT NULL,
    kinds TEXT NOT NULL,           -- with a space around each
    base_hash TEXT NOT NULL,
    names TEXT NOT NULL,           -- these four as they are searched: folded, a line each
    triggers TEXT NOT NULL,
    tags TEXT NOT NULL,
    base TEXT NOT NULL,
    facts TEXT NOT NULL            -- JSON of Facts; '' of no adapter
)
"""
_BY_CONTENT = "CREATE INDEX files_by_content ON files (sha256)"
_SECONDS_TO_WAIT = 30.0
_BUSY = (
    "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_FULL", "SQLITE_IOERR",
    "SQLITE_PROTOCOL", "SQLITE_SCHEMA",
)  # fmt: skip
"""Errors that may be gone the next time."""
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
_OTHER_TABLE = ("no such table", "no such column", "table files has")
"""How the messages begin of a file that holds another table than ours."""
_ATTEMPTS = 5
Result = TypeVar("Result")


class LibraryIndex:
    """The table of a library's files, kept at `file`, or in memory where nothing can be written there."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._memory: sqlite3.Connection | None = None
        self._lock = threading.Lock()  # of the connection in memory; one to a file is nobody else's
        self.times_begun_anew = 0
        """How often it was found damaged, and lost what was in it."""

    def do(self, action: Callable[[sqlite3.Connection], Result]) -> Result:
        """Return what the action does with the table in one transaction; it may run again, on an empty table.

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

    def clear(self) -> None:
        """The index is empty."""
        self.do(lambda connection: connection.execute("DELETE FROM files"))

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
            return _done(action, connection)

    def _in_memory(self, action: Callable[[sqlite3.Connection], Result]) -> Result:
        assert self._memory
        with self._lock:
            return _done(action, self._memory)


def _done(action: Callable[[sqlite3.Connection], Result], connection: sqlite3.Connection) -> Result:
    """Return what the action does, in one transaction, with the table, which is empty where another version made it."""
    with _transaction(connection):
        if connection.execute("PRAGMA user_version").fetchone() != (_SCHEMA,):
            connection.execute("DROP TABLE IF EXISTS files")
            connection.execute(_TABLE)
            connection.execute(_BY_CONTENT)
            connection.execute(f"PRAGMA user_version = {_SCHEMA}")
        return action(connection)


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

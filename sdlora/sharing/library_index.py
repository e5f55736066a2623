"""The index of a library: the table of what is known of its files."""

from __future__ import annotations

from pathlib import Path

from sdlora.sqlite_index import SqliteIndex

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


class LibraryIndex(SqliteIndex):
    """The table of a library's files, kept at `file`, or in memory where nothing can be written there."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, _SCHEMA, [_TABLE, _BY_CONTENT])

    def clear(self) -> None:
        """The index is empty."""
        self.do(lambda connection: connection.execute("DELETE FROM files"))

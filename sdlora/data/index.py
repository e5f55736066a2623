"""What is known of picture files without decoding them: content hash and upright size, remembered between runs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sdlora.data.headers import read_header
from sdlora.data.sample import Sample
from sdlora.errors import DataError

_THREADS = 4
_AT_ONCE = 32
_JUST_CHANGED_NS = 2_000_000_000  # file systems keep times to 2 seconds at worst
_TABLE = """CREATE TABLE IF NOT EXISTS known (
    what BLOB PRIMARY KEY, state TEXT, sha256 TEXT, width INTEGER, height INTEGER
)"""


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """A picture file's SHA-256, and its size in pixels once it stands upright."""

    sha256: str
    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height


class FileState(NamedTuple):
    """What a file or row is known by, and what is another once its content is."""

    what: bytes
    state: str


class FileIndex:
    """Remembers facts by path, as long as what the system tells of the file stays the same.

    That is its size, its times of change and its inode, so that two files that change places are noticed. A row of
    a table is known by what its table says of itself. One small SQLite file that several processes may use; where it
    cannot be used, nothing is remembered.
    """

    def __init__(self, file: Path) -> None:
        self._database = _open_database(file)

    def close(self) -> None:
        """What was learnt is on disk."""
        self.commit()
        self._database.close()

    def look_up(self, state: FileState | None) -> PictureFacts | None:
        """Return what is known of a file or row in this state."""
        if state is None:
            return None
        with contextlib.suppress(sqlite3.Error):
            row = self._database.execute(
                "SELECT sha256, width, height FROM known WHERE what = ? AND state = ?", state
            ).fetchone()
            return PictureFacts(*row) if row else None
        return None

    def remember(self, state: FileState | None, facts: PictureFacts) -> None:
        """The facts are known from now on; `state` is that from before the file was read.

        Not of a file that was changed so lately that it could change again and keep its times.
        """
        if state is None or any(time.time_ns() - int(at) < _JUST_CHANGED_NS for at in state.state.split()[:2]):
            return
        with contextlib.suppress(sqlite3.Error):
            row = (*state, facts.sha256, facts.width, facts.height)
            self._database.execute("INSERT OR REPLACE INTO known VALUES (?, ?, ?, ?, ?)", row)

    def commit(self) -> None:
        """Other processes see what was learnt."""
        with contextlib.suppress(sqlite3.Error):
            self._database.commit()


def learn_facts(samples: Sequence[Sample], index: FileIndex, problems: list[str]) -> list[PictureFacts | None]:
    """Return the facts of each sample's picture; of one that cannot be read None, and the reason in `problems`."""
    found: list[PictureFacts | None] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(samples), _AT_ONCE):
            part = samples[start : start + _AT_ONCE]
            states = [state_of(sample) for sample in part]
            known = [index.look_up(state) for state in states]
            # Rows of a table are read in their order, each by the thread that comes to it.
            jobs = [
                None if facts else pool.submit(_facts_of, sample) for sample, facts in zip(part, known, strict=True)
            ]
            for state, facts, job in zip(states, known, jobs, strict=True):
                if job is not None:
                    try:
                        facts = job.result()
                        index.remember(state, facts)
                    except DataError as error:
                        problems.append(str(error))
                found.append(facts)
            index.commit()
    return found


def content_hash(path: Path, index: FileIndex) -> str:
    """Return the SHA-256 of a file that is no sample's picture, such as a mask. Raises DataError."""
    state = _state_of_file(path)
    known = index.look_up(state)
    if known is None:
        known = _facts_of_file(path)
        index.remember(state, known)
    return known.sha256


def state_of(sample: Sample) -> FileState | None:
    """Return what a sample's picture is known by, and its state from before it is read; None where that is not known."""
    if sample.rows is None:
        return _state_of_file(sample.path)
    stamp = sample.rows.stamp(sample.row)
    return FileState(stamp.encode(errors="surrogateescape"), "") if stamp else None


def _state_of_file(path: Path) -> FileState | None:
    try:
        state = path.stat()
        name = str(path.resolve()).encode(errors="surrogateescape")
    except OSError:
        return None  # reading it will say why
    return FileState(name, f"{state.st_mtime_ns} {state.st_ctime_ns} {state.st_size} {state.st_ino}")


def _facts_of(sample: Sample) -> PictureFacts:
    """Return the facts of a sample's picture. Raises DataError."""
    source = sample.source()
    return _facts_of_open(source, sample.path) if isinstance(source, io.BytesIO) else _facts_of_file(source)


def _facts_of_file(path: Path) -> PictureFacts:
    try:
        with path.open("rb") as file:
            return _facts_of_open(file, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); restore or remove the file") from error


def _facts_of_open(file: io.BufferedReader | io.BytesIO, name: Path) -> PictureFacts:
    header = read_header(file, name)
    file.seek(0)
    return PictureFacts(hashlib.file_digest(file, "sha256").hexdigest(), header.width, header.height)


def _open_database(file: Path) -> sqlite3.Connection:
    """Return the database; an unusable file, or none at all, gives one that forgets."""
    for attempt in range(2):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(file, timeout=30)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(_TABLE)
            return database
        except sqlite3.OperationalError:  # locked for long, or a full disk
            break
        except sqlite3.DatabaseError:
            if attempt == 0:
                with contextlib.suppress(OSError):
                    file.unlink()  # damaged: it holds nothing that cannot be learnt again
        except OSError:
            break
    database = sqlite3.connect(":memory:")
    database.execute(_TABLE)
    return database


def open_index(file: Path) -> contextlib.closing[FileIndex]:
    """Return the index for a with block, at whose end it is closed."""
    return contextlib.closing(FileIndex(file))

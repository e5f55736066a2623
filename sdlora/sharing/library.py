"""`AdapterLibrary`: the adapters of a folder, found by what they are. An adapter's identity is its hash, not its name."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from sdlora.adapters.folders import SUFFIX, AdapterState, adapters_below, state_of
from sdlora.adapters.header_text import plain
from sdlora.errors import FormatError
from sdlora.sharing.library_entry import Facts, LibraryEntry, RefusedFile
from sdlora.sharing.library_file import INSERT, IndexedFile, folded, hashes_of, name_of, read_file
from sdlora.sharing.library_index import LibraryIndex
from sdlora.sharing.library_query import Query, as_reference, query_of, query_of_hash
from sdlora.storage import FileHashes, cache_folder, is_there, user_path

OnFile = Callable[[int, int], None]
"""Called with how many files were read, and how many are to be."""
_FILES_A_TRANSACTION = 100
_SECONDS_BETWEEN_WRITES = 1.0
_MOST_CANDIDATES = 10


class AdapterLibrary:
    """The .safetensors files and PEFT's folders below a folder, each known by what it holds.

    What is known is kept in an index in the user's cache folder, which can be made again from the files at any time.
    Nothing is written to the folder itself. Several processes may use one index.
    """

    def __init__(self, folder: Path | str, index: Path | None = None) -> None:
        self.folder = user_path(folder).absolute()
        digest = hashlib.sha256(os.fsencode(os.path.realpath(self.folder))).hexdigest()
        self._index = LibraryIndex(index or cache_folder() / "libraries" / f"{digest[:16]}.sqlite")
        self._with_hashes = True

    def refresh(self, on_file: OnFile | None = None, *, hashes: bool = True) -> None:
        """The index knows the files as they are on the disk now.

        Only new and changed files are read: first their headers, then, with `hashes`, the whole of them; a renamed file
        keeps its hashes. What was done when it is interrupted stays. Raises FormatError where there is no such folder.
        """
        if not is_there(self.folder) or not self.folder.is_dir():
            raise FormatError(
                f"{str(self.folder)[:300]}: there is no such folder; name the one that your adapters are in"
            )
        self._with_hashes = hashes
        before = self._index.times_begun_anew
        self._refresh(on_file)
        if self._index.times_begun_anew != before:  # what it knew of unchanged files is lost
            self._refresh(on_file)

    def rebuild(self, on_file: OnFile | None = None, *, hashes: bool = True) -> None:
        """The index is made again from the files, all of which are read. Raises FormatError as `refresh` does."""
        self._index.clear()
        self.refresh(on_file, hashes=hashes)

    def search(
        self,
        text: str = "",
        *,
        name: str = "",
        trigger: str = "",
        family: str = "",
        base: str = "",
        tag: str = "",
        hash: str = "",
        kind: str = "",
        limit: int | None = None,
    ) -> list[LibraryEntry]:
        """Return the adapters of which all of that is true, those whose name says it first, then by name.

        Each word of `text` is in the name, a trigger, a tag or the base's name; `name`, `trigger`, `tag` and `base` are
        parts of these, without regard to case. `family` is "sd1", "sd2", "sdxl" or "unknown", `kind` one of KINDS. `hash`
        is the beginning, 6 digits or more, of SHA-256, AutoV1, AutoV2 or AutoV3, or of a hash in the header; `base` may be
        that of the base's. Files of one content are one entry. Raises ConfigError for a family, kind or hash that is none.
        """
        query = query_of(text, name=name, trigger=trigger, family=family, base=base, tag=tag, hash=hash, kind=kind)
        return self._entries(query, limit)

    def refused(self) -> list[RefusedFile]:
        """Return the files that are no adapters, each with the reason, by name."""
        command = "SELECT place, problem FROM files WHERE problem != '' ORDER BY place"
        rows = self._index.do(lambda connection: connection.execute(command).fetchall())
        return [RefusedFile(self._path(place), problem) for place, problem in rows]

    def path_of(self, reference: str) -> Path:
        """Return where the adapter of that path, name, or beginning of a hash lies now. Raises as `find`."""
        self.refresh(hashes=False)
        return self.find(reference).paths[0]

    def find(self, reference: str) -> LibraryEntry:
        """Return the adapter of that path, name, or beginning of a hash.

        A path may start at the library's folder, and leave the suffix out. Raises FormatError, with the candidates
        where several adapters go by it, and with the nearest names where none does.
        """
        shown = plain(reference, 300)
        for place in self._places(reference):
            query = Query(conditions=["place = ?"], values=[place])
            if found := self._entries(query, None):
                return found[0]
            if refused := next((file for file in self.refused() if file.path == self._path(place)), None):
                raise FormatError(f"{refused.path}: {refused.problem}")
        wanted = folded(plain(reference.replace("\\", "/").removesuffix(SUFFIX), 300))
        everything = self._entries(Query(), None)
        named = [entry for entry in everything if wanted in _names(entry)]
        if digest := as_reference(reference):
            named += [entry for entry in self._entries(query_of_hash(digest), None) if entry not in named]
        if len(named) == 1:
            return named[0]
        if named:
            listed = ", ".join(f"{entry.name} ({entry.autov2 or 'not hashed'})" for entry in named[:_MOST_CANDIDATES])
            more = f" and {len(named) - _MOST_CANDIDATES} more" if len(named) > _MOST_CANDIDATES else ""
            raise FormatError(
                f"{shown}: {len(named)} different adapters in {self.folder} go by that: {listed}{more}; say which by its "
                "hash or path"
            )
        names = {name: entry.name for entry in everything for name in _names(entry)}
        near = list(dict.fromkeys(names[name] for name in difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)))
        hint = f"nearest are {', '.join(near)}" if near else "sdlora adapter list shows what is there"
        raise FormatError(f"{shown}: no adapter in {self.folder} has that name, path or hash; {hint}")

    # --- the index ---------------------------------------------------------------------------------------

    def _refresh(self, on_file: OnFile | None) -> None:
        there = dict(self._there())
        rows = self._index.do(_known)
        known = {row.place: row for row in rows}
        changed = [file for place, file in there.items() if place not in known or known[place].changed(file)]
        renamed = {(row.signature, row.inode): row for row in rows if row.hashes.sha256 and row.inode and row.ends}
        unchanged = there.keys() - {file.place for file in changed}
        waiting = [there[place] for place in unchanged if known[place].lacks_hashes] if self._with_hashes else []
        progress = _Progress(on_file, len(changed) + len(waiting))
        remaining = iter(changed)
        while some := list(islice(remaining, _FILES_A_TRANSACTION)):
            read = [read_file(*file, _earlier_hashes(file, renamed)) for file in some]
            self._index.do(partial(_insert, read))
            unhashed = {row.place for row in read if not row.problem and not row.sha256 and self._with_hashes}
            waiting += [file for file in some if file.place in unhashed]
            progress.advance(len(some) - len(unhashed))
        gone = [(place,) for place in known.keys() - there.keys()]
        if gone:  # after the others, which may be the same files renamed
            self._index.do(lambda connection: connection.executemany("DELETE FROM files WHERE place = ?", gone))
        self._hash(sorted(waiting), progress)

    def _there(self) -> Iterator[tuple[bytes, _File]]:
        for path in adapters_below(self.folder):
            place = os.fsencode(path.relative_to(self.folder))
            try:
                yield place, _File(path, place, state_of(path))
            except OSError:
                continue  # gone since the folder was listed

    def _hash(self, files: Sequence[_File], progress: _Progress) -> None:
        """The index holds the hashes of the files, written every second or so, and what there is when interrupted."""
        found: list[tuple[str | bytes, ...]] = []
        written = time.monotonic()
        try:
            for file in files:
                if hashes := _hashes_now(file):
                    told = (hashes.sha256, hashes.data_sha256, hashes.autov1)
                    found.append((*told, file.place, file.state.signature, file.state.inode, file.state.changed))
                if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
                    self._keep_hashes(found)
                    found, written = [], time.monotonic()
                progress.advance(1)
        finally:
            self._keep_hashes(found)

    def _keep_hashes(self, found: Sequence[tuple[str | bytes, ...]]) -> None:
        same = "place = ? AND signature = ? AND inode = ? AND changed = ?"
        command = f"UPDATE files SET sha256 = ?, data_sha256 = ?, autov1 = ? WHERE {same}"
        if found:
            self._index.do(lambda connection: connection.executemany(command, found))

    def _entries(self, query: Query, limit: int | None) -> list[LibraryEntry]:
        before = self._index.times_begun_anew
        try:
            found = self._read_entries(query, limit)
            if self._index.times_begun_anew == before:
                return found
            self._refresh(None)
        except (ValueError, TypeError):  # what stands in the index was not written by us
            self.rebuild(hashes=self._with_hashes)
        return self._read_entries(query, limit)

    def _read_entries(self, query: Query, limit: int | None) -> list[LibraryEntry]:
        return [self._entry(group, facts) for group, facts in self._index.do(partial(_selected, query, limit))]

    def _entry(self, group: list[_Row], facts: str) -> LibraryEntry:
        first = group[0]
        return LibraryEntry(
            id=first.sha256,
            name=name_of(first.place, self.folder),
            paths=[self._path(row.place) for row in group],
            autov3=first.data_sha256[:12],
            autov1=first.autov1,
            modified=max(row.modified_ns for row in group) / 1e9,
            facts=Facts(**json.loads(facts)),
        )

    def _path(self, place: bytes) -> Path:
        return self.folder / os.fsdecode(place)

    def _places(self, reference: str) -> Iterator[bytes]:
        """Yield where in the folder a path given by a user may lead; nothing is looked up on the disk."""
        for start in (Path.cwd(), self.folder):
            path = Path(os.path.normpath(start / user_path(reference)))
            for name in (path, path.with_name(f"{path.name}{SUFFIX}") if path.name else path):
                if name.is_relative_to(self.folder):
                    with suppress(UnicodeEncodeError):  # no file can be called so
                        yield os.fsencode(name.relative_to(self.folder))


class _File(NamedTuple):
    """An adapter as it lies on the disk now."""

    path: Path
    place: bytes
    state: AdapterState


class _Known(NamedTuple):
    """What the index knows by which a file need not be read again."""

    place: bytes
    signature: str
    inode: str
    changed_at: str
    ends: str
    lacks_hashes: bool
    hashes: FileHashes

    def changed(self, file: _File) -> bool:
        """Return whether the file is another one than it was."""
        state = file.state
        return (self.signature, self.inode, self.changed_at) != (state.signature, state.inode, state.changed)


class _Row(NamedTuple):
    """What a search reads of a file."""

    place: bytes
    modified_ns: int
    sha256: str
    data_sha256: str
    autov1: str
    names: str
    triggers: str


class _Progress:
    """Counts files for whoever wants to show it."""

    def __init__(self, on_file: OnFile | None, count: int) -> None:
        self._on_file, self._count, self._done = on_file, count, 0

    def advance(self, files: int) -> None:
        """So many more are done."""
        self._done += files
        if self._on_file and files:
            self._on_file(self._done, self._count)


def _hashes_now(file: _File) -> FileHashes | None:
    """Return the hashes of a file, None where it cannot be read any more or changed meanwhile: it is read again then."""
    try:
        hashes = hashes_of(file.path)
        return hashes if state_of(file.path) == file.state else None
    except (FormatError, OSError):
        return None


def _earlier_hashes(file: _File, renamed: Mapping[tuple[str, str], _Known]) -> Mapping[str, FileHashes]:
    """Return the hashes of what the file was under another name, by its ends; under its own name it has changed.

    An inode alone tells no file: systems give those of deleted ones to new ones, of any size and date.
    """
    row = renamed.get((file.state.signature, file.state.inode))
    return {row.ends: row.hashes} if row and row.place != file.place else {}


def _insert(files: Sequence[IndexedFile], connection: sqlite3.Connection) -> None:
    connection.executemany(INSERT, [file.values() for file in files])


def _known(connection: sqlite3.Connection) -> list[_Known]:
    columns = "place, signature, inode, changed, ends, problem, sha256, data_sha256, autov1"
    return [
        _Known(place, signature, inode, changed, ends, not problem and not hashes[0], FileHashes(*hashes))
        for place, signature, inode, changed, ends, problem, *hashes in connection.execute(
            f"SELECT {columns} FROM files"
        )
    ]


def _selected(query: Query, limit: int | None, connection: sqlite3.Connection) -> list[tuple[list[_Row], str]]:
    """Return all files of each content that a query finds, and the facts of the first of them, most relevant first."""
    command = (
        f"SELECT {', '.join(_Row._fields)} FROM files WHERE problem = '' AND "
        f"(sha256 IN (SELECT sha256 FROM files WHERE sha256 != '' AND {query.sql}) OR (sha256 = '' AND {query.sql})) "
        "ORDER BY place"
    )
    groups: dict[str | bytes, list[_Row]] = {}
    for row in map(_Row._make, connection.execute(command, query.values * 2)):
        groups.setdefault(row.sha256 or row.place, []).append(row)
    for group in groups.values():
        group.sort(key=partial(_unsaid, query))
    chosen = sorted(groups.values(), key=lambda group: _relevance(group, query.words))[:limit]
    facts = "SELECT facts FROM files WHERE place = ?"
    return [(group, connection.execute(facts, (group[0].place,)).fetchone()[0]) for group in chosen]


def _unsaid(query: Query, row: _Row) -> tuple[int, int]:
    """Return how much of what was asked for neither the name of a file nor its triggers say."""
    names, triggers = (name not in row.names for name in query.names), (t not in row.triggers for t in query.triggers)
    return sum(names), sum(triggers)


def _relevance(group: list[_Row], words: list[str]) -> tuple[int, str, str]:
    """Return by what entries are sorted: whether the name says it, or a trigger; then the name; then the hash."""
    names, triggers = ("\n".join(texts) for texts in zip(*((row.names, row.triggers) for row in group), strict=True))
    unsaid = [word for word in words if word not in names]
    level = 0 if not unsaid else 1 if all(word in triggers for word in unsaid) else 2
    return level, names, group[0].sha256


def _names(entry: LibraryEntry) -> set[str]:
    """Return what an adapter is called, folded: its files, with and without their folders, and what it calls itself."""
    stems = [path.name.removesuffix(SUFFIX) for path in entry.paths]
    return {folded(plain(name, 300)) for name in (entry.name, *stems, entry.facts.title) if name}

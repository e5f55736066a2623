"""What the index keeps of one file of a library."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from sdlora.adapters.folders import SUFFIX, AdapterState
from sdlora.adapters.header_text import as_hash, plain
from sdlora.adapters.inspect import inspect_adapter
from sdlora.adapters.stored import stored
from sdlora.errors import FormatError
from sdlora.headers import HEADER_LIMIT_BYTES
from sdlora.sharing.library_entry import facts_of
from sdlora.storage import FileHashes, hashes_of_file

_LONGEST_NAME, _LONGEST_PROBLEM = 400, 400
_END_BYTES = 64 << 10
_OF_NOTHING = "e3b0c442"
"""How the hash of no bytes begins. Small files have it as their legacy hash, and some programs wrote it into all."""


@dataclass(frozen=True)
class IndexedFile:
    """A row of the index; its fields are the table's columns, which are explained there."""

    place: bytes
    signature: str
    inode: str
    changed: str
    modified_ns: int
    problem: str
    ends: str = ""
    sha256: str = ""
    data_sha256: str = ""
    autov1: str = ""
    claimed: str = ""
    legacy: str = ""
    family: str = ""
    kinds: str = ""
    base_hash: str = ""
    names: str = ""
    triggers: str = ""
    tags: str = ""
    base: str = ""
    facts: str = ""

    def values(self) -> tuple[bytes | str | int, ...]:
        """Return the fields in the columns' order."""
        return astuple(self)


INSERT = f"INSERT OR REPLACE INTO files VALUES ({', '.join('?' * len(fields(IndexedFile)))})"


def read_file(path: Path, place: bytes, state: AdapterState, hashes: Mapping[str, FileHashes]) -> IndexedFile:
    """Return what the header of a file tells, or the headers of PEFT's folder, or why it is no adapter.

    `hashes` are those of what it may have been under another name, by what `ends_of` says of that.
    """
    try:
        report = inspect_adapter(path, header_only=True)
        ends = "" if path.is_dir() else ends_of(path)
    except (FormatError, OSError) as error:
        # What the system refused it may give another time, with nothing about the file changed.
        signature = "" if isinstance(error, OSError) or isinstance(error.__cause__, OSError) else state.signature
        problem = plain(str(error).removeprefix(f"{path}: "), _LONGEST_PROBLEM) or "cannot be read"
        return IndexedFile(place, signature, state.inode, state.changed, state.modified_ns, problem)
    facts, known = facts_of(report), hashes.get(ends) or FileHashes("", "", "")
    claimed, legacy = (as_hash(report.metadata.get(key, "")) for key in ("sshs_model_hash", "sshs_legacy_hash"))
    return IndexedFile(
        place=place,
        signature=state.signature,
        inode=state.inode,
        changed=state.changed,
        modified_ns=state.modified_ns,
        problem="",
        ends=ends,
        sha256=known.sha256,
        data_sha256=known.data_sha256,
        autov1=known.autov1,
        claimed="" if claimed.startswith(_OF_NOTHING) else claimed,
        legacy="" if legacy.startswith(_OF_NOTHING) else legacy,
        family=facts.family,
        kinds=f" {' '.join(facts.kind_names())} ",
        base_hash=facts.base_hash,
        names=folded(f"{name_of(place, path)}\n{facts.title}"),
        triggers=folded("\n".join([*facts.triggers, *facts.words])),
        tags=folded("\n".join(facts.tags)),
        base=folded(facts.base),
        facts=json.dumps(vars(facts)),
    )


def ends_of(path: Path) -> str:
    """Return SHA-256 of a file's size, header and last 64 KiB, by which a renamed file is known without reading all."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), HEADER_LIMIT_BYTES))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_BYTES))
        return hashlib.sha256(b"%d:" % size + length + header + file.read(_END_BYTES)).hexdigest()


def hashes_of(path: Path) -> FileHashes:
    """Return the hashes of a file, or of PEFT's folder those of the list of its files'. Raises FormatError or OSError."""
    found = stored(path)
    if path.is_dir():
        return FileHashes(found.sha256(), found.tensor_sha256(), "")
    return hashes_of_file(path, next(iter(found.headers.values())).data_offset)


def name_of(place: bytes, path: Path) -> str:
    """Return the way from the library's folder without suffix, as it can be shown; the folder itself is its own name."""
    text = Path(os.fsdecode(place)).as_posix() if place != b"." else path.name
    text = text[: -len(SUFFIX)] if text.lower().endswith(SUFFIX) else text
    return plain(text.encode("utf-8", "replace").decode(), _LONGEST_NAME)


def folded(text: str) -> str:
    """Return the text as it is searched: without regard to case, and to how accents are put together."""
    return unicodedata.normalize("NFKC", text).casefold()

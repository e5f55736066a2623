"""The adapters of one folder, told from their headers alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from sdlora.adapters.folders import AdapterState, adapters_below, state_of
from sdlora.adapters.formats.embedding_keys import (
    BUNDLE,
    EMBEDDINGS,
    WORDS,
    file_names,
    is_embedding,
    named_words,
    word_of,
)
from sdlora.adapters.header_text import plain, trigger_of
from sdlora.adapters.stored import stored
from sdlora.errors import FormatError
from sdlora.headers import SafetensorsHeader, read_header


@dataclass(frozen=True)
class LibraryEntry:
    """One file of the library, or folder of PEFT's: an adapter, or an embedding, whose trigger is its word.

    `problem` says why it cannot be used; it is empty for one that can.
    """

    id: str
    name: str
    path: Path
    trigger: str = ""
    problem: str = ""
    words: frozenset[str] = frozenset()
    """New words that an adapter has as embeddings beside it."""


class Library:
    """The .safetensors files in a folder and its subfolders, and the folders that PEFT has written there.

    Outside, an adapter goes by its id. An id is looked up among the files found and never turned into a
    path, so whoever sends one can reach nothing but these files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[tuple[Path, AdapterState], LibraryEntry] = {}

    def adapters(self) -> list[LibraryEntry]:
        """Return the usable adapters as they are on the disk now, by name."""
        return [entry for entry in self._scan() if not entry.problem]

    def unusable(self) -> list[LibraryEntry]:
        """Return the files that are no adapters, each with its problem."""
        return [entry for entry in self._scan() if entry.problem]

    def find(self, id: str) -> LibraryEntry:
        """Return the adapter with that id. Raises FormatError when there is none."""
        for entry in self.adapters():
            if entry.id == id:
                return entry
        raise FormatError(f"the adapter is not in {self.folder} any more; press Refresh and choose again")

    def _scan(self) -> list[LibraryEntry]:
        seen = {}
        for path in adapters_below(self.folder):
            try:
                key = (path, state_of(path))
            except OSError:
                continue  # gone since the folder was listed
            seen[key] = self._seen.get(key) or self._read(path)
        self._seen = seen
        listed = _without_parts(list(seen.values()))
        return sorted(listed, key=lambda entry: entry.name.lower())

    def _read(self, path: Path) -> LibraryEntry:
        relative = path.relative_to(self.folder)
        id = hashlib.sha256(relative.as_posix().encode("utf-8", "surrogateescape")).hexdigest()[:16]
        shown = (relative if relative.name else Path(path.name)) if path.is_dir() else relative.with_suffix("")
        name = shown.as_posix().encode("utf-8", "replace").decode()
        try:
            if path.is_dir():
                metadata = stored(path).metadata
                return LibraryEntry(id, name, path, trigger_of(metadata), words=frozenset(named_words(metadata)))
            header = read_header(path)
            words = frozenset(named_words(header.metadata))
        except FormatError as error:
            return LibraryEntry(id, name, path, problem=str(error).removeprefix(f"{path}: "))
        shapes = header.layout.shapes
        if is_embedding(shapes):
            return LibraryEntry(id, f"{name} (embedding)", path, plain(word_of(shapes, header.metadata, path.stem)))
        return LibraryEntry(id, name, path, trigger_of(header.metadata), _problem(header), words)


def _without_parts(entries: list[LibraryEntry]) -> list[LibraryEntry]:
    """Return the entries without the embeddings that come with an adapter, which brings them itself."""
    brought = {
        (entry.path if entry.path.is_dir() else entry.path.parent) / EMBEDDINGS / name
        for entry in entries
        for word in entry.words
        for name in file_names(word)
    }
    return [entry for entry in entries if entry.path not in brought]


def _problem(header: SafetensorsHeader) -> str:
    keys = header.layout.kinds
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in keys):
        return "is a whole checkpoint, not an adapter; give it as --base"
    if not any("lora" in key or key.startswith(BUNDLE) for key in keys) and WORDS not in header.metadata:
        return f"holds no adapter ({len(keys)} tensors)"
    return ""

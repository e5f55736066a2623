"""The adapters of one folder, told from their headers alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.adapters.formats.embedding_keys import (
    BUNDLE,
    EMBEDDINGS,
    WORDS,
    file_name,
    is_embedding,
    named_words,
    word_of,
)
from sdlora.errors import FormatError
from sdlora.storage import SafetensorsHeader, read_header

_SKIPPED_FOLDERS = {"checkpoints"}  # a run's training state, which is no adapter
_TRIGGER_LENGTH_LIMIT = 200


@dataclass(frozen=True)
class LibraryEntry:
    """One file of the library: an adapter, or an embedding, whose trigger is its word.

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
    """The .safetensors files in a folder and its subfolders.

    Outside, an adapter goes by its id. An id is looked up among the files found and never turned into a
    path, so whoever sends one can reach nothing but these files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[tuple[Path, int, int], LibraryEntry] = {}

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
        for path in _safetensors_files(self.folder):
            try:
                state = path.stat()
            except OSError:
                continue  # gone since the folder was listed
            key = (path, state.st_mtime_ns, state.st_size)
            seen[key] = self._seen.get(key) or self._read(path)
        self._seen = seen
        listed = _without_parts(list(seen.values()))
        return sorted(listed, key=lambda entry: entry.name.lower())

    def _read(self, path: Path) -> LibraryEntry:
        relative = path.relative_to(self.folder)
        id = hashlib.sha256(relative.as_posix().encode("utf-8", "surrogateescape")).hexdigest()[:16]
        name = relative.with_suffix("").as_posix().encode("utf-8", "replace").decode()
        try:
            header = read_header(path)
            words = frozenset(named_words(header.metadata))
        except FormatError as error:
            return LibraryEntry(id, name, path, problem=str(error).removeprefix(f"{path}: "))
        shapes = {key: entry.shape for key, entry in header.tensors.items()}
        if is_embedding(shapes):
            word = word_of(shapes, header.metadata, path.stem)
            return LibraryEntry(id, f"{name} (embedding)", path, word[:_TRIGGER_LENGTH_LIMIT])
        return LibraryEntry(id, name, path, trigger_of(header.metadata), _problem(header), words)


def trigger_of(metadata: dict[str, str]) -> str:
    """Return the word that calls the concept, "" if none: the one the file names, or its commonest tag."""
    phrase = metadata.get("modelspec.trigger_phrase", "") or _most_frequent_tag(metadata.get("ss_tag_frequency", ""))
    return " ".join(phrase.split())[:_TRIGGER_LENGTH_LIMIT]


def _most_frequent_tag(text: str) -> str:
    """Return the tag that ss_tag_frequency, {"folder": {"tag": count}}, counts most often."""
    try:
        folders: Any = json.loads(text or "{}")
        counts = {tag: count for tags in folders.values() for tag, count in tags.items() if isinstance(count, int)}
    except (ValueError, AttributeError, RecursionError):
        return ""  # metadata is free text; whatever else stands there names no trigger
    return max(counts, key=counts.__getitem__, default="").strip()


def _without_parts(entries: list[LibraryEntry]) -> list[LibraryEntry]:
    """Return the entries without the embeddings that come with an adapter, which brings them itself."""
    brought = {entry.path.parent / EMBEDDINGS / file_name(word) for entry in entries for word in entry.words}
    return [entry for entry in entries if entry.path not in brought]


def _problem(header: SafetensorsHeader) -> str:
    keys = header.tensors
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in keys):
        return "is a whole checkpoint, not an adapter; give it as --base"
    if not any("lora" in key or key.startswith(BUNDLE) for key in keys) and WORDS not in header.metadata:
        return f"holds no adapter ({len(keys)} tensors)"
    return ""


def _safetensors_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.safetensors"):
        folders = path.relative_to(folder).parts[:-1]
        hidden = any(part.startswith(".") for part in (*folders, path.name))
        if not hidden and not _SKIPPED_FOLDERS.intersection(folders) and path.is_file():
            yield path

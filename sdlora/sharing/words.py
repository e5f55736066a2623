"""The embedding files that an adapter names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sdlora.adapters.file import read_adapter
from sdlora.adapters.formats.embedding_keys import EMBEDDINGS, file_names
from sdlora.errors import FormatError
from sdlora.storage import is_there


def word_places(folder: Path, words: Mapping[str, str]) -> dict[str, Path]:
    """Return {word: its file} for those of {word: digest} whose own vectors lie in `folder` or `embeddings/` there."""
    found = {}
    for word, digest in words.items():
        for place in (above / name for name in file_names(word) for above in (folder / EMBEDDINGS, folder)):
            if is_there(place) and holds(place, digest):
                found[word] = place
                break
    return found


def holds(file: Path, digest: str) -> bool:
    """Return whether the file is an embedding of these vectors."""
    try:
        return digest in read_adapter(file).token_digests().values()
    except FormatError:
        return False

"""An adapter under other text: its weights byte for byte, its words beside it, with other headers before them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdlora.adapters.file import read_adapter, word_beside
from sdlora.adapters.formats import peft
from sdlora.adapters.formats.embedding_keys import EMBEDDINGS, file_name, named_words, only_word
from sdlora.adapters.stored import Stored, is_pickle, stored
from sdlora.adapters.write import refuse_foreign_folder, refuse_pickle
from sdlora.errors import ConfigError, FormatError, OutputError
from sdlora.headers import read_header
from sdlora.storage import atomic_folder, is_there, rewrite_metadata, user_path, write_text

Text = Mapping[str, str]


@dataclass(frozen=True)
class Label:
    """What is written anew before weights that stay."""

    text: Callable[[Text], dict[str, str]]
    """From the adapter's header to the new one."""
    word_text: Callable[[Text, str], dict[str, str]]
    """The same of a word's own file; given is also what the word is called now."""
    settings: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """The same of PEFT's configuration."""
    words: Text = field(default_factory=lambda: MappingProxyType({}))
    """{word: what it is called now} of those that are called otherwise."""
    keys: Text = field(default_factory=lambda: MappingProxyType({}))
    """The same of tensors in the adapter's own file."""


def stored_with_header(path: Path | str) -> Stored:
    """Return the adapter at `path`, whose headers can be changed. Raises FormatError where it has none, or lacks a word."""
    place = user_path(path)
    if is_pickle(place):
        raise FormatError(
            f"{place}: is a pickle, which has no header to change; convert it with sdlora adapter convert"
        )
    found = stored(place)
    if not place.is_dir() and (folder := peft.folder_of(place)):
        raise FormatError(f"{place}: is a part of PEFT's folder {folder}; name the folder")
    word_files(found)
    return found


def word_files(found: Stored) -> dict[str, Path]:
    """Return {word: its embedding file} of the words that the adapter names. Raises FormatError."""
    try:
        named = named_words(found.metadata)
        return {word: word_beside(found.words_folder, word, digest) for word, digest in named.items()}
    except FormatError as error:
        raise FormatError(f"{found.path}: {error}") from error


def relabel(found: Stored, target: Path, label: Label) -> list[Path]:
    """`target` holds the weights of `found` under the label; returns it and the files of words written beside it.

    Words beside the adapter are in `embeddings/` beside the target, before the adapter that names them. Raises
    FormatError where one is missing, OutputError where another word of that name is there.
    """
    refuse_pickle(target)
    if found.path.is_dir():
        _write_folder(found, target, label)
        return [target]
    moves = []
    for word, source in word_files(found).items():
        now = label.words.get(word, word)
        place = target.parent / EMBEDDINGS / file_name(now)
        if place.resolve() != source.resolve():
            _refuse_other_vectors(place, source, now)
            moves.append((source, place, now))
    for source, place, now in moves:  # nothing is written where one of them is refused
        _write_word(source, place, now, label)
    rewrite_metadata(found.path, target, label.text(found.metadata), label.keys)
    return [target, *(place for _, place, _ in moves)]


def _write_folder(found: Stored, target: Path, label: Label) -> None:
    """`target` is PEFT's folder of `found` under the label, words and all."""
    refuse_foreign_folder(target)
    words = word_files(found)
    with atomic_folder(target) as folder:
        for component, file in found.files.items():
            rewrite_metadata(file, folder / component / peft.WEIGHTS, label.text(found.headers[component].metadata))
            settings = label.settings(json.loads(file.with_name(peft.CONFIG).read_bytes()))
            write_text(folder / component / peft.CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        for word, source in words.items():
            now = label.words.get(word, word)
            _write_word(source, folder / EMBEDDINGS / file_name(now), now, label)


def _write_word(source: Path, place: Path, word: str, label: Label) -> None:
    header = read_header(source)
    keys = word_keys(source, {key: entry.shape for key, entry in header.tensors.items()}, word)
    rewrite_metadata(source, place, label.word_text(header.metadata, word), keys)


def word_keys(source: Path, shapes: Mapping[str, tuple[int, ...]], word: str) -> dict[str, str]:
    """Return what the tensors of an embedding file are called for another word, where their names tell it.

    Raises ConfigError where a tensor of that name would be no word's.
    """
    if not (own := only_word(shapes)):
        return {}
    if only_word({word: shapes[own]}) != word:
        raise ConfigError(f"{source}: its format cannot call a word {word!r}; choose another name")
    return {own: word}


def _refuse_other_vectors(place: Path, source: Path, word: str) -> None:
    if not is_there(place):
        return
    one, other = (list(read_adapter(file).token_digests().values()) for file in (source, place))
    if one != other:
        raise OutputError(f"{place}: is there already and knows {word!r} with other vectors; write to another folder")

"""Writing an adapter, whole or not at all, in each of the formats that are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from sdlora.adapters.file import AdapterFile, first_non_finite, read_adapter
from sdlora.adapters.formats import diffusers, embedding, kohya, peft
from sdlora.adapters.formats.dotted import METADATA
from sdlora.adapters.formats.embedding_keys import EMBEDDINGS, WORD, WORDS, file_name
from sdlora.adapters.names import FORMATS
from sdlora.adapters.stored import PICKLES
from sdlora.errors import ConfigError, FormatError, OutputError
from sdlora.storage import atomic_folder, is_there, serialize_tensors, user_path, write_bytes

OF_FORMATS = (WORD, WORDS, METADATA, "format")
"""Header entries that a format writes by itself."""


def write_adapter(adapter: AdapterFile, path: Path | str, format: str = kohya.NAME, *, bundle: bool = False) -> None:
    """`path` holds the adapter in `format`; equal adapters give equal bytes.

    "kohya" and "diffusers" are files, "peft" is a folder. New words are embedding files of their own, where
    `word_files` says, or with `bundle` in kohya's file itself. Without any layers `path` is the embedding file of a
    word. Raises ConfigError for an unknown format, FormatError for non-finite weights, or for kinds of layers that
    the format cannot hold, and OutputError, leaving an earlier file at `path` as it was.
    """
    place = user_path(path)
    refuse_pickle(place)
    if format not in FORMATS:
        raise ConfigError(f"adapter format {format!r} is unknown; known: {', '.join(FORMATS)}")
    if bundle and format != kohya.NAME:
        raise ConfigError(f"new words are bundled in kohya's format alone, not in {format}; leave them beside the file")
    if name := first_non_finite(adapter):
        raise FormatError(f"{path}: {name} holds NaN or infinity; not written")
    metadata = {key: text for key, text in adapter.metadata.items() if key not in OF_FORMATS}
    alone = not adapter.layers and bool(adapter.tokens) and (not bundle or len(adapter.tokens) == 1)
    if alone:
        with _named(path):
            words = word_files(place, adapter.tokens, with_layers=False)
            contents = {file: _word_bytes(adapter, word, metadata) for word, file in words.items()}
        for file, data in contents.items():
            write_bytes(file, data)
        return
    with _named(path):
        beside = {} if bundle else {file_name(word): _word_bytes(adapter, word, {}) for word in adapter.tokens}
        if beside:
            metadata[WORDS] = json.dumps(adapter.token_digests(), sort_keys=True)
        files = _serialized(adapter, format, bundle, metadata)
    if format == peft.NAME:
        _write_folder(place, files | {f"{EMBEDDINGS}/{name}": data for name, data in beside.items()})
        return
    for name, data in beside.items():  # before the adapter that names them, which then never lacks them
        write_bytes(place.parent / EMBEDDINGS / name, data)
    write_bytes(place, files[""])


@contextmanager
def _named(path: Path | str) -> Iterator[None]:
    """Inside, what a FormatError says is said of `path`."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path}: not written: {error}") from error


def refuse_pickle(place: Path) -> None:
    """Raise ConfigError for a target that is called as pickles are."""
    if place.suffix.lower() in PICKLES:
        raise ConfigError(f"{place}: adapters are written as safetensors; name a file that ends in .safetensors")


def read_written(adapter: AdapterFile, path: Path) -> AdapterFile:
    """Return what lies where `adapter` was written, with the words that lie beside it as files of their own."""
    found = read_adapter(path)
    if adapter.layers:
        return found
    files = word_files(path, adapter.tokens, with_layers=False)
    words = {word: read_adapter(file).tokens[word] for word, file in files.items() if file != path and is_there(file)}
    return replace(found, tokens={**found.tokens, **words})


def refuse_other_words(adapter: AdapterFile, path: Path, format: str) -> None:
    """Raise OutputError where a word of the adapter would take the place of another one of that name beside `path`.

    Another adapter there may have been trained with it.
    """
    if format == peft.NAME and adapter.layers:
        return  # the words lie in its own folder
    files = word_files(path, adapter.tokens, with_layers=bool(adapter.layers))
    refuse_other_vectors(adapter, {word: file for word, file in files.items() if file != path})


def refuse_other_vectors(adapter: AdapterFile, files: Mapping[str, Path]) -> None:
    """Raise OutputError where one of {word: file} is there already and knows the word with other vectors."""
    for word, file in files.items():
        if not is_there(file):
            continue
        digest = adapter.token_digests()[word]
        if digest not in read_adapter(file).token_digests().values():
            raise OutputError(
                f"{file}: is there already and knows {word!r} with other vectors; write to another folder"
            )


def word_files(path: Path, words: Iterable[str], *, with_layers: bool) -> dict[str, Path]:
    """Return {word: its embedding file} for what is written to `path` unbundled.

    In `embeddings/` beside an adapter with layers. Without any: `path` itself for one word, which is the first
    unless another is called so, and beside it the others.
    """
    if with_layers:
        return {word: path.parent / EMBEDDINGS / file_name(word) for word in words}
    files = {word: path.with_name(file_name(word)) for word in words}
    if files and path not in files.values():
        files[next(iter(files))] = path
    return files


def _serialized(adapter: AdapterFile, format: str, bundle: bool, metadata: Mapping[str, str]) -> dict[str, bytes]:
    """Return {place in the folder: content}, "" for a format of one file. Raises FormatError."""
    if format == peft.NAME:
        files = {}
        for component, (settings, tensors) in peft.write(adapter.layers).items():
            files[f"{component}/{peft.CONFIG}"] = (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
            files[f"{component}/{peft.WEIGHTS}"] = _bytes_of(tensors, metadata)
        return files
    if format == diffusers.NAME:
        tensors, entries = diffusers.write(adapter.layers)
        return {"": _bytes_of(tensors, {**metadata, **entries})}
    bundled = embedding.bundle(adapter.tokens) if bundle else {}
    return {"": _bytes_of(kohya.write(adapter.layers, adapter.family) | bundled, metadata)}


def _word_bytes(adapter: AdapterFile, word: str, metadata: Mapping[str, str]) -> bytes:
    own = {key: text for key, text in metadata.items() if not key.startswith("ss_network_")}
    own |= embedding.word_metadata(word, adapter.family, adapter.metadata)
    return _bytes_of(embedding.write(adapter.tokens[word]), own)


def _bytes_of(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    return serialize_tensors(tensors, {**metadata, **kohya.hashes(tensors)})


def _write_folder(place: Path, files: Mapping[str, bytes]) -> None:
    """`place` is a folder of these files. Raises OutputError where more than an adapter of PEFT is there."""
    refuse_foreign_folder(place)
    with atomic_folder(place) as temporary:
        for name, data in files.items():
            write_bytes(temporary / name, data)


def refuse_foreign_folder(place: Path) -> None:
    """Raise OutputError where more than an adapter of PEFT is at `place`, which a folder would replace."""
    if is_there(place):
        there = [file.relative_to(place) for file in place.rglob("*") if not file.is_dir()] if place.is_dir() else []
        foreign = [
            file for file in there if file.name not in (peft.CONFIG, peft.WEIGHTS) and file.parts[0] != EMBEDDINGS
        ]
        if not peft.is_folder(place) or foreign:
            what = f"holds {foreign[0]} besides" if foreign else "is no folder of PEFT's"
            raise OutputError(f"{place}: is there already and {what}; name another folder")

"""`AdapterFile`: what every adapter format is read into and written from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch

from sdlora.adapters.formats import embedding, embedding_pickle
from sdlora.adapters.formats.embedding_keys import BUNDLE, EMBEDDINGS, file_names, is_embedding, named_words
from sdlora.adapters.formats.embedding_keys import family_of as words_family
from sdlora.adapters.formats.layer_parts import layers_of
from sdlora.adapters.layers import AdapterLayer
from sdlora.adapters.stored import is_pickle, stored
from sdlora.errors import FormatError
from sdlora.storage import read_tensors, user_path


@dataclass(frozen=True)
class AdapterFile:
    """An adapter: layers by diffusers module path, new words, and the text that travels with them.

    A path starts with its component: "unet.down_blocks.0...to_q", "text_encoder.text_model.encoder...".
    """

    layers: Mapping[str, AdapterLayer]
    family: str
    """"sd1", "sd2", "sdxl", or "" where the file does not tell."""
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    tokens: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=lambda: MappingProxyType({}))
    """New words (textual inversion): {word: {text encoder: vectors [n,D]}}."""

    def components(self) -> dict[str, int]:
        """Return {component: number of layers}."""
        counts: dict[str, int] = {}
        for path in self.layers:
            component = path.split(".", 1)[0]
            counts[component] = counts.get(component, 0) + 1
        return counts

    def token_digests(self) -> dict[str, str]:
        """Return {word: SHA-256 of its vectors}, by which an adapter knows the embedding files that belong to it."""
        return {word: embedding.digest(vectors) for word, vectors in self.tokens.items()}


def read_adapter(path: Path | str) -> AdapterFile:
    """Return the adapter in a file of any known format, or in PEFT's folder, as stored, on the CPU.

    An embedding file is an adapter of one new word and no layers. Words come from inside an adapter file, or from
    the embedding files that it names, beside it or in `embeddings/` there. Raises FormatError, with one
    sentence that says what the file is, when it is no adapter that can be read, holds half a pair, tensors of
    unknown meaning, or non-finite numbers, or lacks one of its words.
    """
    if is_pickle(user_path(path)):
        word, vectors = embedding_pickle.read(user_path(path))
        return _finite_adapter(
            path,
            AdapterFile({}, words_family({"emb_params": tuple(vectors["text_encoder"].shape)}), {}, {word: vectors}),
        )
    found = stored(path)
    tensors, metadata = found.tensors(), found.metadata
    try:
        if is_embedding(found.shapes):
            word, vectors = embedding.read(tensors, metadata, found.path.stem)
            adapter = AdapterFile({}, found.contents.family, metadata, {word: vectors})
        else:
            places = found.contents.places
            if places.unknown:  # leaving them out would give another picture than the file's author saw
                raise FormatError(_describe_unknown(places.unknown))
            _, words = embedding.unbundle(tensors)
            words |= embedding.marked(tensors, metadata) | _read_words_beside(found.words_folder, metadata)
            adapter = AdapterFile(layers_of(places, tensors), found.contents.family, metadata, words)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    return _finite_adapter(path, adapter)


def adapter_family(path: Path | str) -> str:
    """Return the family of an adapter file, "" where it does not tell, from its header alone. Raises FormatError."""
    if is_pickle(user_path(path)):
        return read_adapter(path).family
    return stored(path).contents.family


def _read_words_beside(folder: Path, metadata: Mapping[str, str]) -> dict[str, embedding.Vectors]:
    """Return the words that an adapter names from their embedding files. Raises FormatError where one is missing."""
    return {word: _read_vectors(word_beside(folder, word, digest)) for word, digest in named_words(metadata).items()}


def word_beside(folder: Path, word: str, digest: str) -> Path:
    """Return the embedding file of a word that an adapter in `folder` names, whose vectors are those of the digest.

    Raises FormatError where there is none.
    """
    names = file_names(word)
    there = [place for name in names for place in (folder / name, folder / EMBEDDINGS / name) if place.is_file()]
    for place in there:
        if embedding.digest(_read_vectors(place)) == digest:
            return place
    problem = f"and {there[0]} holds other vectors than it was trained with" if there else "which is not there"
    raise FormatError(
        f"was trained together with the new word {word!r}, {problem}; "
        f"put its own {names[0]} beside it or in {folder / EMBEDDINGS}"
    )


def _read_vectors(file: Path) -> embedding.Vectors:
    tensors, metadata = read_tensors(file)
    if not is_embedding({key: tuple(tensor.shape) for key, tensor in tensors.items()}):
        return {}
    return embedding.read(tensors, metadata, file.stem)[1]


def _finite_adapter(path: Path | str, adapter: AdapterFile) -> AdapterFile:
    if name := first_non_finite(adapter):
        raise FormatError(f"{path}: {name} holds NaN or infinity; the training that wrote it had failed")
    return adapter


def first_non_finite(adapter: AdapterFile) -> str:
    """Return the name of a layer or word that holds NaN or infinity, or ""."""
    for name, layer in adapter.layers.items():
        if not all(_finite(tensor) for tensor in layer.tensors()):
            return f"layer {name}"
    for word, vectors in adapter.tokens.items():
        if not all(_finite(tensor) for tensor in vectors.values()):
            return f"word {word!r}"
    return ""


def non_finite_keys(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the keys of tensors that hold NaN or infinity."""
    return [key for key, tensor in tensors.items() if tensor.is_floating_point() and not _finite(tensor)]


def _finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.float().isfinite().all())


def _describe_unknown(keys: Sequence[str]) -> str:
    if bundled := [key for key in keys if key.startswith(BUNDLE)]:
        return f"holds a bundled embedding of a kind that is not read, such as {bundled[0]!r}"
    return f"holds {len(keys)} tensors that this version does not understand, such as {keys[0]!r}"

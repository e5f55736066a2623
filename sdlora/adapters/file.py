"""`AdapterFile`: what every adapter format is read into and written from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch

from sdlora.adapters.formats import embedding, kohya
from sdlora.adapters.formats.embedding_keys import EMBEDDINGS, WORD, WORDS, file_name, is_embedding, named_words
from sdlora.adapters.layers import AdapterLayer
from sdlora.errors import ConfigError, FormatError
from sdlora.storage import read_header, read_tensors, serialize_tensors, write_bytes

FORMATS = ("kohya",)


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
    """Return the adapter in a .safetensors file, in float32 or as stored, on the CPU.

    An embedding file is an adapter of one new word and no layers. Words come from inside an adapter file, or from
    the embedding files that it names, beside it or in `embeddings/` there. Raises FormatError, with one
    sentence that says what the file is, when it is no adapter that can be read, holds half a pair, tensors of
    unknown meaning, or non-finite numbers, or lacks one of its words.
    """
    file = _existing(path)
    tensors, metadata = read_tensors(file)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    try:
        if is_embedding(shapes):
            word, vectors = embedding.read(tensors, metadata, file.stem)
            adapter = AdapterFile({}, _family(shapes, metadata), metadata, {word: vectors})
        else:
            layers, words = _read_layers(tensors, has_words=WORDS in metadata)
            words |= _read_words_beside(file, metadata)
            adapter = AdapterFile(layers, _family(shapes, metadata), metadata, words)
        if name := _first_non_finite(adapter):
            raise FormatError(f"{name} holds NaN or infinity; the training that wrote it had failed")
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from error
    return adapter


def adapter_family(path: Path | str) -> str:
    """Return the family of an adapter file, "" where it does not tell, from its header alone. Raises FormatError."""
    header = read_header(_existing(path))
    return _family({key: entry.shape for key, entry in header.tensors.items()}, header.metadata)


def write_adapter(adapter: AdapterFile, path: Path | str, format: str = "kohya", *, bundle: bool = False) -> None:
    """`path` holds the adapter in `format`; equal adapters give equal bytes.

    Its new words are embedding files of their own, where `word_files` says, or with `bundle` in the file itself.
    Without any layers `path` is the embedding file of a word. Raises ConfigError for an unknown format and
    FormatError for non-finite weights, leaving an earlier file at `path` as it was.
    """
    if format not in FORMATS:
        raise ConfigError(f"adapter format {format!r} is unknown; known: {', '.join(FORMATS)}")
    if name := _first_non_finite(adapter):
        raise FormatError(f"{path}: {name} holds NaN or infinity; not written")
    file = Path(path).expanduser()
    metadata = {key: text for key, text in adapter.metadata.items() if key not in (WORD, WORDS)}
    places = word_files(file, adapter.tokens, with_layers=bool(adapter.layers))
    if adapter.tokens and not adapter.layers and (not bundle or len(places) == 1):
        for word, place in places.items():
            _write_word(adapter, word, place, metadata)
        return
    tensors = kohya.write(adapter.layers, adapter.family)
    if bundle:
        tensors |= embedding.bundle(adapter.tokens)
    elif adapter.tokens:
        # Before the adapter that names them, which then never lacks them.
        for word, place in places.items():
            _write_word(adapter, word, place, {})
        metadata[WORDS] = json.dumps(adapter.token_digests(), sort_keys=True)
    write_bytes(file, serialize_tensors(tensors, metadata | kohya.hashes(tensors)))


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


def _write_word(adapter: AdapterFile, word: str, file: Path, metadata: Mapping[str, str]) -> None:
    tensors = embedding.write(adapter.tokens[word])
    own = {key: text for key, text in metadata.items() if not key.startswith("ss_network_")}
    own |= embedding.word_metadata(word, adapter.family, adapter.metadata)
    write_bytes(file, serialize_tensors(tensors, own | kohya.hashes(tensors)))


def _family(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> str:
    return kohya.family_of(shapes, metadata) or embedding.family_of(shapes)


def _read_layers(
    tensors: Mapping[str, torch.Tensor], *, has_words: bool
) -> tuple[dict[str, AdapterLayer], dict[str, embedding.Vectors]]:
    """Return layers and bundled words. Raises FormatError where there are none, or something else besides."""
    rest, words = embedding.unbundle(tensors)
    if not rest and (words or has_words):
        return {}, words
    if not kohya.recognises(rest):
        raise FormatError(_describe_foreign(rest))
    layers, unknown = kohya.read(rest)
    if unknown:  # leaving them out would give another picture than the file's author saw
        raise FormatError(_describe_unknown(unknown))
    return dict(layers), words


def _read_words_beside(file: Path, metadata: Mapping[str, str]) -> dict[str, embedding.Vectors]:
    """Return the words that an adapter names from their embedding files. Raises FormatError where one is missing."""
    words = {}
    for word, digest in named_words(metadata).items():
        name = file_name(word)
        there = [place for place in (file.parent / name, file.parent / EMBEDDINGS / name) if place.is_file()]
        found = [vectors for place in there if embedding.digest(vectors := _read_vectors(place)) == digest]
        if not found:
            problem = f"and {there[0]} holds other vectors than it was trained with" if there else "which is not there"
            raise FormatError(
                f"was trained together with the new word {word!r}, {problem}; "
                f"put its own {name} beside it or in {file.parent / EMBEDDINGS}"
            )
        words[word] = found[0]
    return words


def _read_vectors(file: Path) -> embedding.Vectors:
    tensors, metadata = read_tensors(file)
    if not is_embedding({key: tuple(tensor.shape) for key, tensor in tensors.items()}):
        return {}
    return embedding.read(tensors, metadata, file.stem)[1]


def _existing(path: Path | str) -> Path:
    file = Path(path).expanduser()
    if not file.exists():
        raise FormatError(f"{file}: there is no such adapter file")
    return file


def _first_non_finite(adapter: AdapterFile) -> str:
    """Return the name of a layer or word that holds NaN or infinity, or ""."""
    for name, layer in adapter.layers.items():
        if not _finite(layer.tensors()):
            return f"layer {name}"
    for word, vectors in adapter.tokens.items():
        if not _finite(tuple(vectors.values())):
            return f"word {word!r}"
    return ""


def _finite(tensors: Sequence[torch.Tensor]) -> bool:
    return all(bool(tensor.float().isfinite().all()) for tensor in tensors)


def _describe_unknown(keys: Sequence[str]) -> str:
    return f"holds {len(keys)} tensors that this version does not understand, such as {keys[0]!r}"


def _describe_foreign(tensors: Mapping[str, torch.Tensor]) -> str:
    keys = sorted(tensors)
    if any(key.startswith(("model.diffusion_model.", "conditioner.", "first_stage_model.")) for key in keys):
        return "is a whole Stable Diffusion checkpoint, not an adapter; give it as --base"
    if any("oft_" in key for key in keys):
        return "is an OFT adapter, which this version does not read"
    if any("lora_A" in key or ".lora.down" in key for key in keys):
        return "is an adapter in diffusers or PEFT format, which this version does not read; convert it to kohya's"
    shown = f"such as {keys[0]!r}" if keys else "none"
    return f"holds no adapter ({len(keys)} tensors, {shown}); expected layers in kohya's format or an embedding"

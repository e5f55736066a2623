"""Embedding files (textual inversion): the vectors of one new word, as other programs keep them.

A safetensors file with the one tensor `emb_params` [n, D] (SD 1.x and 2.x), or with `clip_l` [n, 768] and `clip_g`
[n, 1280] (SDXL). AUTOMATIC1111, Forge, ComfyUI and kohya's trainer take the file's name for the word; here the header says
it too. Read as well: diffusers' own kind, one tensor that is named by the word. Inside an adapter file the
tensors are called `bundle_emb.<word>.string_to_param.*`, or `bundle_emb.<word>.clip_l` and `.clip_g`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from sdlora.adapters.formats import ordered
from sdlora.adapters.formats.embedding_keys import BUNDLE, ENCODERS, WORD, bundled_word, only_word, word_of
from sdlora.errors import FormatError
from sdlora.storage import serialize_tensors

_FIRST, _SECOND = "text_encoder", "text_encoder_2"
_SINGLE, _PAIR = "emb_params", {_FIRST: "clip_l", _SECOND: "clip_g"}
_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}

Vectors = dict[str, torch.Tensor]
"""{text encoder: [n,D]}."""


def read(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], stem: str) -> tuple[str, Vectors]:
    """Return the word, which the file's name tells where its content does not, and its vectors. Raises FormatError."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    word = word_of(shapes, metadata, stem)
    if only := only_word(shapes):
        tensors = {_SINGLE: torch.atleast_2d(tensors[only])}
    return word, checked_vectors(word, tensors)


def write(vectors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of an embedding file."""
    return {_key(encoder, vectors, _SINGLE): tensor for encoder, tensor in vectors.items()}


def unbundle(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Vectors]]:
    """Return an adapter file's other tensors, and the words that are bundled with them. Raises FormatError."""
    found = dict[str, dict[str, torch.Tensor]]()
    rest = {}
    for name, tensor in tensors.items():
        if bundled := bundled_word(name):
            word, key = bundled
            found.setdefault(word, {})[key] = tensor
        else:
            rest[name] = tensor
    return rest, {word: checked_vectors(word, parts) for word, parts in found.items()}


def marked(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, Vectors]:
    """Return the words whose vectors an adapter file of cloneofsimo's trainer marks in its header. Raises FormatError."""
    return {
        word: checked_vectors(word, {_SINGLE: torch.atleast_2d(tensors[word])})
        for word in ordered.words(tensors, metadata)
    }


def bundle(words: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the tensors that carry the words inside an adapter file."""
    return {
        f"{BUNDLE}{word}.{_key(encoder, vectors, 'string_to_param.*')}": tensor
        for word, vectors in words.items()
        for encoder, tensor in vectors.items()
    }


def word_metadata(word: str, family: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the header entries of an embedding, of which `metadata` may know the architecture better."""
    architecture = metadata.get("modelspec.architecture") or _ARCHITECTURES.get(family, "")
    entries = {
        WORD: word,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": word,
        "modelspec.trigger_phrase": word,
    }
    if architecture:
        entries["modelspec.architecture"] = f"{architecture.partition('/')[0]}/textual-inversion"
    return entries


def digest(vectors: Mapping[str, torch.Tensor]) -> str:
    """Return SHA-256 of a word's vectors as an embedding file holds them, behind its header."""
    data = serialize_tensors(write(vectors), {})
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def _key(encoder: str, vectors: Mapping[str, torch.Tensor], single: str) -> str:
    return _PAIR[encoder] if _SECOND in vectors else single


def checked_vectors(word: str, tensors: Mapping[str, torch.Tensor]) -> Vectors:
    """Return a word's vectors by text encoder, from its tensors by their names in a file. Raises FormatError."""
    if not word.strip():
        raise FormatError("holds an embedding without a word; give the file the word's name")
    if len(tensors) > len({ENCODERS[key] for key in tensors}):
        raise FormatError(f"holds the word {word!r} twice, as {' and '.join(sorted(tensors))}")
    for key, tensor in tensors.items():
        if tensor.ndim != 2 or 0 in tensor.shape or not tensor.is_floating_point():
            raise FormatError(
                f"the word {word!r} has a tensor {key} of {tensor.dtype} and shape {tuple(tensor.shape)}; "
                "expected floating-point vectors [n, width]"
            )
    return {ENCODERS[key]: tensors[key] for key in sorted(tensors, key=lambda key: ENCODERS[key])}

"""Embeddings as pickles, which AUTOMATIC1111 and older diffusers write: read by torch's loader that takes weights alone.

AUTOMATIC1111: {"string_to_param": {"*": [n,D]}, "name": word, ...}. diffusers: {word: [D] or [n,D]}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sdlora.adapters.formats.embedding import Vectors, checked_vectors
from sdlora.errors import FormatError
from sdlora.pickles import is_weight, read_pickle

_LARGEST_BYTES = 64 << 20


def read(path: Path) -> tuple[str, Vectors]:
    """Return the word, which the file's name tells as in other programs, and its vectors.

    Raises FormatError for anything else, and for a pickle that holds more than weights, which is never run.
    """
    content = read_pickle(path, "embedding", _LARGEST_BYTES)
    found: Any = content.get("string_to_param", content) if isinstance(content, dict) else None
    if isinstance(found, dict):
        tensors = [value for value in found.values() if is_weight(value)]
        if len(tensors) == len(found) == 1:
            word = path.stem if "string_to_param" in content else str(next(iter(found)))
            try:
                return word, checked_vectors(word, {"emb_params": torch.atleast_2d(tensors[0].detach())})
            except FormatError as error:
                raise FormatError(f"{path}: {error}") from error
    raise FormatError(f"{path}: is a pickle without an embedding of one word; get the .safetensors version")

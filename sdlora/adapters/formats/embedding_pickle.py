"""Embeddings as pickles, which AUTOMATIC1111 and older diffusers write: read by torch's loader that takes weights alone.

AUTOMATIC1111: {"string_to_param": {"*": [n,D]}, "name": word, ...}. diffusers: {word: [D] or [n,D]}.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from sdlora.adapters.formats.embedding import Vectors, checked_vectors
from sdlora.errors import FormatError

_LARGEST_BYTES = 64 << 20


def read(path: Path) -> tuple[str, Vectors]:
    """Return the word, which the file's name tells as in other programs, and its vectors.

    Raises FormatError for anything else, and for a pickle that holds more than weights, which is never run.
    """
    size = path.stat().st_size
    if size > _LARGEST_BYTES:
        raise FormatError(f"{path}: is a pickle of {size >> 20} MB; only embeddings are read from pickles, not models")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's age
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        OSError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
    ) as error:
        raise FormatError(
            f"{path}: is no embedding that can be read without running what is in it; get the .safetensors version"
        ) from error
    found: Any = content.get("string_to_param", content) if isinstance(content, dict) else None
    if isinstance(found, dict):
        tensors = [value for value in found.values() if isinstance(value, torch.Tensor)]
        if len(tensors) == len(found) == 1 and tensors[0].nbytes <= tensors[0].untyped_storage().nbytes():
            word = path.stem if "string_to_param" in content else str(next(iter(found)))
            try:
                return word, checked_vectors(word, {"emb_params": torch.atleast_2d(tensors[0].detach())})
            except FormatError as error:
                raise FormatError(f"{path}: {error}") from error
    raise FormatError(f"{path}: is a pickle without an embedding of one word; get the .safetensors version")

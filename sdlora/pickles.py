"""Pickles of weights, read by torch's loader that runs nothing of what is in them."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

from sdlora.errors import FormatError


def read_pickle(path: Path, kind: str, largest: int) -> Any:
    """Return what is in a file of at most so many bytes, its tensors on the CPU; `kind` is what it is expected to be.

    Raises FormatError for a larger one, a damaged one, and one that holds more than weights, which is never run.
    """
    import torch

    try:
        size = path.stat().st_size
        if size > largest:
            raise FormatError(
                f"{path}: is a pickle of {size >> 20} MB, too large for an {kind}; get the .safetensors version"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's age
            return torch.load(path, map_location="cpu", weights_only=True)
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
            f"{path}: is no {kind} that can be read without running what is in it; get the .safetensors version"
        ) from error

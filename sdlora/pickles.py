"""Pickles of weights, read by torch's loader that runs nothing of what is in them."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from sdlora.errors import FormatError

if TYPE_CHECKING:
    import torch


def read_pickle(path: Path, kind: str, largest: int) -> Any:
    """Return what is in a file of at most so many bytes, its tensors on the CPU; `kind` is what it is expected to be.

    Raises FormatError for a larger one, a damaged one, and one that holds more than weights, which is never run.
    """
    import torch

    if not path.is_file():
        raise FormatError(f"{path}: is no file; expected an {kind}")
    if (size := path.stat().st_size) > largest:
        raise FormatError(
            f"{path}: is a pickle of {size >> 20} MB, too large for an {kind}; get the .safetensors version"
        )
    try:
        if _is_packed(path, size):
            raise FormatError(f"{path}: is packed, which torch's own files are not; get the .safetensors version")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's age
            return torch.load(path, map_location="cpu", weights_only=True)
    except FormatError:
        raise
    except Exception as error:  # damaged bytes lead the loader anywhere
        raise FormatError(
            f"{path}: is no {kind} that can be read: it is damaged, or holds more than weights, which is never run; "
            "download it again, or get the .safetensors version"
        ) from error


def _is_packed(path: Path, size: int) -> bool:
    """Return whether a zip file unpacks to more than it has, as a small one may to more than the memory."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist()) > size


def is_weight(value: object) -> TypeGuard[torch.Tensor]:
    """Return whether something from a pickle is a tensor of real numbers that lie in memory one beside the other."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_nested or value.is_complex())
        and value.nbytes <= value.untyped_storage().nbytes()  # one may say of few numbers that they are many
    )

"""An adapter from one format into another, and how the result is known to be right."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.layers import with_tensors
from sdlora.adapters.names import FORMATS
from sdlora.adapters.verify import Difference, difference
from sdlora.adapters.write import read_written, refuse_other_words, write_adapter
from sdlora.errors import FormatError, OutputError
from sdlora.storage import is_there, user_path

Precision = Literal["fp32", "fp16", "bf16"]
MetadataLevel = Literal["full", "minimal", "none"]
_DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NEEDED = (
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
    "ss_zero_terminal_snr", "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.prediction_type",
)  # fmt: skip
"""What programs need to use a file rightly; kohya's trainer keeps much the same where no metadata is wanted."""


@dataclass(frozen=True)
class Kept:
    """What of an adapter survives one format."""

    format: str
    place: Path
    """Where it was written."""
    difference: Difference | None
    reason: str
    """Why the format cannot hold it, "" where it can."""


def convert_adapter(
    source: Path | str,
    target: Path | str,
    format: str,
    *,
    precision: Precision | None = None,
    metadata: MetadataLevel = "full",
    bundle: bool = False,
    overwrite: bool = False,
) -> Difference:
    """`target` holds the adapter of `source` in `format`; returns how far it is from it, read back.

    `precision` None leaves the weights in theirs. Raises SdloraError, leaving an earlier file as it was, where the
    source cannot be read, the format cannot hold it, the target is there already, or half precision is too small.
    """
    place = user_path(target)
    refuse_existing(place, overwrite)
    adapter = read_adapter(source)
    changed = with_metadata(with_precision(adapter, precision) if precision else adapter, metadata)
    return write_checked(changed, place, format, bundle=bundle, source=adapter)


def refuse_existing(place: Path, overwrite: bool) -> None:
    """Raise OutputError where something is at `place` that nobody said may be replaced."""
    if is_there(place) and not overwrite:
        raise OutputError(f"{place}: is there already; name another, or say --overwrite")


def write_checked(
    adapter: AdapterFile, place: Path, format: str, *, bundle: bool = False, source: AdapterFile | None = None
) -> Difference:
    """`place` holds the adapter, which reads back as `source`, or as itself; returns how far it is from it.

    Written elsewhere first, so that an earlier file stays where the new one is not right. Raises FormatError for
    that, OutputError where another word of the same name lies beside it.
    """
    refuse_other_words(adapter, place, format)
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / place.name
        try:
            write_adapter(adapter, trial, format, bundle=bundle)
            found = difference(source or adapter, read_written(adapter, trial))
        except FormatError as error:
            raise FormatError(str(error).replace(str(trial), str(place))) from error
    if not found.same:
        raise FormatError(f"{place}: not written, it would not do what it should: {found.sentence()}")
    write_adapter(adapter, place, format, bundle=bundle)
    return found


def with_precision(adapter: AdapterFile, precision: Precision) -> AdapterFile:
    """Return the adapter with layers of that precision. Raises FormatError where a number is too large for it.

    Words stay as they are: they are small, and adapters know them by their exact numbers.
    """
    dtype = _DTYPES[precision]

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        result = tensor.to(dtype)
        if not result.isfinite().all():
            raise FormatError(
                f"holds numbers up to {float(tensor.abs().max()):.3g}, too large for {precision}; take bf16"
            )
        return result

    return replace(adapter, layers={path: with_tensors(layer, cast) for path, layer in adapter.layers.items()})


def with_metadata(adapter: AdapterFile, level: MetadataLevel) -> AdapterFile:
    """Return the adapter with all its text, with what programs need to use it, or with none."""
    return replace(adapter, metadata=kept_text(adapter.metadata, level))


def kept_text(metadata: Mapping[str, str], level: MetadataLevel) -> dict[str, str]:
    """Return what that amount of text keeps."""
    return {key: text for key, text in metadata.items() if level == "full" or (level == "minimal" and key in _NEEDED)}


def kept_by_formats(adapter: AdapterFile, folder: Path) -> list[Kept]:
    """Return what each format that is written keeps of the adapter: written into the empty `folder` and read back."""
    found = []
    for format in FORMATS:
        place = folder / format / "adapter.safetensors"
        try:
            write_adapter(adapter, place, format)
            found.append(Kept(format, place, difference(adapter, read_written(adapter, place)), ""))
        except FormatError as error:
            found.append(Kept(format, place, None, str(error).removeprefix(f"{place}: not written: ")))
    return found

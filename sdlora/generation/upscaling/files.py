"""Upscalers from files that people have: what network a file holds, and that network with its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sdlora.errors import FormatError
from sdlora.generation.upscaling.networks import CompactPlan, Network, Plan, RrdbPlan
from sdlora.headers import read_header
from sdlora.pickles import is_weight, read_pickle
from sdlora.storage import read_tensors

_LARGEST_PICKLE = 1 << 30
_WRAPPINGS = ("params_ema", "params", "state_dict")
"""Under which pickles have the weights, the averaged ones first."""
_PREFIXES = ("", "params_ema.", "params.", "module.")
_OLD_BLOCK = re.compile(r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.(weight|bias)$")
_OLD_TRUNK = re.compile(r"model\.1\.sub\.\d+\.(weight|bias)$")
_OLD_OTHER = re.compile(r"model\.(\d+)\.(weight|bias)$")
_LATER_NAMES = {"trunk_conv": "conv_body", "HRconv": "conv_hr"}
_EXPECTED = "expected the .safetensors or .pth file of an ESRGAN or Real-ESRGAN network (RRDBNet or compact)"
_LARGEST_SCALE = 8
_MOST_BLOCKS, _MOST_LAYERS = 100, 400
"""Published ones have 23 and 32; a small header could name thousands."""
Shapes = Mapping[str, tuple[int, ...]]


def check_upscaler(path: Path) -> Plan:
    """Return what the network in the file is like, of .safetensors by the header alone.

    Raises FormatError where it is none that is known.
    """
    found = _looked_at(path, *_state(path))
    if isinstance(found, FormatError):
        raise FormatError(str(found))
    return found


def read_upscaler(path: Path) -> Network:
    """Return the network of a file, in float32 on the CPU. Raises FormatError as `check_upscaler` does."""
    return _read(path, *_state(path))


def _state(path: Path) -> tuple[int, int]:
    """Return what changes with a file: its time of change in ns, and its size."""
    try:
        state = path.stat()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); {_EXPECTED}") from error
    return state.st_mtime_ns, state.st_size


@lru_cache(maxsize=8)  # every picture of a batch asks
def _looked_at(path: Path, changed_ns: int, length: int) -> Plan | FormatError:
    try:
        if _is_pickle(path):
            shapes: Shapes = {key: tuple(tensor.shape) for key, tensor in _pickled(path).items()}
        else:
            shapes = read_header(path).layout.shapes
        return _plan(path, {ours: shapes[theirs] for theirs, ours in _names(path, shapes).items()})
    except FormatError as error:
        return error.with_traceback(None)


@lru_cache(maxsize=1)
def _read(path: Path, changed_ns: int, length: int) -> Network:
    plan = check_upscaler(path)
    tensors = _pickled(path) if _is_pickle(path) else read_tensors(path)[0]
    network = plan.network().requires_grad_(False).eval()
    network.load_state_dict({ours: tensors[theirs].float() for theirs, ours in _names(path, tensors).items()})
    return network


def _is_pickle(path: Path) -> bool:
    return path.suffix.lower() in (".pth", ".pt")


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights in a pickle, which holds nothing else. Raises FormatError."""
    tensors: Any = read_pickle(path, "upscaler", _LARGEST_PICKLE)
    if isinstance(tensors, dict):
        tensors = next((tensors[name] for name in _WRAPPINGS if isinstance(tensors.get(name), dict)), tensors)
    if not (isinstance(tensors, dict) and tensors and all(isinstance(key, str) for key in tensors)):
        raise FormatError(f"{path}: is no upscaler that is known; {_EXPECTED}")
    if others := [key for key, value in tensors.items() if not is_weight(value)]:
        raise FormatError(f"{path}: {others[0][:80]!r} in it is no plain weight; {_EXPECTED}")
    if sum(tensor.nbytes for tensor in tensors.values()) > path.stat().st_size:  # many may be the same few numbers
        raise FormatError(f"{path}: says of its weights that they are larger than the file; {_EXPECTED}")
    return tensors


def _names(path: Path, keys: Mapping[str, object]) -> dict[str, str]:
    """Return {the file's key: our name}, of ESRGAN's first layout too. Raises FormatError where the keys are others."""
    for prefix in _PREFIXES:
        if f"{prefix}conv_first.weight" in keys or f"{prefix}body.0.weight" in keys:
            return {key: _our_name(key.removeprefix(prefix)) for key in keys}
    if "model.0.weight" not in keys or not any(_OLD_BLOCK.match(key) for key in keys):
        raise FormatError(f"{path}: is no upscaler that is known; {_EXPECTED}")
    numbers = sorted({int(match[1]) for key in keys if (match := _OLD_OTHER.match(key))})
    if len(numbers) < 3:
        raise FormatError(f"{path}: is no upscaler that is known; {_EXPECTED}")
    last, before_last = numbers[-1], numbers[-2]
    doublings = [number for number in numbers if 0 < number < before_last]
    places = {0: "conv_first", before_last: "conv_hr", last: "conv_last"}
    places |= {number: f"conv_up.{place}" for place, number in enumerate(doublings)}
    return {key: _name_from_first_layout(key, places) for key in keys}


def _our_name(key: str) -> str:
    """Return our name of a key of Real-ESRGAN's files, or of ESRGAN's later ones, which BSRGAN has too."""
    layer, _, rest = key.partition(".")
    if layer == "RRDB_trunk":
        return f"body.{rest.replace('RDB', 'rdb')}"
    if match := re.fullmatch(r"(?:conv_up|upconv)(\d)", layer):
        return f"conv_up.{int(match[1]) - 1}.{rest}"
    return f"{_LATER_NAMES.get(layer, layer)}.{rest}"


def _name_from_first_layout(key: str, places: Mapping[int, str]) -> str:
    """Return our name of a key in the layout of ESRGAN's own first files, where layers are numbered."""
    if match := _OLD_BLOCK.match(key):
        return f"body.{match[1]}.rdb{match[2]}.conv{match[3]}.{match[4]}"
    if match := _OLD_TRUNK.match(key):
        return f"conv_body.{match[1]}"
    match = _OLD_OTHER.match(key)
    return f"{places[int(match[1])]}.{match[2]}" if match else key


def _plan(path: Path, shapes: Shapes) -> Plan:
    """Return what a network of these weights, by our names, is like. Raises FormatError where it would not be one."""
    try:
        plan = _rrdb_plan(path, shapes) if "conv_first.weight" in shapes else _compact_plan(path, shapes)
    except (LookupError, ValueError) as error:
        raise FormatError(f"{path}: is no upscaler that is known; {_EXPECTED}") from error
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in plan.network().state_dict().items()}
    if wrong := sorted(expected.keys() ^ shapes.keys()) or sorted(k for k in shapes if tuple(shapes[k]) != expected[k]):
        raise FormatError(f"{path}: differs from a network of its kind at {wrong[0]!r}; {_EXPECTED}")
    return plan


def _rrdb_plan(path: Path, shapes: Shapes) -> RrdbPlan:
    features, inside = shapes["conv_first.weight"][:2]
    growth = shapes["body.0.rdb1.conv1.weight"][0]
    blocks = len({key.split(".")[1] for key in shapes if key.startswith("body.")})
    doublings = len({key.split(".")[1] for key in shapes if key.startswith("conv_up.")})
    unshuffle = {3: 1, 12: 2, 48: 4}.get(inside, 0)
    if not unshuffle or 2**doublings % unshuffle or doublings > 3:
        raise FormatError(
            f"{path}: takes {inside} channels and doubles {doublings} times, which is not known; {_EXPECTED}"
        )
    if blocks > _MOST_BLOCKS:
        raise FormatError(f"{path}: names {blocks} blocks, more than {_MOST_BLOCKS}; {_EXPECTED}")
    return RrdbPlan(2**doublings // unshuffle, blocks, features, growth, unshuffle)


def _compact_plan(path: Path, shapes: Shapes) -> CompactPlan:
    convolutions = sum(len(shape) == 4 for shape in shapes.values())
    channels = shapes[f"body.{2 * (convolutions - 1)}.weight"][0]
    scale = math.isqrt(channels // 3)
    if channels != 3 * scale**2 or not 1 <= scale <= _LARGEST_SCALE:
        raise FormatError(f"{path}: ends in {channels} channels, which are no whole number of pixels; {_EXPECTED}")
    if convolutions > _MOST_LAYERS:
        raise FormatError(f"{path}: names {convolutions} layers, more than {_MOST_LAYERS}; {_EXPECTED}")
    return CompactPlan(scale, convolutions - 2, shapes["body.0.weight"][0])

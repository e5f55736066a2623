"""Where the tensors of a file belong: what every format says of its keys before a tensor is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from sdlora.adapters.formats.parts import Shape, input_width, missing_part

Shapes = Mapping[str, Shape]
"""Of a file's tensors by key, which its header holds."""
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
FAMILY_ENTRIES = ("ss_base_model_version", "modelspec.architecture", "ss_v2")
"""Header entries by which `family_of` goes."""
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass
class Place:
    """The tensors of one layer: what the file calls the layer, and the key of each part (parts.py)."""

    name: str
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """What the tensors of a file are for."""

    layers: Mapping[str, Place]
    """By module path, as in `AdapterFile`."""
    unknown: tuple[str, ...]
    """Keys that are none of the format's."""
    problems: tuple[str, ...] = ()
    """What keeps the layers from being read, in one sentence each."""
    alphas: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """alpha by module path where the file tells it elsewhere than in a tensor; for all kinds alpha / rank counts."""
    rows: bool = False
    """DoRA's magnitudes are one for each output row, whatever their shape, as in peft."""

    def shapes_of(self, path: str, shapes: Shapes) -> dict[str, Shape]:
        """Return the shapes of a layer's tensors by part."""
        return {part: shapes[key] for part, key in self.layers[path].keys.items()}


class Sorting:
    """Collects where keys belong, one at a time."""

    def __init__(self) -> None:
        self._layers: dict[str, Place] = {}
        self._unknown: list[str] = []
        self._twice: list[str] = []

    def add(self, key: str, path: str, part: str, name: str) -> None:
        """The tensor `key` is `part` of the layer at `path`, which the file calls `name`."""
        place = self._layers.get(path)
        if place is None:  # made once a layer, not once a tensor
            place = self._layers[path] = Place(name)
        if part in place.keys:
            self._twice.append(f"{name} names a layer that the file holds under another name too ({place.name})")
        else:
            place.keys[part] = key

    def reject(self, key: str) -> None:
        """The tensor is none of the format's."""
        self._unknown.append(key)

    def places(self, spelling: Mapping[str, str] | None = None) -> Places:
        """Return all of it; `spelling` says what the format calls a part where that is not its name in parts.py."""
        problems = list(dict.fromkeys(self._twice))
        for place in self._layers.values():
            if missing := missing_part(frozenset(place.keys)):
                problems.append(f"{place.name} has no {(spelling or {}).get(missing, missing)}; the file is incomplete")
        return Places(self._layers, tuple(self._unknown), tuple(problems))


def is_module_path(path: str) -> bool:
    """Return whether it could be the path of a module: names with dots between them."""
    return _PATH.fullmatch(path) is not None


def family_of(places: Places, shapes: Shapes, metadata: Mapping[str, str]) -> str:
    """Return "sd1", "sd2" or "sdxl", told from components, then metadata, then widths; "" if untold."""
    if any(path.startswith("text_encoder_2.") for path in places.layers):
        return "sdxl"
    version, architecture, second = (metadata.get(key, "") for key in FAMILY_ENTRIES)
    version += architecture
    if version.startswith("sdxl_") or "stable-diffusion-xl" in version:
        return "sdxl"
    if second == "True" or "sd_v2" in version or "stable-diffusion-v2" in version:
        return "sd2"
    return _by_width(places, shapes) or ("sd1" if "sd_v1" in version or "stable-diffusion-v1" in version else "")


def _by_width(places: Places, shapes: Shapes) -> str:
    cross = [path for path in places.layers if path.endswith(("attn2.to_k", "attn2.to_v"))]
    if family := _only_width(cross, {768: "sd1", 1024: "sd2", 2048: "sdxl"}, places, shapes):
        return family
    text = [path for path in places.layers if path.endswith(("self_attn.q_proj", "self_attn.k_proj"))]
    return _only_width(text, {1024: "sd2"}, places, shapes)  # 768 is SD 1.x's, and that of SDXL's first encoder


def _only_width(paths: Iterable[str], by_width: Mapping[int, str], places: Places, shapes: Shapes) -> str:
    widths = {input_width(places.shapes_of(path, shapes)) for path in paths}
    return by_width.get(widths.pop(), "") if len(widths) == 1 else ""

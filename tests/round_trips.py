"""The table of docs/formats.md that says which format holds what: made of writing, reading and writing again."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from adapter_kinds import LINEAR, random_layer
from diffusers import UNet2DConditionModel

from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.layers import AdapterLayer, LoraLayer
from sdlora.adapters.names import FORMATS
from sdlora.adapters.verify import difference
from sdlora.adapters.write import write_adapter
from sdlora.assets import CONFIGS
from sdlora.errors import ConfigError, FormatError
from sdlora.families.base import match_targets
from sdlora.families.registry import FAMILIES
from sdlora.families.tiny import tiny_pipeline

Shapes = Mapping[str, tuple[int, ...]]
TITLES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
LARGEST_DIFFERENCE = 1e-6
_CHANNELS = (8, 6)
"""Of every layer of a true architecture here, whose names and kernels are true, so that it takes seconds."""


@dataclass(frozen=True)
class Kind:
    """A row of the table: what the layers are, in turn, and the new words."""

    layers: tuple[str, ...]
    convolutions: bool = True
    words: str = ""
    """"beside" or "bundled"."""
    every: int = 9
    """One layer in so many is in the file, others in other rows: names do not depend on the kind, and there are thousands."""


KINDS = {
    "LoRA": Kind(("lora",), convolutions=False),
    "LoRA of mixed ranks and alphas": Kind(("lora", "lora of rank 2"), convolutions=False),
    "LoRA on convolutions too (LoCon)": Kind(("lora",), every=1),
    "LoRA, convolutions in Tucker form": Kind(("tucker",)),
    "rsLoRA": Kind(("rslora",)),
    "DoRA": Kind(("dora",)),
    "DoRA by input columns": Kind(("dora by column",)),
    "LoHa": Kind(("loha",)),
    "LoHa in Tucker form": Kind(("loha tucker",)),
    "LoKr": Kind(("lokr", "lokr pair", "lokr pairs")),
    "LoKr in Tucker form": Kind(("lokr tucker",)),
    "dense difference": Kind(("dense",)),
    "several kinds in one file": Kind(("lora", "loha", "lokr", "dora", "dense")),
    "LoRA with new words beside it": Kind(("lora",), False, "beside"),
    "LoRA with new words bundled": Kind(("lora",), False, "bundled"),
}


def round_trips_table() -> str:
    """The table: a row for each kind, a column for each format and family."""
    columns = [f"{format}, {TITLES[family]}" for format in FORMATS for family in FAMILIES]
    lines = [f"| | {' | '.join(columns)} | where not |", "|---" * (len(columns) + 2) + "|"]
    return "\n".join((*lines, *map(round_trips_row, KINDS)))


def round_trips_row(title: str) -> str:
    """What becomes of one kind in each format, on true and on tiny architectures, which must agree."""
    kind, cells, reasons = KINDS[title], [], list[str]()
    for format in FORMATS:
        for family in FAMILIES:
            layers = (
                _some(shapes, kind, list(KINDS).index(title)) for shapes in (true_layers(family), tiny_layers(family))
            )
            found = {round_trip(family, format, kind, shapes) for shapes in layers}
            assert len(found) == 1, f"{title}, {format}, {family}: {found}"
            cells.append("no" if (reason := found.pop()) else "yes")
            reasons.append(reason)
    return f"| {title} | {' | '.join(cells)} | {'; '.join(dict.fromkeys(filter(None, reasons)))} |"


def key_sets_table() -> str:
    """How many layers of each component the true architectures have there."""
    lines = ["| | UNet, transformer blocks | and resnets | text encoder | second text encoder |", "|---" * 5 + "|"]
    for family, title in TITLES.items():
        paths = list(true_layers(family))
        unet = [path for path in paths if path.startswith("unet.")]
        counts = [sum(".attentions." in path for path in unet), len(unet)]
        counts += [sum(path.startswith(f"{name}.") for path in paths) for name in ("text_encoder", "text_encoder_2")]
        lines.append(f"| {title} | {' | '.join(str(count or '') for count in counts)} |")
    return "\n".join(lines)


def round_trip(family: str, format: str, kind: Kind, shapes: Shapes) -> str:
    """Why the format refuses such an adapter, "" where writing what was read gives the same bytes and updates.

    Raises AssertionError where it does neither.
    """
    adapter = _adapter(family, kind, shapes)
    with tempfile.TemporaryDirectory() as folder:
        first, second = (Path(folder) / name / "adapter" for name in ("first", "second"))
        bundle = kind.words == "bundled"
        try:
            write_adapter(adapter, first, format, bundle=bundle)
        except (FormatError, ConfigError) as error:
            assert not first.exists() and not first.parent.exists()
            sentence = str(error).removeprefix(f"{first}: not written: ").partition(";")[0]
            _, which, why = sentence.partition(", which ")
            return f"which {why}" if which else sentence
        read = read_adapter(first)
        write_adapter(read, second, format, bundle=bundle)
        assert content(first.parent) == content(second.parent), "other bytes"
    found = difference(adapter, read)
    assert found.same and found.layers == len(adapter.layers) and found.largest <= LARGEST_DIFFERENCE, found.sentence()
    assert read.family == family and read.token_digests() == adapter.token_digests()
    return ""


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@cache
def true_layers(family: str) -> Shapes:
    """Every layer of the family's blocks by its true path, with its true kernel but few channels."""
    folder, traits = CONFIGS / family, FAMILIES[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        encoders = {
            name: part.kind(part.kind.config_class.from_pretrained(folder / name))
            for name, part in traits.text_encoders.items()
        }
    shapes = _layers(family, unet, encoders)
    return {path: (*_CHANNELS, *shape[2:]) for path, shape in shapes.items()}


@cache
def tiny_layers(family: str) -> Shapes:
    """The same of the tiny base of that family, with all of its channels."""
    pipeline = tiny_pipeline(family)
    return _layers(family, pipeline.unet, {name: getattr(pipeline, name) for name in FAMILIES[family].text_encoders})


def _layers(family: str, unet: torch.nn.Module, encoders: Mapping[str, torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    traits = FAMILIES[family]
    found = {
        f"unet.{path}": tuple(unet.get_submodule(path).weight.shape)
        for path in match_targets(unet, ["transformer", "resnet"], traits.target_presets)
    }
    for name, encoder in encoders.items():
        for path in match_targets(encoder, ["transformer"], traits.text_encoder_presets):
            found[f"{name}.text_model.{path.removeprefix('text_model.')}"] = tuple(
                encoder.get_submodule(path).weight.shape
            )
    return found


def _some(shapes: Shapes, kind: Kind, first: int) -> Shapes:
    wanted = [path for path in shapes if kind.convolutions or not _is_large(shapes[path])]
    return {path: shapes[path] for path in wanted[first % kind.every :: kind.every]}


def _adapter(family: str, kind: Kind, shapes: Shapes) -> AdapterFile:
    layers = {
        path: _layer(kind.layers[number % len(kind.layers)], shape)
        for number, (path, shape) in enumerate(shapes.items())
    }
    words = {}
    if kind.words:
        encoders = FAMILIES[family].text_encoders
        words = {word: {name: torch.full((2, 4), len(word) / 8) for name in encoders} for word in ("zorb", "a <blick>")}
    metadata = dict(next(iter(FAMILIES[family].metadata.values()))) | {"ss_output_name": "adapter"}
    return AdapterFile(layers, family, metadata, words)


@cache
def _layer(kind: str, shape: tuple[int, ...]) -> AdapterLayer:
    """A layer of the kind; where that is a form for large kernels, of the plain kind elsewhere."""
    if kind == "lora of rank 2":
        layer = random_layer("lora", shape, seed=1)
        assert isinstance(layer, LoraLayer)
        return LoraLayer(layer.down[:2], layer.up[:, :2], 0.7)
    if kind == "rslora":
        layer = random_layer("lora", shape)
        return replace(layer, alpha=layer.alpha * math.sqrt(layer.rank))
    plain = {"tucker": "lora", "loha tucker": "loha", "lokr tucker": "lokr"}
    return random_layer(kind if kind in LINEAR or _is_large(shape) else plain[kind], shape)


def _is_large(shape: Sequence[int]) -> bool:
    return math.prod(shape[2:]) > 1

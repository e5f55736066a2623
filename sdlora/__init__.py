"""sdlora: train Stable Diffusion LoRA adapters on one gaming GPU, and make pictures with them.

The names below are the whole public interface. Heavy libraries load when a name is first used, so
`import sdlora` costs milliseconds.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# How long torch's threads on a CPU (GNU OpenMP) spin before they sleep; read once, when torch is loaded. With the
# long default, threads that wait for one another fight whatever else the machine does: see docs/benchmarks.md.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from sdlora.adapters.algebra import Truncation
    from sdlora.adapters.convert import convert_adapter
    from sdlora.adapters.extract import ExtractSettings, extract
    from sdlora.adapters.file import AdapterFile, read_adapter
    from sdlora.adapters.inspect import inspect_adapter
    from sdlora.adapters.layers import LoraLayer
    from sdlora.adapters.merge import MergePart, MergeSettings, merge
    from sdlora.adapters.merge_base import merge_into_base
    from sdlora.adapters.resize import resize
    from sdlora.adapters.write import write_adapter
    from sdlora.config import BaseSection, DataSection, TrainConfig, load_config, parse_config
    from sdlora.data.source import Dataset, open_dataset
    from sdlora.errors import SdloraError
    from sdlora.families.base import LoadedBase, ModelFamily
    from sdlora.families.registry import detect_family, load_base
    from sdlora.families.stored_base import StoredBase, open_base
    from sdlora.generation.engine import Engine
    from sdlora.generation.foreign.reading import ForeignRecipe, foreign_request, read_foreign
    from sdlora.generation.history.index import History
    from sdlora.generation.pictures.files import read_recipe, save_picture
    from sdlora.generation.pictures.infotext import parse_infotext
    from sdlora.generation.recipe import Recipe
    from sdlora.generation.replay.replaying import replay
    from sdlora.generation.request import GenerationRequest, make_request
    from sdlora.training.run import RunResult, train

_HOMES = {
    "AdapterFile": "sdlora.adapters.file",
    "BaseSection": "sdlora.config",
    "DataSection": "sdlora.config",
    "Dataset": "sdlora.data.source",
    "Engine": "sdlora.generation.engine",
    "ExtractSettings": "sdlora.adapters.extract",
    "ForeignRecipe": "sdlora.generation.foreign.reading",
    "GenerationRequest": "sdlora.generation.request",
    "History": "sdlora.generation.history.index",
    "LoadedBase": "sdlora.families.base",
    "LoraLayer": "sdlora.adapters.layers",
    "MergePart": "sdlora.adapters.merge",
    "MergeSettings": "sdlora.adapters.merge",
    "ModelFamily": "sdlora.families.base",
    "Recipe": "sdlora.generation.recipe",
    "RunResult": "sdlora.training.run",
    "SdloraError": "sdlora.errors",
    "StoredBase": "sdlora.families.stored_base",
    "TrainConfig": "sdlora.config",
    "Truncation": "sdlora.adapters.algebra",
    "convert_adapter": "sdlora.adapters.convert",
    "detect_family": "sdlora.families.registry",
    "extract": "sdlora.adapters.extract",
    "foreign_request": "sdlora.generation.foreign.reading",
    "inspect_adapter": "sdlora.adapters.inspect",
    "load_base": "sdlora.families.registry",
    "load_config": "sdlora.config",
    "make_request": "sdlora.generation.request",
    "merge": "sdlora.adapters.merge",
    "merge_into_base": "sdlora.adapters.merge_base",
    "open_base": "sdlora.families.stored_base",
    "open_dataset": "sdlora.data.source",
    "parse_config": "sdlora.config",
    "parse_infotext": "sdlora.generation.pictures.infotext",
    "read_adapter": "sdlora.adapters.file",
    "read_foreign": "sdlora.generation.foreign.reading",
    "read_recipe": "sdlora.generation.pictures.files",
    "replay": "sdlora.generation.replay.replaying",
    "resize": "sdlora.adapters.resize",
    "save_picture": "sdlora.generation.pictures.files",
    "train": "sdlora.training.run",
    "write_adapter": "sdlora.adapters.write",
}

__all__ = [
    "AdapterFile",
    "BaseSection",
    "DataSection",
    "Dataset",
    "Engine",
    "ExtractSettings",
    "ForeignRecipe",
    "GenerationRequest",
    "History",
    "LoadedBase",
    "LoraLayer",
    "MergePart",
    "MergeSettings",
    "ModelFamily",
    "Recipe",
    "RunResult",
    "SdloraError",
    "StoredBase",
    "TrainConfig",
    "Truncation",
    "convert_adapter",
    "detect_family",
    "extract",
    "foreign_request",
    "inspect_adapter",
    "load_base",
    "load_config",
    "make_request",
    "merge",
    "merge_into_base",
    "open_base",
    "open_dataset",
    "parse_config",
    "parse_infotext",
    "read_adapter",
    "read_foreign",
    "read_recipe",
    "replay",
    "resize",
    "save_picture",
    "train",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

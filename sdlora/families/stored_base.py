"""A base as it lies on the disk: each weight by its place in the model, read one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open

from sdlora.config import BaseSection
from sdlora.errors import ConfigError, ModelError
from sdlora.families.base import ModelFamily
from sdlora.families.detect import BaseFacts, detect_base
from sdlora.families.registry import FAMILIES, explained, stored_weights
from sdlora.families.sources import find_base, is_hub_id
from sdlora.families.traits import canonical
from sdlora.families.weights import Place, read_place, skeleton

WEIGHT = ".weight"


@dataclass(frozen=True)
class StoredBase:
    """The weights of a base's UNet and text encoders in its files."""

    name: str
    """What people call it: its file's or folder's name, or its Hub id."""
    facts: BaseFacts
    places: Mapping[str, Place]
    """By component and name in the model as adapter files have it: "unet.conv_in.weight", "text_encoder.text_model..."."""
    shapes: Mapping[str, tuple[int, ...]]
    """By the same names."""
    layers: tuple[str, ...]
    """Paths of the linear and convolution layers, which adapters can change; their weights end in ".weight"."""

    @property
    def family(self) -> ModelFamily:
        """Its family."""
        return FAMILIES[self.facts.family.name]

    def read(self, name: str) -> torch.Tensor:
        """Return a weight as stored. Raises ModelError where the file is damaged."""
        return self.read_at(self.places[name])

    def read_at(self, place: Place) -> torch.Tensor:
        """Return what lies at a place. The file is opened anew, or the pages of all that was read would stay in memory."""
        with explained(self.facts.path, self.facts.family), safe_open(place.file, "pt") as opened:
            return read_place(opened, place)

    def metadata(self) -> dict[str, str]:
        """Return the header entries by which programs tell what an adapter is for.

        Where the base does not declare what it predicts, without those that this decides.
        """
        known, prediction = self.family.metadata, self.facts.prediction
        if prediction is not None:
            rescaled = {"ss_zero_terminal_snr": "True"} if self.facts.zero_terminal_snr else {}
            return {**known[prediction], "modelspec.prediction_type": prediction, **rescaled}
        first, *others = known.values()
        return {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}


def open_base(section: BaseSection) -> StoredBase:
    """Return the base that `section` names, its weights left on the disk.

    Raises ModelError or FormatError as `load_base` does, also where a layer's weight is missing.
    """
    path = find_base(section)
    if path.is_dir() and section.config:
        raise ConfigError(f"{path}: is a folder, which describes itself; --base-config is for checkpoints")
    facts = detect_base(path, section.variant)
    family = FAMILIES[facts.family.name]
    with explained(facts.path, facts.family):
        weights = stored_weights(section, facts)
        places: dict[str, Place] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        layers: list[str] = []
        kinds = {"unet": UNet2DConditionModel} | {name: part.kind for name, part in family.text_encoders.items()}
        for part, kind in kinds.items():
            model = skeleton(kind, weights, part)
            found = weights.places(part, model)
            for name, tensor in model.state_dict().items():
                if name in found:
                    places[canonical(part, name)] = found[name]
                    shapes[canonical(part, name)] = tuple(tensor.shape)
            for path, layer in model.named_modules():
                if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                    layers.append(canonical(part, path))
    if missing := [path for path in layers if path + WEIGHT not in places]:
        raise ModelError(
            f"{facts.path}: lacks {len(missing)} weights, such as {missing[0]}; download or export it again"
        )
    on_hub = is_hub_id(section.path) and not Path(section.path).exists()
    return StoredBase(section.path if on_hub else facts.path.name, facts, places, shapes, tuple(layers))

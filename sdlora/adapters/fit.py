"""Whether an adapter fits a base: its family, and the shapes of the weights that it changes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sdlora.adapters.file import AdapterFile
from sdlora.adapters.layers import AdapterLayer, DoraLayer
from sdlora.errors import ModelError
from sdlora.families.traits import FamilyTraits, family_title


def refuse_other_family(adapter_family: str, family: FamilyTraits, base_name: str) -> None:
    """Raise ModelError where an adapter says that it was made for another family than the base's."""
    if adapter_family and adapter_family != family.name:
        raise ModelError(
            f"the adapter is for {family_title(adapter_family)}, the base {base_name} is {family.title}; choose one that fits it"
        )


def refuse_misfit(
    adapter: AdapterFile, shapes: Mapping[str, tuple[int, ...]], base_name: str, family: FamilyTraits
) -> None:
    """Raise ModelError where a layer of the adapter is missing from the base, or has another shape there.

    `shapes` are those of the base's weights by the adapter's paths, (out, in) or (out, in, kh, kw), () where no adapter
    can change them.
    """
    refuse_other_family(adapter.family, family, base_name)
    problems = []
    for path, layer in adapter.layers.items():
        if path not in shapes:
            problems.append(f"{path} does not exist there")
        elif problem := _misfit(shapes[path], layer):
            problems.append(f"{path} {problem}")
    if problems:
        raise ModelError(
            f"the adapter does not fit the base {base_name} ({family.title}): "
            f"{len(problems)} of {len(adapter.layers)} layers differ, such as {problems[0]}; "
            f"it was trained on another base (the file says {adapter.metadata.get('ss_sd_model_name', adapter.family)})"
        )


def _misfit(shape: tuple[int, ...], layer: AdapterLayer) -> str:
    """Return why an adapter's layer does not fit a weight of that shape, or ""."""
    expected, given = (*shape, 1, 1)[:4] if shape else (), (*layer.shape, 1, 1)[:4]
    flattened = layer.shape == (*expected[:1], math.prod(expected[1:]))
    if not expected or (given != expected and not flattened):
        return f"is {expected or 'no linear or convolution layer'} there and {given} in the file"
    if isinstance(layer, DoraLayer) and layer.by_column and layer.magnitude.shape[1] != expected[1]:
        return f"has {expected[1]} input channels there and {layer.magnitude.shape[1]} magnitudes in the file"
    return ""

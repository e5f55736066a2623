"""The rank and alpha of each layer of a new adapter, and how peft is told."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sdlora.adapters.live import bare
from sdlora.config import AdapterSection
from sdlora.errors import ConfigError
from sdlora.families.base import LoadedBase
from sdlora.families.traits import canonical


@dataclass(frozen=True)
class Size:
    """The update of a layer is scaled by alpha / rank."""

    rank: int
    alpha: float


def layer_sizes(
    base: LoadedBase, section: AdapterSection, targets: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Size]]:
    """Return the size of every target, {component: {live path: size}}; alpha is in proportion to the rank.

    Patterns of adapter.ranks match the end of a path in files, from a dot on; the last one that matches counts.
    rsLoRA's alpha is alpha * sqrt(rank), so that alpha / rank is its scale. Raises ConfigError for a pattern
    without a layer, and for a rank or alpha of convolutions where there are none.
    """
    patterns = {text: re.compile(rf"(?:.*\.)?{fnmatch.translate(text)}") for text in section.ranks}
    modules = dict(base.components())
    idle = set(patterns)
    sizes: dict[str, dict[str, Size]] = {}
    for component, paths in targets.items():
        sizes[component] = {}
        for path in paths:
            found = [text for text, pattern in patterns.items() if pattern.match(canonical(component, path))]
            idle.difference_update(found)
            usual = _usual_size(section, bare(modules[component].get_submodule(path)))
            rank = section.ranks[found[-1]] if found else usual.rank
            alpha = usual.alpha * rank / usual.rank
            sizes[component][path] = Size(rank, alpha * math.sqrt(rank) if section.rank_stabilized else alpha)
    if idle:
        raise ConfigError(
            f"adapter.ranks: {sorted(idle)[0]!r} matches no layer that gets an adapter; "
            'name patterns of those that adapter.targets chooses, such as "attn2.to_k"'
        )
    layers = (bare(modules[component].get_submodule(path)) for component, paths in targets.items() for path in paths)
    if (section.conv_rank or section.conv_alpha) and not any(map(has_large_kernel, layers)):
        name = "conv_rank" if section.conv_rank else "conv_alpha"
        raise ConfigError(
            f"adapter.{name} is {getattr(section, name):g}, and adapter.targets chooses no convolution larger than 1 x 1 "
            f'of this base; add one there, such as "resnet", or remove adapter.{name}'
        )
    return sizes


def has_large_kernel(layer: nn.Module) -> bool:
    """Return whether a layer is a convolution larger than 1 x 1, for which conv_rank is."""
    return isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1


def peft_sizes(sizes: Mapping[str, Size], usual: Size) -> dict[str, Any]:
    """Return peft's rank_pattern and alpha_pattern for the layers of `sizes` that differ from `usual`.

    One pattern a value, because peft tries each pattern on each layer.
    """

    def by_value(values: Mapping[str, float], usual_value: float) -> dict[str, Any]:
        groups: dict[float, list[str]] = {}
        for path, value in values.items():
            if value != usual_value:
                groups.setdefault(value, []).append(re.escape(path))
        return {f"^(?:{'|'.join(paths)})$": value for value, paths in groups.items()}

    return {
        "rank_pattern": by_value({path: size.rank for path, size in sizes.items()}, usual.rank),
        "alpha_pattern": by_value({path: size.alpha for path, size in sizes.items()}, usual.alpha),
    }


def _usual_size(section: AdapterSection, layer: nn.Module) -> Size:
    """Return what the section gives a layer of its kind."""
    if not has_large_kernel(layer):
        return Size(section.rank, section.alpha)
    rank = section.conv_rank or section.rank
    return Size(rank, section.conv_alpha or section.alpha * rank / section.rank)

"""An adapter with fewer ranks: each layer's update cut off where its singular values say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from sdlora.adapters.algebra import OnLayer, Spectrum, Truncation, spectrum_of, weight_shape
from sdlora.adapters.blocks import Energies
from sdlora.adapters.derived import with_network
from sdlora.adapters.file import AdapterFile
from sdlora.adapters.layers import AdapterLayer, DoraLayer
from sdlora.errors import ConfigError, FormatError

_STEPS = 40


@dataclass(frozen=True)
class Resized:
    """A smaller adapter, and what it keeps."""

    adapter: AdapterFile
    energy: Mapping[str, float]
    """Share of the squared norm of all updates that is kept, by block, and of all under ""."""


def resize(adapter: AdapterFile, wanted: Truncation, *, bytes: int = 0, on_layer: OnLayer | None = None) -> Resized:
    """Return the adapter cut down to `wanted`, or with `bytes` to weights of that size at the same energy everywhere.

    Layers of all kinds become LoRA; of DoRA the update within, its magnitudes stay. Raises ConfigError for a size that
    no rank fits, FormatError for an adapter without layers.
    """
    if not adapter.layers:
        raise FormatError("has no layers to resize, only words")
    spectra: dict[str, Spectrum] = {}
    for number, (path, layer) in enumerate(adapter.layers.items(), start=1):
        spectra[path] = spectrum_of(layer.inner, weight_shape(path, adapter.family, layer), wanted)
        if on_layer:
            on_layer(number, len(adapter.layers))
    dtypes = {path: layer.tensors()[0].dtype for path, layer in adapter.layers.items()}
    if bytes:
        wanted = replace(wanted, energy=_energy_for(bytes, spectra, dtypes, wanted))
    ranks = {path: wanted.rank_of(spectrum) for path, spectrum in spectra.items()}
    layers: dict[str, AdapterLayer] = {}
    for path, layer in adapter.layers.items():
        small = spectra[path].layer(ranks[path], dtypes[path])
        layers[path] = replace(layer, lora=small) if isinstance(layer, DoraLayer) else small
    resized = replace(adapter, layers=layers, metadata=with_network(adapter.metadata, layers))
    return Resized(resized, _kept(spectra, ranks))


def _energy_for(
    bytes: int, spectra: Mapping[str, Spectrum], dtypes: Mapping[str, torch.dtype], wanted: Truncation
) -> float:
    """Return the largest share of energy at which the weights take no more than `bytes`."""

    def size(energy: float) -> int:
        cut = replace(wanted, energy=energy)
        return sum(
            cut.rank_of(spectrum) * (len(spectrum.left) + spectrum.right.shape[1]) * dtypes[path].itemsize
            for path, spectrum in spectra.items()
        )

    if size(0.0) > bytes:
        raise ConfigError(f"{bytes / 1e6:g} MB is too small: rank 1 in every layer takes {size(0.0) / 1e6:.3g} MB")
    low, high = 0.0, 1.0
    if size(high) <= bytes:
        return high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) <= bytes else (low, middle)
    return low


def _kept(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> dict[str, float]:
    energies = Energies()
    for path, spectrum in spectra.items():
        energies.add(path, spectrum.total, spectrum.total * spectrum.energy(ranks[path]))
    return energies.shares()

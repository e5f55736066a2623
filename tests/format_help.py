"""Reading tensors as the content of a file, without a file."""

from __future__ import annotations

from sdlora.adapters.formats.detect import contents_of
from sdlora.adapters.formats.layer_parts import layers_of


def read(tensors, metadata=None):
    """Return the layers by module path, and the keys that are none of the format's."""
    places = contents_of({key: tuple(tensor.shape) for key, tensor in tensors.items()}, metadata or {}).places
    return layers_of(places, tensors), places.unknown

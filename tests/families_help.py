"""Loading bases, and the sentence of those that do not load."""

import pytest

from sdlora.config import BaseSection
from sdlora.errors import FormatError, ModelError
from sdlora.families.base import LoadedBase
from sdlora.families.registry import load_base


def load(path, **section) -> LoadedBase:
    return load_base(BaseSection(path=str(path), precision="fp32", **section), "cpu")


def refusal(path, **section) -> str:
    with pytest.raises((ModelError, FormatError)) as caught:
        load(path, **section)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)

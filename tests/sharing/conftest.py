"""Adapters to share, with everything that a trained one has in its header."""

from __future__ import annotations

import pytest
from hub_server import hub
from shared_files import save_picture, trained

__all__ = ["hub", "picture", "trained_adapter"]


@pytest.fixture
def trained_adapter(tmp_path):
    """A LoRA with the header of a trained one, and a new word beside it where `words` are named."""
    return lambda name="zorb", **options: trained(tmp_path / f"{name}.safetensors", **options)


@pytest.fixture
def picture(tmp_path):
    """A PNG with text, EXIF and a profile in it."""
    return save_picture(tmp_path / "mine" / "anna-at-home.png")

"""Fixtures of a small run, for tests/training and tests/cli: six noisy pictures in two shapes, a random tiny base."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdlora import TrainConfig, parse_config
from sdlora.config import put_setting


def _draw_pictures(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        height = 64 + 32 * (number % 2)
        Image.fromarray(rng.integers(0, 256, (height, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a [trigger] on a wall\n", encoding="utf-8")
    return folder


@pytest.fixture
def settings(tmp_path: Path, tiny_folder: Any, shape: str) -> dict[str, Any]:
    """Values of a whole configuration that trains in about a second."""
    return {
        "base": {"path": str(tiny_folder(shape)), "precision": "fp32"},
        "data": {"folder": str(_draw_pictures(tmp_path / "pictures", 6, 0)), "trigger": "zorb"},
        "adapter": {"rank": 4, "alpha": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "training": {"steps": 6, "batch_size": 2, "seed": 3},
        "validation": {"folder": str(_draw_pictures(tmp_path / "held-out", 2, 1)), "every_steps": 0, "timesteps": 2},
        "output": {"folder": str(tmp_path / "run")},
    }


def changed(settings: dict[str, Any], **values: Any) -> TrainConfig:
    """The configuration with "section__field" or "section__part__field" values replaced."""
    copy = deepcopy(settings)
    for key, value in values.items():
        put_setting(copy, key.replace("__", "."), value)
    return parse_config(copy)


@pytest.fixture
def configure(settings: dict[str, Any]) -> Any:
    """A function from changed values to the configuration."""
    return lambda **values: changed(settings, **values)

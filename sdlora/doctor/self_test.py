"""A small training and a picture, to see that all parts work together."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.doctor.check import Check
from sdlora.errors import GenerationError, ModelError, TrainingError

if TYPE_CHECKING:
    import torch


def run_self_test(device: torch.device) -> Check:
    """A tiny adapter was trained, read back and drawn with on `device`. Raises SdloraError where that fails."""
    from sdlora import Engine, make_request, read_adapter

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sdlora-self-test-", ignore_cleanup_errors=True) as name:
        engine = Engine("tiny", device=str(device))
        base_before = engine.weights_sha256()
        adapter = _train_briefly(Path(name), device)
        if not read_adapter(adapter).layers:
            raise TrainingError("the adapter holds no layers")
        request = make_request(prompt="a zorb", steps=4, adapters=[{"path": str(adapter)}])
        picture, _ = next(iter(engine.generate(request)))
        if picture.getcolors(1) is not None:  # None: of more colours than one
            raise GenerationError("the picture is of one flat colour")
        if engine.weights_sha256() != base_before:
            raise ModelError("the weights of the base were changed by making a picture")
    value = f"passed in {time.perf_counter() - started:.1f} s"
    return Check("self-test", "ok", value, "A small adapter was trained on the tiny base, and a picture made with it.")


def _train_briefly(folder: Path, device: torch.device) -> Path:
    """Return the adapter of two steps on two drawn pictures. Raises SdloraError where its numbers are no good."""
    from sdlora import parse_config, train

    settings: dict[str, Any] = {
        "base": {"path": "tiny"},
        "data": {
            "folder": str(_draw(folder / "train", 2)),
            "caption": "a [trigger]",
            "trigger": "zorb",
            "cache": {"folder": str(folder / "cache")},
        },
        "adapter": {"rank": 2, "alpha": 2},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "training": {"steps": 2},
        "validation": {"folder": str(_draw(folder / "held-out", 1)), "timesteps": 2},
        "output": {"folder": str(folder / "run")},
    }
    with _accelerate_on(device):
        result = train(parse_config(settings, "self-test"))
    if result.interrupted:  # train() takes the first Ctrl-C for itself
        raise KeyboardInterrupt
    if not all(loss is not None and math.isfinite(loss) for loss in (result.loss_before, result.loss_after)):
        raise TrainingError(f"the held-out loss went from {result.loss_before} to {result.loss_after}")
    if not 0 < result.effect.delta_share < math.inf:
        raise TrainingError(f"the trained adapter changes the weights by {result.effect.delta_share} of their size")
    return result.adapter


def _draw(folder: Path, count: int) -> Path:
    """`folder` holds `count` pictures of a disc, each another; returns the folder."""
    from PIL import Image, ImageDraw

    folder.mkdir()
    for number in range(count):
        picture = Image.new("RGB", (128, 128), (40, 90 + 60 * number, 160))
        ImageDraw.Draw(picture).ellipse((20, 30, 90 + 15 * number, 100), fill=(230, 200, 60 + 30 * count))
        picture.save(folder / f"{number}.png")
    return folder


@contextmanager
def _accelerate_on(device: torch.device) -> Iterator[None]:
    """Inside, accelerate, which chooses the device of training, chooses `device`."""
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    try:
        yield
    finally:
        os.environ.pop("ACCELERATE_TORCH_DEVICE")
        if before is not None:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before

"""The whole training state on disk: what a resumed run needs to give the uninterrupted run's adapter."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdlora.config import TrainConfig
from sdlora.errors import ConfigError
from sdlora.storage import write_bytes

_KEPT = 2


@dataclass(frozen=True)
class TrainingState:
    """Everything that changes during a run. Noise, order and learning rate are functions of these counts."""

    step: int
    examples_seen: int
    weights: Mapping[str, torch.Tensor]
    """Every trained weight by its name."""
    optimizer: dict[str, Any]
    loss_before: float | None
    identity: str


def run_identity(config: TrainConfig, base_sha256: str, data_fingerprint: str, processes: int = 1) -> str:
    """Return a hash of all that must be equal for a resumed run to continue the earlier one."""
    sections = ("data", "adapter", "tokens", "objective", "optimizer", "training")
    settings = {name: getattr(config, name).model_dump(mode="json") for name in sections}
    for key in ("resume", "checkpoint_every_steps", "steps_per_picture"):
        del settings["training"][key]
    for key in ("micro_batch", "gradient_checkpointing"):  # how it is computed: a run out of memory goes on with less
        del settings["training"][key]
    del settings["tokens"]["save"]
    del settings["data"]["cache"]
    for part in (settings["data"], settings["data"]["prior"], *settings["data"]["concepts"]):
        part["folder"] = ""  # the pictures may have been moved; their content is in the fingerprint
    for part in (settings["data"], *settings["data"]["concepts"]):
        part["masks"]["folder"] = ""
    base = config.base.model_dump(mode="json", include={"precision", "quantize", "prediction"})
    text = json.dumps([settings, base_sha256, data_fingerprint, base, processes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save_state(folder: Path, state: TrainingState) -> Path:
    """A checkpoint of the state is in `folder`, whole; of the older ones only the newest is kept."""
    buffer = io.BytesIO()
    torch.save({**vars(state), "weights": dict(state.weights)}, buffer)
    path = folder / f"state-{state.step:06d}.pt"
    write_bytes(path, buffer.getvalue())
    for old in _checkpoints(folder)[:-_KEPT]:
        old.unlink()
    return path


def load_newest_state(folder: Path, identity: str) -> TrainingState:
    """Return the newest checkpoint that can be read.

    Raises ConfigError when there is none, or when it belongs to a run with other settings, data or base.
    """
    for path in reversed(_checkpoints(folder)):
        try:
            state = TrainingState(**torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError):
            continue
        if state.identity != identity:
            raise ConfigError(
                f"{path}: was written by a run with other settings, pictures or base; repeat that run's "
                "config.toml exactly (with training.resume = true), or start anew in another output.folder"
            )
        return state
    raise ConfigError(
        f"training.resume: {folder} holds no readable checkpoint; leave resume out to start from the beginning"
    )


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*.pt"))

"""One resumable training loop, shared by every stage of the tiny base's pretraining."""

from __future__ import annotations

import copy
import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class StagePlan:
    """How long and how fast one stage trains."""

    name: str
    steps: int
    learning_rate: float
    warmup_steps: int
    decay_share: float = 0.3
    """Share of the steps, at the end, in which the learning rate falls to zero on a cosine."""
    ema_decay: float = 0.999
    weight_decay: float = 0.01
    checkpoint_seconds: float = 120.0
    log_every: int = 50


@dataclass(frozen=True)
class StepRandom:
    """The only randomness of a step, a function of seed, stage and step number."""

    numpy: np.random.Generator
    torch: torch.Generator


LossOfStep = Callable[[nn.Module, StepRandom], tuple[Tensor, dict[str, float]]]


def train_stage(
    plan: StagePlan,
    model: ModuleT,
    loss_of_step: LossOfStep,
    folder: Path,
    seed: int,
    device: torch.device,
    after_checkpoint: Callable[[ModuleT, int], None] | None = None,
) -> ModuleT:
    """Train to the plan's end, from the last checkpoint if there is one; return the EMA model."""
    model.requires_grad_(True)
    averaged = copy.deepcopy(model)
    averaged.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), plan.learning_rate, betas=(0.9, 0.99), weight_decay=plan.weight_decay
    )
    path = folder / f"{plan.name}.pt"
    step = _restore(path, model, averaged, optimizer, device) if path.exists() else 0
    model.train()
    saved_at = logged_at = time.monotonic()
    sums: dict[str, float] = {}
    logged_step = step
    while step < plan.steps:
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * learning_rate_share(plan, step)
        loss, parts = loss_of_step(model, _step_random(seed, plan.name, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        update_average(averaged, model, min(plan.ema_decay, (1 + step) / (10 + step)))
        for key, value in {"loss": loss.item(), **parts, "norm": norm.item()}.items():
            sums[key] = sums.get(key, 0.0) + value
        now = time.monotonic()
        if step % plan.log_every == 0:
            count = step - logged_step
            means = {key: value / count for key, value in sums.items()}
            means["seconds_per_step"] = (now - logged_at) / count
            log(folder, plan.name, step, means)
            sums, logged_at, logged_step = {}, now, step
        if step == plan.steps or now - saved_at > plan.checkpoint_seconds:
            _save(path, step, model, averaged, optimizer)
            if after_checkpoint is not None:
                after_checkpoint(averaged, step)
            saved_at = time.monotonic()
    return averaged


def learning_rate_share(plan: StagePlan, step: int) -> float:
    """Return the factor of the learning rate: a linear rise, a plateau, a cosine fall to zero."""
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    decay_steps = max(1, round(plan.steps * plan.decay_share))
    progress = (step - (plan.steps - decay_steps)) / decay_steps
    return 1.0 if progress < 0 else 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def update_average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's."""
    old: list[torch.Tensor] = list(averaged.parameters())
    torch._foreach_lerp_(old, list(model.parameters()), 1.0 - decay)
    for kept, fresh in zip(averaged.buffers(), model.buffers(), strict=True):
        kept.copy_(fresh)


def log(folder: Path, stage: str, step: int, values: dict[str, float]) -> None:
    """Print one line of numbers and append it to the run's log."""
    numbers = " ".join(f"{key}={value:.4g}" for key, value in values.items())
    line = f"{time.strftime('%H:%M:%S')} {stage} step={step} {numbers}"
    print(line, flush=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _step_random(seed: int, stage: str, step: int) -> StepRandom:
    mixed = np.random.SeedSequence([seed, zlib.crc32(stage.encode()), step])
    torch_seed, numpy_seed = mixed.generate_state(2, np.uint64)
    generator = torch.Generator().manual_seed(int(torch_seed >> np.uint64(1)))
    return StepRandom(np.random.default_rng(int(numpy_seed)), generator)


def _save(path: Path, step: int, model: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state: dict[str, Any] = {
        "step": step,
        "model": model.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    beside = path.with_suffix(".partial")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _restore(
    path: Path,
    model: nn.Module,
    averaged: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> int:
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    averaged.load_state_dict(state["averaged"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])

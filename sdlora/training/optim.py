"""Optimizers and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from sdlora.config import OptimizerSection
from sdlora.errors import first_line


def make_optimizer(
    section: OptimizerSection, parameters: Mapping[str, Sequence[nn.Parameter]]
) -> tuple[torch.optim.Optimizer, str]:
    """Return the optimizer, one group a component, and a note for the user where it is not the one asked for.

    Each group keeps its own full learning rate under "base_lr".
    """
    groups: list[dict[str, Any]] = []
    for component, members in parameters.items():
        rate = section.learning_rate if component == "unet" else section.text_encoder_learning_rate
        groups.append({"params": list(members), "lr": rate, "base_lr": rate})
    options: dict[str, Any] = {
        "betas": section.betas,
        "eps": section.epsilon,
        "weight_decay": section.weight_decay,
    }
    if section.kind == "adamw":
        return torch.optim.AdamW(groups, **options), ""
    device = next(iter(parameters.values()))[0].device
    if reason := why_no_8bit(device):
        note = f"8-bit AdamW is not available here ({reason}); using AdamW in 32 bits"
        return torch.optim.AdamW(groups, **options), note
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, **options), ""


def why_no_8bit(device: torch.device) -> str:
    """Return "" where bitsandbytes' 8-bit AdamW takes a step on `device`, else the reason it does not."""
    try:
        import bitsandbytes

        trial = nn.Parameter(torch.zeros(4096, device=device))
        trial.grad = torch.ones_like(trial)
        bitsandbytes.optim.AdamW8bit([trial], lr=1e-3).step()
    except (ImportError, OSError, RuntimeError, AttributeError, NotImplementedError, AssertionError) as error:
        return first_line(error)
    return (
        ""
        if bool(trial.detach().isfinite().all() and trial.detach().abs().max() > 0)
        else "its step gives nothing, or NaN"
    )


def rate_factor(section: OptimizerSection, step: int, steps: int) -> float:
    """Return what the learning rate of optimizer step `step` (from 0) is multiplied with, in (0, 1].

    A function of the step alone, so that a resumed run needs no scheduler state.
    """
    if step < section.warmup_steps:
        return (step + 1) / (section.warmup_steps + 1)
    if section.schedule == "constant":
        return 1.0
    progress = (step - section.warmup_steps) / max(1, steps - section.warmup_steps)
    if section.schedule == "linear":
        return 1 - progress
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group learns at `factor` times its own full rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Every process has the mean of all processes' gradients; a missing gradient counts as zero."""
    if accelerator.num_processes == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat: torch.Tensor = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def clip_gradients(parameters: Sequence[nn.Parameter], largest_norm: float) -> float:
    """The gradients' joint norm is at most `largest_norm` (0: as it was); returns the norm before."""
    bound = largest_norm if largest_norm > 0 else math.inf
    return float(nn.utils.clip_grad_norm_(parameters, bound))

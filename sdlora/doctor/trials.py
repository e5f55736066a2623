"""What of bitsandbytes works here, tried out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from sdlora.doctor.check import Check, sentence

if TYPE_CHECKING:
    import torch


def try_bitsandbytes(device: torch.device) -> Iterator[Check]:
    """Yield what of bitsandbytes really works on `device`, each tried out."""
    trials: tuple[tuple[str, str, Callable[[torch.device], None], str], ...] = (
        ("8-bit optimizer", "AdamW with a state of 8 bits", _step_in_8_bits, "training uses one of 32 bits"),
        ("nf4 layers", "A layer held in 4 bits", _pass_in_4_bits, "base.quantize = nf4 is not to be had"),
        ("int8 layers", "A layer held in 8 bits", _pass_in_8_bits, "base.quantize = int8 is not to be had"),
    )
    for name, what, trial, otherwise in trials:
        try:
            trial(device)
        except (ImportError, OSError, RuntimeError, AttributeError, AssertionError, ValueError, TypeError) as error:
            meaning = f"{what} fails on this device, so {otherwise} ({sentence(error)})."
            fix = "pip install --upgrade bitsandbytes, and see that it supports this device; all else works without it"
            yield Check(name, "note", "does not work", meaning, fix)
        else:
            yield Check(name, "ok", "works", f"{what} was tried out on this device.")


def _step_in_8_bits(device: torch.device) -> None:
    import bitsandbytes
    import torch

    weight = torch.nn.Parameter(torch.zeros(4096, device=device))  # below 4096 values the state stays in 32 bits
    weight.grad = torch.ones_like(weight)
    bitsandbytes.optim.AdamW8bit([weight], lr=1e-3).step()
    _require_effect(weight.detach(), "its step")


def _pass_in_4_bits(device: torch.device) -> None:
    import bitsandbytes
    import torch

    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    _pass_through(layer, device)


def _pass_in_8_bits(device: torch.device) -> None:
    import bitsandbytes

    _pass_through(bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False), device)


def _pass_through(layer: torch.nn.Module, device: torch.device) -> None:
    """Forward and backward work: the frozen layer hands a gradient to its input."""
    import torch

    given = torch.ones(4, 64, device=device, requires_grad=True)
    layer.requires_grad_(False).to(device)(given).float().square().mean().backward()
    _require_effect(given.grad, "its backward pass")


def _require_effect(values: torch.Tensor | None, what: str) -> None:
    if values is None or not bool(values.isfinite().all() and values.abs().max() > 0):
        raise RuntimeError(f"{what} gives nothing, or NaN")

"""What of bitsandbytes works here, tried out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from sdlora.config import Quantization
from sdlora.doctor.check import Check, sentence
from sdlora.errors import SdloraError

if TYPE_CHECKING:
    import torch


def try_bitsandbytes(device: torch.device) -> Iterator[Check]:
    """Yield what of bitsandbytes really works on `device`, each tried out."""
    trials: tuple[tuple[str, str, Callable[[torch.device], None], str], ...] = (
        ("8-bit optimizer", "AdamW with a state of 8 bits", _step_in_8_bits, "training uses one of 32 bits"),
        (
            "nf4 layers",
            "A layer held in 4 bits",
            partial(_pass_in_few_bits, "nf4"),
            "base.quantize = nf4 is not to be had",
        ),
        (
            "int8 layers",
            "A layer held in 8 bits",
            partial(_pass_in_few_bits, "int8"),
            "base.quantize = int8 is not to be had",
        ),
    )
    for name, what, trial, otherwise in trials:
        try:
            trial(device)
        except (
            ImportError,
            OSError,
            RuntimeError,
            AttributeError,
            AssertionError,
            ValueError,
            TypeError,
            SdloraError,
        ) as error:
            meaning = f"{what} fails on this device, so {otherwise} ({sentence(error)})."
            fix = "pip install --upgrade bitsandbytes, and see that it supports this device; all else works without it"
            yield Check(name, "note", "does not work", meaning, fix)
        else:
            yield Check(name, "ok", "works", f"{what} was tried out on this device.")


def _step_in_8_bits(device: torch.device) -> None:
    from sdlora.training.optimizers import why_no_8bit

    if reason := why_no_8bit(device):
        raise RuntimeError(reason)


def _pass_in_few_bits(kind: Quantization, device: torch.device) -> None:
    """Forward and backward work: a frozen layer, quantised as bases are, hands a gradient to its input."""
    import torch

    from sdlora.families.quantize import quantize_linears

    model = torch.nn.ModuleDict({"attentions": torch.nn.ModuleList([torch.nn.Linear(64, 64, bias=False)])})
    quantize_linears(model.requires_grad_(False), kind, device, torch.float32)
    given = torch.ones(4, 64, device=device, requires_grad=True)
    model.get_submodule("attentions.0")(given).float().square().mean().backward()
    if given.grad is None or not bool(given.grad.isfinite().all() and given.grad.abs().max() > 0):
        raise RuntimeError("its backward pass gives nothing, or NaN")

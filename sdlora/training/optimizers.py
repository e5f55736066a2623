"""From the name of an optimizer to something that makes it, tried out before the run."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sdlora.config import OPTIMIZERS, OptimizerSection
from sdlora.errors import ConfigError, first_line
from sdlora.training.lion import Lion

OptimizerFactory = Callable[[Sequence[dict[str, Any]]], Optimizer]
"""Makes an optimizer of torch's parameter groups, each with its own "lr"."""

_SMALLEST_FACTOR = 0.1
_TRIAL_RATE = 1.0
_IN_FEW_BITS = {"adamw8bit": "AdamW8bit", "paged-adamw8bit": "PagedAdamW8bit", "lion8bit": "Lion8bit"}
_INSTEAD = {"paged-adamw8bit": "adamw8bit", "adamw8bit": "adamw", "lion8bit": "lion"}
_SETTINGS = {"betas": "betas", "epsilon": "eps", "weight_decay": "weight_decay"}
_DEFAULTS = OptimizerSection()
_TITLES = {
    "adamw8bit": "8-bit AdamW",
    "adamw": "AdamW in 32 bits",
    "paged-adamw8bit": "paged 8-bit AdamW",
    "lion8bit": "8-bit Lion",
    "lion": "Lion in 32 bits",
}


def choose_optimizer(section: OptimizerSection, device: torch.device) -> tuple[OptimizerFactory, tuple[str, ...]]:
    """Return what makes the optimizer that was asked for, and notes for the user where it is another one.

    It has taken a step on `device`, and its state fits into a checkpoint. Raises ConfigError for an optimizer or
    an argument that does not exist or does not work.
    """
    kind, notes = section.kind, []
    while kind in _IN_FEW_BITS and (reason := why_not(kind, device)):
        notes.append(f"{_TITLES[kind]} is not available here ({reason}); using {_TITLES[_INSTEAD[kind]]}")
        kind = _INSTEAD[kind]
    make = _class_of(kind)
    options = {**_options(section, kind, make, device), **_checked_arguments(section, make)}

    def factory(groups: Sequence[dict[str, Any]]) -> Optimizer:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some greet the user
                optimizer = make(groups, **options)
            train_mode(optimizer)
        except Exception as error:  # somebody else's class: whatever it says is about the settings it was given
            raise ConfigError(f"optimizer.kind {section.kind!r} cannot be made: {first_line(error)}") from error
        _check_factors(optimizer, section.kind)
        return optimizer

    _try_out(factory, section.kind, device)
    return factory, tuple(notes)


def check_optimizer(section: OptimizerSection, device: torch.device, rates: Iterable[float] = ()) -> None:
    """Raise ConfigError where `choose_optimizer` would, or where its optimizer learns nothing at one of `rates`."""
    factory, _ = choose_optimizer(section, device)
    for rate in {rate for rate in rates if rate > 0}:
        factory([{"params": [nn.Parameter(torch.zeros(1, device=device))], "lr": rate}])


def step_size(optimizer: Any) -> float | None:
    """Return the size of steps that an optimizer has found so far, None of one that takes rates as they are."""
    group = optimizer.param_groups[0]
    return float(group["d"]) if "d0" in group else None  # the names all of Prodigy's kin use


def averages_itself(optimizer: Any) -> bool:
    """Return whether the weights while training differ from those to use, as with schedule-free ones."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


def train_mode(optimizer: Any) -> None:
    """The weights of an optimizer that averages itself are those to train; others are left alone."""
    if averages_itself(optimizer):
        optimizer.train()


def eval_mode(optimizer: Any) -> None:
    """The weights of an optimizer that averages itself are those to use; others are left alone."""
    if averages_itself(optimizer):
        optimizer.eval()


def why_no_8bit(device: torch.device) -> str:
    """Return "" where bitsandbytes' 8-bit AdamW takes a step on `device`, else the reason it does not."""
    return why_not("adamw8bit", device)


def why_not(kind: str, device: torch.device) -> str:
    """Return "" where an optimizer of bitsandbytes takes a step on `device`, else the reason it does not."""
    try:
        trial = nn.Parameter(torch.zeros(4096, device=device))
        trial.grad = torch.ones_like(trial)
        _class_of(kind)([trial], lr=1e-3).step()
    except (ImportError, OSError, RuntimeError, AttributeError, NotImplementedError, AssertionError) as error:
        return first_line(error)
    works = bool(trial.detach().isfinite().all() and trial.detach().abs().max() > 0)
    return "" if works else "its step gives nothing, or NaN"


def _class_of(kind: str) -> Callable[..., Optimizer]:
    if kind in _IN_FEW_BITS:
        import bitsandbytes

        made: Callable[..., Optimizer] = getattr(bitsandbytes.optim, _IN_FEW_BITS[kind])
        return made
    if kind == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy
    if kind == "schedule-free":
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree
    known = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor, "lion": Lion}
    return known.get(kind) or _imported(kind)


def _imported(path: str) -> Callable[..., Optimizer]:
    """Return the optimizer class "package.module.Class". Raises ConfigError."""
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # somebody else's module may fail in any way
        raise ConfigError(
            f"optimizer.kind {path!r}: module {module_name!r} cannot be imported ({first_line(error)}); "
            f"install its package, or choose one of {', '.join(OPTIMIZERS)}"
        ) from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        names = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Optimizer)]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        fix = f"did you mean {module_name}.{near[0]}?" if near else "it has no optimizers at all"
        raise ConfigError(f"optimizer.kind: module {module_name!r} has no optimizer {name!r}; {fix}")
    return found


def _check_factors(optimizer: Optimizer, kind: str) -> None:
    """Raise ConfigError where one that finds the size of its steps is given rates of another optimizer."""
    smallest = min(float(group["lr"]) for group in optimizer.param_groups)
    if step_size(optimizer) is not None and 0 < smallest < _SMALLEST_FACTOR:
        raise ConfigError(
            f"optimizer.kind {kind!r} finds the size of its steps itself and takes learning rates as factors of it; "
            f"at {smallest:g} nothing would be learnt, set the learning rates to about 1"
        )


def _options(
    section: OptimizerSection, kind: str, make: Callable[..., Optimizer], device: torch.device
) -> dict[str, Any]:
    """Return the settings that the optimizer knows, by its own names, and what each kind needs beside them.

    Raises ConfigError where a setting that is not at its default means nothing to it.
    """
    known = inspect.signature(make).parameters
    options = {}
    for setting, name in _SETTINGS.items():
        value = getattr(section, setting)
        if name in known and _alike(known[name].default, value):
            options[name] = value
        elif value != getattr(_DEFAULTS, setting):
            raise ConfigError(
                f"optimizer.{setting} is {value}, and optimizer.kind {section.kind!r} has no such argument; remove it, "
                "or say what you mean in optimizer.arguments"
            )
    if kind == "adamw" and device.type == "cuda":
        options["fused"] = True  # one kernel for all of an adapter's hundreds of small tensors
    if kind == "adafactor":
        # torch multiplies the rate with each tensor's size, at least this: 1 means the learning rate itself, without
        # which LoRA's up matrix, zero at first, would hardly move.
        options["eps"] = (None, 1.0)
    if kind == "prodigy":
        # As its authors advise for diffusion models, and where the rate warms up.
        options |= {"use_bias_correction": True, "safeguard_warmup": True}
    return options


def _alike(default: Any, value: Any) -> bool:
    """Return whether an argument means what the setting does: a number, or as many numbers."""
    if isinstance(value, tuple):
        return isinstance(default, tuple | list) and len(default) == len(value)
    return isinstance(default, int | float) and not isinstance(default, bool)


def _checked_arguments(section: OptimizerSection, make: Callable[..., Optimizer]) -> dict[str, Any]:
    """Return optimizer.arguments. Raises ConfigError where the optimizer has no such argument."""
    parameters = inspect.signature(make).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return section.arguments
    known = [name for name in parameters if name not in ("params", "lr")]
    for name in section.arguments:
        if name not in known:
            raise ConfigError(
                f"optimizer.arguments: {section.kind!r} has no argument {name!r}; it has {', '.join(known)}"
            )
    return section.arguments


def _try_out(factory: OptimizerFactory, kind: str, device: torch.device) -> None:
    """The optimizer has taken a step and saved its state. Raises ConfigError where it cannot."""
    trial = nn.Parameter(torch.zeros(64, 64, device=device))
    trial.grad = torch.ones_like(trial)
    optimizer = factory([{"params": [trial], "lr": _TRIAL_RATE}])
    try:
        optimizer.step()
        eval_mode(optimizer)
        saved = io.BytesIO()
        torch.save(optimizer.state_dict(), saved)
        saved.seek(0)
        torch.load(saved, weights_only=True)
    except Exception as error:  # somebody else's class: whatever it says is about the settings it was given
        raise ConfigError(
            f"optimizer.kind {kind!r} cannot train here with these optimizer.arguments: {first_line(error)}"
        ) from error
    if not bool(trial.detach().isfinite().all()):
        raise ConfigError(f"optimizer.kind {kind!r} gives NaN on {device} with these optimizer.arguments")

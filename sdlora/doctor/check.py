"""`Check`: one finding about this machine or installation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "problem"]
GIB = 2**30
TORCH_BUILDS = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Check:
    """One finding. `note`: works, but less well than it could; `problem`: something sdlora is for will fail."""

    name: str
    state: State
    value: str
    meaning: str
    fix: str = ""
    """What to do about it; empty only where the state is ok."""


def sentence(error: Exception) -> str:
    """Return the error's kind and its first line."""
    line = (str(error).strip().splitlines() or ["no reason given"])[0]
    return f"{type(error).__name__}: {line[:300]}"


def failed(name: str, error: Exception) -> Check:
    """Return the finding that an examination ended in `error`; SDLORA_DEBUG=1 raises the error instead."""
    if os.environ.get("SDLORA_DEBUG"):
        raise error
    fix = (
        "mend the problems above first; else install sdlora's requirements again (pip install --force-reinstall -e .), "
        "and report what SDLORA_DEBUG=1 sdlora doctor shows"
    )
    return Check(name, "problem", "failed", sentence(error), fix)

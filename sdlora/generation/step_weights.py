"""How strongly an adapter acts at each step of a picture."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NUMBER = r"\d+(?:\.\d*)?|\.\d+"
_RANGE = re.compile(rf"\s*({_NUMBER})?\s*-\s*({_NUMBER})?\s*")
_CHANGE = re.compile(rf"\s*(-?(?:{_NUMBER}))\s*@\s*({_NUMBER})\s*")


@dataclass(frozen=True)
class When:
    """A step, or with `fraction` a part of all steps."""

    value: float
    fraction: bool

    def step(self, steps: int) -> float:
        """Return the step that it is, counted from 1; 0 is before the first."""
        return self.value * steps if self.fraction else self.value


@dataclass(frozen=True)
class StepWeights:
    """Factors of an adapter's weight, each from after a step on until the next; before the first 0."""

    changes: tuple[tuple[When, float], ...]

    def at(self, step: int, steps: int) -> float:
        """Return the factor at a step, counted from 1."""
        factor = 0.0
        for when, value in self.changes:
            if step > when.step(steps):
                factor = value
        return factor


def parse_step_weights(text: str) -> StepWeights:
    """Return the factors that a text names; a number with a point is a fraction of all steps.

    "5-20": whole from step 5 to step 20, else not at all; "5-" and "-20" with one end. "1@0, 0.5@8, 0@0.8": a factor
    of 1 at first, half after step 8, none after 80 % of the steps. Raises ValueError for anything else,
    and for a range that ends before it begins.
    """
    if (ends := _RANGE.fullmatch(text)) and (ends[1] or ends[2]):
        first = _when(ends[1] or "0")
        last = _when(ends[2]) if ends[2] else None
        if last and last.fraction == first.fraction and last.value < first.value:
            raise ValueError(f"{text!r} ends before it begins")
        begin = When(first.value if first.fraction else first.value - 1, first.fraction)
        return StepWeights(((begin, 1.0), *(((last, 0.0),) if last else ())))
    changes = [_CHANGE.fullmatch(item) for item in text.split(",")]
    if not all(changes):
        raise ValueError('expected a range such as "5-20" or "0.2-0.8", or "1@0, 0.5@8"')
    return StepWeights(tuple((_when(found[2]), float(found[1])) for found in changes if found))


def _when(text: str) -> When:
    return When(float(text), "." in text)

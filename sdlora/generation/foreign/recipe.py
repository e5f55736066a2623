"""`ForeignRecipe`: what the metadata of another program's picture say, in terms of a request."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdlora.errors import FormatError, first_line

LONGEST_PROMPT = 100_000
_SPECIAL = re.compile(r"[\\()\[\]{}]")
_WORD = re.compile(r"\b(B(?=REAK\b)|A(?=ND\b))")
_TAG = re.compile(r"<(?=\w+:)")
_BARE_BRACE = re.compile(r"(?<!\\)((?:\\\\)*)([{}])")


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter as another program calls it."""

    name: str
    weight: float = 1.0
    text_encoder_weight: float | None = None
    """None: as `weight`."""
    hashes: tuple[str, ...] = ()
    """Beginnings of hashes of any kind, the surest first."""
    embedding: bool = False
    """Whether it acts by its word in the prompts."""
    blocks: str = ""
    """What its weight is multiplied by in each block; not checked yet."""
    steps: str = ""
    """When it acts; not checked yet."""


@dataclass(frozen=True)
class ForeignRecipe:
    """What made a picture, as far as it is understood."""

    program: str
    prompt: str
    """In the language of requests, without tags."""
    negative_prompt: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """By the names of a request's settings; not checked yet."""
    base: str = ""
    base_hash: str = ""
    adapters: tuple[ForeignAdapter, ...] = ()
    left_out: tuple[str, ...] = ()
    """What cannot be carried over, a few words each."""


def parse_object(text: str, what: str) -> dict[str, Any]:
    """Return the object that JSON text is. Raises FormatError, without a file's name, for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} cannot be read as JSON ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{what} holds no JSON object")
    return value


def as_number(value: object) -> float | None:
    """Return a finite number, from JSON or in digits; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_integer(value: object) -> int | None:
    """Return a whole number, exactly; None for anything else. Seeds have more digits than a float keeps."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,30}\s*", value):
        return int(value)
    number = as_number(value)
    return int(number) if number is not None and number.is_integer() else None


def as_text(value: object) -> str:
    """Return a text of bearable length; "" for what is none."""
    return value[:LONGEST_PROMPT] if isinstance(value, str) else ""


# --- prompts -----------------------------------------------------------------------------------------


def without_choices(prompt: str) -> str:
    r"""Return a prompt of AUTOMATIC1111's language in which nothing is chosen or looked up any more.

    What was made of {a|b} may look like another choice or tag: backslashes, which the language drops, make it text.
    """
    braces = _BARE_BRACE.sub(r"\1\\\2", prompt) if "{" in prompt and "|" in prompt else prompt
    return _TAG.sub(r"<\\", braces)


def weighted_prompt(segments: Sequence[tuple[str, float]]) -> str:
    """Return a prompt that says these texts with these weights, and nothing else of the language."""
    joined: list[tuple[str, float]] = []
    for text, weight in segments:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        elif text:
            joined.append((text, weight))
    return "".join(literal(text) if weight == 1 else f"({literal(text)}:{_short(weight)})" for text, weight in joined)


def literal(text: str) -> str:
    """Return a prompt that says this text, character by character."""
    bare = _SPECIAL.sub(lambda match: f"\\{match[0]}", text)
    return _TAG.sub(r"<\\", _WORD.sub(r"\1\\", bare))


def _short(weight: float) -> str:
    return f"{max(-1000.0, min(1000.0, weight)):.4f}".rstrip("0").rstrip(".")

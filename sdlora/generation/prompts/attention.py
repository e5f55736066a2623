"""Weights in brackets, BREAK and AND: the parts of a prompt, and how strongly each counts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sdlora.families.traits import BREAK_SEGMENT

_ROUND, _SQUARE = 1.1, 1 / 1.1
_DEEPEST, _LARGEST = 256, 1e6
_ATTENTION = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?[.0-9]+)\s*\)|\)|]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\bBREAK\b")
_AND = re.compile(r"\bAND\b")
_AND_WEIGHT = re.compile(r":\s*([-+]?(?:[0-9]+\.?|[0-9]*\.[0-9]+))\s*\Z")
_NUMBER = re.compile(r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)\s*")


def parse_attention(text: str) -> list[tuple[str, float]]:
    r"""Return the text in segments, each with the weight of its tokens; ("BREAK", -1) ends a chunk.

    (a) weighs 1.1, [a] 1 / 1.1, (a:1.3) what it says, nested brackets their product; \( \) \[ \] and \\ are the bare
    characters; brackets that are never closed act to the end. Every weight is finite. Neighbours of one weight are
    one segment.
    """
    segments: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for match in _ATTENTION.finditer(text):
        token, number = match[0], match[1]
        if token.startswith("\\"):
            segments.append((token[1:], 1.0))
        elif token in opened and len(opened[token]) < _DEEPEST:
            opened[token].append(len(segments))
        elif number is not None and opened["("]:
            if (weight := finite_number(number)) is None:
                segments.append((token[:-1], 1.0))
            _weigh(segments, opened["("].pop(), _ROUND if weight is None else weight)
        elif token == ")" and opened["("]:
            _weigh(segments, opened["("].pop(), _ROUND)
        elif token == "]" and opened["["]:
            _weigh(segments, opened["["].pop(), _SQUARE)
        else:
            segments += _broken(token)
    for bracket, weight in (("(", _ROUND), ("[", _SQUARE)):
        for start in opened[bracket]:
            _weigh(segments, start, weight)
    return _joined(segments)


def _broken(text: str) -> list[tuple[str, float]]:
    """Return a text with the words BREAK, and the space around them, as segments."""
    first, *others = _BREAK.split(text)
    if not others:
        return [(text, 1.0)]
    segments = [(first.rstrip(), 1.0)]
    for number, part in enumerate(others, start=1):
        last = number == len(others)
        segments += [BREAK_SEGMENT, (part.lstrip() if last else part.strip(), 1.0)]
    return segments


def _weigh(segments: list[tuple[str, float]], start: int, weight: float) -> None:
    """All segments from `start` on weigh so many times as much."""
    for place in range(start, len(segments)):
        if segments[place] != BREAK_SEGMENT:
            text, before = segments[place]
            segments[place] = (text, max(-_LARGEST, min(_LARGEST, before * weight)))


def _joined(segments: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Return the segments with neighbours of one weight joined."""
    joined: list[tuple[str, float]] = []
    for text, weight in segments:
        segment = (text, weight)
        if joined and joined[-1][1] == weight and BREAK_SEGMENT not in (segment, joined[-1]):
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append(segment)
    return joined or [("", 1.0)]


def finite_number(text: str) -> float | None:
    """Return the finite number that the text is, None where it is none, such as 1.2.3 or 0,8."""
    value = float(text) if _NUMBER.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Composed:
    """One of the prompts between ANDs, and how strongly it guides."""

    text: str
    weight: float = 1.0


def parse_composition(text: str) -> list[Composed]:
    """Return the prompts that stand between the words AND, each without its `:weight` at the end, which is 1 if left out.

    The picture is guided by the sum of weight * (prompt - negative prompt).
    """
    parts, found = _AND.split(text), []
    if len(parts) == 1:  # where a text ends like "ratio 16:9" without any AND, it is no weight
        return [Composed(text)]
    for part in parts:
        stripped = part.rstrip()
        match = _AND_WEIGHT.search(stripped)
        weight = finite_number(match[1]) if match else None
        if match and weight is not None:
            found.append(Composed(stripped[: match.start()].rstrip(), weight))
        else:
            found.append(Composed(stripped))
    return found

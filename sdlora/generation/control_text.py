"""How a ControlNet is written where there is only text: MODEL IMAGE [STRENGTH [START-END]]."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from sdlora.errors import ConfigError

_EXPECTED = "expected MODEL IMAGE, and perhaps STRENGTH and START-END, such as 0.8 0-0.6"
_SPAN = re.compile(r"(\d*\.?\d+)-(\d*\.?\d+)")
_FEWEST, _MOST = 2, 4


def parse_control(words: Sequence[str]) -> dict[str, object]:
    """Return the fields of a `ControlChoice` that the words say. Raises ConfigError for too few or too many, or for no numbers."""
    told = " ".join(words)[:120]
    if not _FEWEST <= len(words) <= _MOST:
        raise ConfigError(f"control is {told!r}; {_EXPECTED}")
    control: dict[str, object] = {"model": words[0], "image": words[1]}
    for word in words[_FEWEST:]:
        if span := _SPAN.fullmatch(word):
            more: dict[str, object] = {"start": float(span[1]), "end": float(span[2])}
        else:
            more = {"strength": _number(word, told)}
        if more.keys() & control.keys():
            raise ConfigError(f"control is {told!r}, which says {next(iter(more))} twice; {_EXPECTED}")
        control |= more
    return control


def split_control(text: str) -> dict[str, object]:
    """Return the same of one text, in which names with spaces are in quotes. Raises ConfigError as `parse_control` does."""
    parts = shlex.shlex(text, posix=True, punctuation_chars=False)
    parts.whitespace_split, parts.commenters, parts.escape = True, "", ""  # a backslash parts folders on Windows
    try:
        return parse_control(list(parts))
    except ValueError as error:
        raise ConfigError(f"control is {text[:120]!r}, which has a quote that is not closed; {_EXPECTED}") from error


def _number(word: str, told: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ConfigError(f"control is {told!r}, in which {word!r} is no strength; {_EXPECTED}") from None

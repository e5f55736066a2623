"""Texts as words of the index, which finds what words begin with, and in scripts without spaces any characters in a row."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

_SPACELESS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Characters of scripts that put no spaces between words, from Thai and Burmese to Chinese."""
_OF_OTHERS = re.compile(rf"[^{_SPACELESS.pattern[1:-1]}]+")
_VOWEL_SIGNS = "".join(chr(code) for code in range(0x900, 0x1900) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
_WORD = re.compile(rf"[\w{_VOWEL_SIGNS}]+")
_PAIR, _LOW_LINE = "\ue000", "\ue001"
"""What marks two characters in a row, and what stands for _ among them, which parts words: no word has either."""
TOKENIZER = "ascii"
"""Of the index: it parts words at spaces and at _; case is folded here."""


def indexed(text: str) -> str:
    """Return what stands in the index for a text: its words, and of those in a script without spaces all pairs of characters.

    A pair is a word of its own, and so is the last character: 猫が is "猫が" and "が", each with a mark. So pairs in a row
    are characters in a row, and characters that something else parts are not.
    """
    words = _WORD.findall(folded(text))
    return " ".join(part for word in words for part in (_parts(word) if _SPACELESS.search(word) else [word]))


def _parts(word: str) -> list[str]:
    return [*_pairs(word), _PAIR + word[-1].replace("_", _LOW_LINE), *_OF_OTHERS.findall(word)]


def _pairs(word: str) -> list[str]:
    return [f"{_PAIR}{one}{next_one}" for one, next_one in pairwise(word.replace("_", _LOW_LINE))]


def asked(text: str) -> Sequence[str]:
    """Return for each word of a search what the index is to have, as FTS5 says it: the beginning of a word, or pairs in a row.

    What is nothing but punctuation, _ too, is no word.
    """
    return [_asked(word) for word in dict.fromkeys(_WORD.findall(folded(text))) if word.strip("_")]


def _asked(word: str) -> str:
    if not _SPACELESS.search(word):
        return f'"{word}"*'
    return f'"{" ".join(_pairs(word))}"' if len(word) > 1 else f'"{_PAIR}{word}"*'


def folded(text: str) -> str:
    """Return the text as it is searched: without regard to case and accents."""
    parts = unicodedata.normalize("NFKD", text).casefold()
    return utf8("".join(character for character in parts if not unicodedata.combining(character)))


def utf8(text: str) -> str:
    """Return the text with a question mark for what UTF-8 has no bytes for."""
    return text.encode("utf-8", "replace").decode()

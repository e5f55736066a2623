"""Prompts with choices: {a|b|c} and __file__, drawn anew for each picture, from its seed alone.

Spelt as in the Dynamic Prompts extension: choices with weights, several at once, files and patterns of files, one within the
other. Its variables and comments are not known. What does not parse, and a file that is not there, is text.
"""

from __future__ import annotations

import fnmatch
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdlora.errors import ConfigError

_FILE = re.compile(r"__(?!\s)((?:(?!__)[^{}|,\n]){1,200})(?<!\s)__")
_WEIGHT = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})::")
_COUNT = re.compile(r"\s*([0-9]{1,4})?\s*(?:(-)\s*([0-9]{1,4})?)?\s*\Z")
_OPEN, _CLOSE = re.compile(r"(?<!\\)\["), re.compile(r"(?<!\\)\]")
_JOINED_BY = ", "
_DEEPEST = 32
_LONGEST, _MOST_CHOICES = 100_000, 10_000
"""Of a prompt, what is made of it and how often something is chosen for it: a file may name itself twice in a line."""
_MOST_PICKED = 1000


@dataclass(frozen=True)
class Wildcards:
    """The lines of text files by name: "colours", in a subfolder "animals/birds"."""

    lines: Mapping[str, Sequence[str]]

    def matching(self, name: str) -> list[str]:
        """Return the lines of all files that the name, or pattern with * and ?, is for; none for an unknown one."""
        names = [name] if name in self.lines else fnmatch.filter(sorted(self.lines), name)
        return [line for found in names for line in self.lines[found]]


NO_WILDCARDS = Wildcards({})


def read_wildcards(folder: Path) -> Wildcards:
    """Return the .txt files below a folder, one choice a line; empty lines and those that begin with # do not count.

    Raises ConfigError where the folder or a file cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder; wildcards are .txt files in it, one choice a line")
    lines = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() != ".txt" or file.name.startswith(".") or not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: cannot be read as text in UTF-8; save it so") from error
        stripped = (line.strip() for line in text.splitlines())
        lines[file.relative_to(folder).with_suffix("").as_posix()] = [
            line for line in stripped if line and not line.startswith("#")
        ]
    return Wildcards(lines)


def expand_wildcards(text: str, seed: int, wildcards: Wildcards = NO_WILDCARDS) -> str:
    """Return the prompt with every choice made; the same text, seed and files give the same prompt.

    {a|b} is one of them, {3::a|b} the first three times as often, {2$$a|b|c} two different ones joined by ", ",
    {1-2$$ and $$a|b} one or two joined by " and "; __colours__ is a line of that file, {2$$__colours__} are two
    different ones. Choices may hold choices. Braces without "|" are text, and so are \\{ and \\}.
    """
    if "{" not in text and "__" not in text:  # as most are, where a batch has thousands
        return text
    return _Expansion(seed, wildcards).expand(text, 0)


class _Expansion:
    """The choices of one prompt."""

    def __init__(self, seed: int, wildcards: Wildcards) -> None:
        self._draw, self._wildcards = random.Random(seed), wildcards
        self._choices = 0

    def expand(self, text: str, depth: int) -> str:
        """Return the text with its choices made, as far as there is an end to them."""
        if depth > _DEEPEST or len(text) > _LONGEST or self._choices > _MOST_CHOICES:
            return text
        made: list[str] = []
        place = 0
        for start, end in _braces(text):
            made.append(self._lines(text[place:start], depth))
            made.append(self._choose(text[start + 1 : end - 1], depth))
            place = end
        made.append(self._lines(text[place:], depth))
        return "".join(made)[:_LONGEST]

    def _lines(self, text: str, depth: int) -> str:
        """Return the text with a line in place of every __file__."""

        def one_line(match: re.Match[str]) -> str:
            lines = self._wildcards.matching(match[1])
            if not lines:
                return match[0]
            self._choices += 1
            return self.expand(self._draw.choice(lines), depth + 1)

        return _FILE.sub(one_line, text)

    def _choose(self, inside: str, depth: int) -> str:
        """Return what stands for {inside}."""
        fewest, most, separator, body = _count(inside)
        options = _split(body)
        file = _FILE.fullmatch(body.strip()) if len(options) == 1 and body is not inside else None
        if file:
            options = self._wildcards.matching(file[1])
        if not options or (len(options) == 1 and not file):
            return "{" + self.expand(inside, depth + 1) + "}"
        self._choices += 1
        weighted = [_with_weight(option) for option in options]
        picked = _pick(weighted, self._draw.randint(fewest, max(fewest, most)), self._draw)
        return separator.join(self.expand(option, depth + 1) for option in picked)


def _with_weight(option: str) -> tuple[str, float]:
    """Return an option and how often it comes, which may stand before it: "3::red"."""
    match = _WEIGHT.match(option)
    return (option[match.end() :], float(match[1])) if match else (option, 1.0)


def _pick(weighted: Sequence[tuple[str, float]], count: int, draw: random.Random) -> list[str]:
    """Return so many different options, as often as their weights say, in random order."""
    left = [(text, weight) for text, weight in weighted if weight > 0]
    picked: list[str] = []
    while left and len(picked) < count:
        (found,) = draw.choices(range(len(left)), [weight for _, weight in left])
        picked.append(left.pop(found)[0])
    return picked


def _count(inside: str) -> tuple[int, int, str, str]:
    """Return (fewest, most, separator, the options' text) of what stands in braces."""
    head, mark, rest = inside.partition("$$")
    match = _COUNT.match(head) if mark else None
    if not match or not any(match.groups()):
        return 1, 1, _JOINED_BY, inside
    first, dash, last = match.groups()
    fewest = int(first or 1)
    most = int(last or _MOST_PICKED) if dash else fewest
    separator, again, options = rest.partition("$$")
    if not again or "|" in separator or "{" in separator:
        separator, options = _JOINED_BY, rest
    return min(fewest, _MOST_PICKED), min(most, _MOST_PICKED), separator, options


def _braces(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the outermost well-formed braces."""
    opened: list[int] = []
    closed: list[tuple[int, int]] = []
    for place, character in enumerate(text):
        if _escaped(text, place):
            continue
        if character == "{":
            opened.append(place)
        elif character == "}" and opened:
            start = opened.pop()
            while closed and closed[-1][0] > start:
                closed.pop()
            closed.append((start, place + 1))
    yield from closed


def _escaped(text: str, place: int) -> bool:
    """Return whether a brace is a bare character, which a backslash before it makes it."""
    start = place
    while start and text[start - 1] == "\\" and text[place] in "{}":
        start -= 1
    return (place - start) % 2 == 1


def _split(text: str) -> list[str]:
    """Return the text in parts between those "|" that stand in no further brackets, as those of [a|b] do."""
    parts, start, braces, squares = [], 0, 0, 0
    square_pairs = len(_OPEN.findall(text)) == len(_CLOSE.findall(text))  # a lone one is text
    for place, character in enumerate(text):
        escaped = place > 0 and text[place - 1] == "\\"
        if not _escaped(text, place):
            braces += (character == "{") - (character == "}")
        if square_pairs and not escaped:
            squares = max(0, squares + (character == "[") - (character == "]"))
        if character == "|" and not braces and not squares:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]

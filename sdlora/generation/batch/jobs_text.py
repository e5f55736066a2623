"""Jobs as lines of text: a prompt, or a prompt with options as AUTOMATIC1111 and kohya's scripts take them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdlora.generation.batch.faults import Faults
from sdlora.generation.batch.job_draft import Draft, file_text
from sdlora.generation.batch.job_fields import by_field

_OPTION = re.compile(r"(?:(?<=\s)|^)--([A-Za-z][\w-]*)(?:\s+|=|$)")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"(?=\s|$)|' + r"'([^']*)'(?=\s|$)")
_ESCAPED = re.compile(r'\\(["\\])')


def read_text_jobs(path: Path, faults: Faults) -> Iterator[Draft]:
    """Yield the jobs of a .txt file, one a line; empty lines and those that begin with # do not count."""
    for number, line in enumerate(file_text(path).splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            where = f"{path}:{number}"
            with faults.of(where):
                yield Draft(where, parse_line(line))


def parse_line(line: str) -> dict[str, Any]:
    """Return {setting: value} of 'a cat --n blurry --w 512 --d 7' or '--prompt "a cat" --steps 20 --cfg_scale 7'.

    A value reaches up to the next option; in quotes it may hold anything, with \\" for a quote. Raises ConfigError for
    unknown options.
    """
    text, pairs = line.strip(), list[tuple[str, str]]()
    name, start = "prompt", 0
    while True:
        quoted = _QUOTED.match(text, start) if start else None
        start = quoted.end() if quoted else start
        option = _OPTION.search(text, start)
        rest = text[start : option.start() if option else len(text)].strip()
        value = f"{_unquoted(quoted)} {rest}".strip() if quoted else rest
        if pairs or start or value:
            pairs.append((name, value))
        if option is None:
            return by_field(pairs)
        name, start = option[1], option.end()


def _unquoted(match: re.Match[str]) -> str:
    return match[2] if match[1] is None else _ESCAPED.sub(r"\1", match[1])

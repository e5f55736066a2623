"""What is asked of a history, and what it answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sdlora.errors import ConfigError
from sdlora.generation.history.row import folded

_HASH = re.compile(r"[0-9a-f]{6,64}")
_MOST_WORDS, _LONGEST_TEXT = 32, 1000
_SPACELESS = re.compile(r"[\u0e00-\u0eff\u2e80-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Characters of scripts that put no spaces between words: such words are looked for anywhere."""
_LARGEST = 2**62
_LATEST_NS = 2**63 - 1
"""What SQLite holds; the year 2262."""


@dataclass(frozen=True)
class HistoryEntry:
    """A picture of a history."""

    path: Path
    made: datetime
    """Time of the file."""
    program: str
    prompt: str
    negative_prompt: str
    seed: int | None
    steps: int | None
    guidance_scale: float | None
    width: int
    height: int
    base: str
    adapters: Sequence[tuple[str, float]]
    """(name, weight)."""
    stars: int
    """1 to 5, 0 where it was not rated."""


@dataclass(frozen=True)
class HistoryQuery:
    """What pictures are asked for; see `History.search`."""

    prompt: str = ""
    negative_prompt: str = ""
    adapter: str = ""
    base: str = ""
    seed: int | None = None
    since: datetime | None = None
    until: datetime | None = None
    rating: int | None = None
    limit: int | None = 50
    offset: int = 0


@dataclass(frozen=True)
class Selection:
    """A query as SQL."""

    sql: str
    values: tuple[object, ...]


def selection(query: HistoryQuery) -> Selection:
    """Return the SQL that finds (place, time, facts, stars), the newest first. Raises ConfigError for nonsense."""
    _check(query)
    conditions: list[str] = ["problem = ''"]
    values: list[object] = []

    def add(condition: str, *more: object) -> None:
        conditions.append(condition)
        values.extend(more)

    for column, text in (("prompt", query.prompt), ("negative", query.negative_prompt)):
        for condition, value in _of_words(column, text):
            add(condition, value)
    if query.adapter:
        named, told = _named(query.adapter, ("sha256", "tensor_sha256"))
        add(
            f"pictures.id IN (SELECT picture FROM uses WHERE adapter IN (SELECT id FROM adapters WHERE {named}))", *told
        )
    if query.base:
        named, told = _named(query.base, ("sha256",))
        add(f"base IN (SELECT id FROM bases WHERE {named})", *told)
    if query.seed is not None:
        add("seed = ?", str(query.seed))
    for moment, comparison in ((query.since, ">="), (query.until, "<=")):
        if moment is not None:
            add(f"pictures.id {comparison} ?", _nanoseconds(moment))
    if query.rating == 0:
        add("pictures.identity NOT IN (SELECT identity FROM ratings WHERE stars > 0)")
    elif query.rating is not None:
        add("pictures.identity IN (SELECT identity FROM ratings WHERE stars >= ?)", query.rating)
    limit = _LARGEST if query.limit is None else query.limit
    sql = (
        "SELECT place, pictures.id, facts, (SELECT stars FROM ratings WHERE ratings.identity = pictures.identity) "
        f"FROM pictures WHERE {' AND '.join(conditions)} ORDER BY pictures.id DESC LIMIT ? OFFSET ?"
    )
    return Selection(sql, (*values, limit, query.offset))


def _check(query: HistoryQuery) -> None:
    for name, value, lowest in (("limit", query.limit, 1), ("offset", query.offset, 0)):
        if value is not None and not lowest <= value <= _LARGEST:
            raise ConfigError(f"{name} is {value}; expected {lowest} or more")
    if query.rating is not None and not 0 <= query.rating <= 5:
        raise ConfigError(f"rating is {query.rating}; expected 1 to 5 stars, or 0 for none")
    if query.since and query.until and _nanoseconds(query.since) > _nanoseconds(query.until):
        raise ConfigError(f"since {query.since:%Y-%m-%d %H:%M} is later than until {query.until:%Y-%m-%d %H:%M}")


def _nanoseconds(moment: datetime) -> int:
    """Return the time since 1970, of a moment before or after all files that of the first or last one possible."""
    try:
        return max(-_LATEST_NS, min(_LATEST_NS, int(moment.timestamp() * 1e9)))
    except (ValueError, OverflowError):  # years 1 and 9999, by the time zone
        return _LATEST_NS if moment.year > 1970 else -_LATEST_NS


def _of_words(column: str, text: str) -> list[tuple[str, str]]:
    """Return the conditions that each word of the text stands in a column, those for the index of words as one."""
    if len(text) > _LONGEST_TEXT:
        raise ConfigError(f"a search of {len(text)} characters is too long; give at most {_LONGEST_TEXT}")
    words = re.findall(r"\w+", folded(text))[:_MOST_WORDS]
    anywhere = [word for word in words if _SPACELESS.search(word)]
    found = [(f"instr({column}, ?) > 0", word) for word in anywhere]
    indexed = [f'"{word}"*' for word in words if word not in anywhere]
    if indexed:
        query = f"{column} : ({' AND '.join(indexed)})"
        found.append(("pictures.id IN (SELECT rowid FROM words WHERE words MATCH ?)", query))
    return found


def _named(text: str, hashes: Sequence[str]) -> tuple[str, list[str]]:
    """Return the condition that a name has the text in it, or that a hash begins so; other programs note 10 or 12 digits."""
    wanted = folded(text)[:_LONGEST_TEXT]
    if not _HASH.fullmatch(wanted):
        return "instr(name, ?) > 0", [wanted]
    by_hash = " OR ".join(
        f"instr({column}, ?) = 1 OR (length({column}) >= 8 AND instr(?, {column}) = 1)" for column in hashes
    )
    return f"(instr(name, ?) > 0 OR {by_hash})", [wanted] * (1 + 2 * len(hashes))

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
    """Return the SQL that finds (place, time, facts, stars), the newest first. Raises ConfigError for nonsense.

    The pictures that are shown are chosen by their ids alone, where words are looked for in the index of words, which is
    read from its end only as far as needed.
    """
    _check(query)
    words, anywhere = _words(query)
    by_words = bool(words) and not anywhere
    # A + keeps SQLite from asking the index of words anew for each id of a list.
    table, number, order = ("words", "+rowid", "rowid") if by_words else ("pictures", "id", "id")
    conditions = ["words MATCH ?" if by_words else "problem = ''"]
    values: list[object] = [words] if by_words else []

    def add(condition: str, *more: object) -> None:
        conditions.append(condition)
        values.extend(more)

    def of_picture(condition: str) -> str:
        return f"{number} IN (SELECT id FROM pictures WHERE {condition})" if by_words else condition

    for column, word in anywhere:
        add(f"instr({column}, ?) > 0", word)
    if words and not by_words:
        add("id IN (SELECT rowid FROM words WHERE words MATCH ?)", words)
    if query.adapter:
        named, told = _named(query.adapter, ("sha256", "tensor_sha256"))
        add(f"{number} IN (SELECT picture FROM uses WHERE adapter IN (SELECT id FROM adapters WHERE {named}))", *told)
    if query.base:
        named, told = _named(query.base, ("sha256",))
        add(of_picture(f"base IN (SELECT id FROM bases WHERE {named})"), *told)
    if query.seed is not None:
        add(of_picture("seed = ?"), str(query.seed))
    for moment, comparison in ((query.since, ">="), (query.until, "<=")):
        if moment is not None:
            add(f"{order} {comparison} ?", _nanoseconds(moment))
    if query.rating is not None:
        rated = "IN (SELECT identity FROM ratings WHERE stars >= ?)"
        if query.rating:
            add(of_picture(f"identity {rated}"), query.rating)
        else:
            add(f"NOT {of_picture(f'identity {rated}')}", 1)
    chosen = f"SELECT {order} FROM {table} WHERE {' AND '.join(conditions)} ORDER BY {order} DESC LIMIT ? OFFSET ?"
    sql = (
        "SELECT place, id, facts, (SELECT stars FROM ratings WHERE ratings.identity = pictures.identity) "
        f"FROM pictures WHERE id IN ({chosen}) ORDER BY id DESC"
    )
    return Selection(sql, (*values, _LARGEST if query.limit is None else query.limit, query.offset))


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


def _words(query: HistoryQuery) -> tuple[str, list[tuple[str, str]]]:
    """Return what the index of words is asked, "" for nothing, and [(column, word that stands anywhere in it)]."""
    indexed: list[str] = []
    anywhere: list[tuple[str, str]] = []
    for column, text in (("prompt", query.prompt), ("negative", query.negative_prompt)):
        if len(text) > _LONGEST_TEXT:
            raise ConfigError(f"a search of {len(text)} characters is too long; give at most {_LONGEST_TEXT}")
        for word in re.findall(r"\w+", folded(text))[:_MOST_WORDS]:
            if _SPACELESS.search(word):
                anywhere.append((column, word))
            else:
                indexed.append(f'{column} : "{word}"*')
    return " AND ".join(indexed), anywhere


def _named(text: str, hashes: Sequence[str]) -> tuple[str, list[str]]:
    """Return the condition that a name has the text in it, or that a hash begins so; other programs note 10 or 12 digits."""
    wanted = folded(text)[:_LONGEST_TEXT]
    if not _HASH.fullmatch(wanted):
        return "instr(name, ?) > 0", [wanted]
    by_hash = " OR ".join(
        f"instr({column}, ?) = 1 OR (length({column}) >= 8 AND instr(?, {column}) = 1)" for column in hashes
    )
    return f"(instr(name, ?) > 0 OR {by_hash})", [wanted] * (1 + 2 * len(hashes))

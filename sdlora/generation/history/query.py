"""What is asked of a history, and what it answers."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sdlora.errors import ConfigError
from sdlora.generation.history.words import asked, folded

_HASH = re.compile(r"[0-9a-f]{6,64}")
_MOST_WORDS, _LONGEST_TEXT = 32, 1000
_LARGEST = 2**62
_LATEST_NS = 2**63 - 1
"""What SQLite holds; the year 2262."""
_MANY_USES = 10_000
_RATED = "identity IN (SELECT identity FROM ratings WHERE stars >= ?)"
_Condition = tuple[str, list[object]]
"""As SQL, with the values of its question marks."""


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


Row = tuple[bytes, int, str, int | None]
"""(place, time, facts, stars)."""


def select(connection: sqlite3.Connection, query: HistoryQuery) -> list[Row]:
    """Return the pictures asked for, the newest first. Raises ConfigError for nonsense.

    The pictures that are shown are chosen by their ids alone, where words are looked for in the index of words, which is
    read from its end only as far as needed.
    """
    _check(query)
    words = _words(query)
    # A + keeps SQLite from asking the index of words anew for each id of a list.
    table, number, order = ("words", "+rowid", "rowid") if words else ("pictures", "id", "id")
    conditions: list[_Condition] = [("words MATCH ?", [words]) if words else ("problem = ''", [])]
    if query.adapter:
        conditions.append(_adapter_used(connection, query.adapter, f"{table}.{order}", number))
    if query.since is not None:
        conditions.append((f"{order} >= ?", [_nanoseconds(query.since)]))
    if query.until is not None:
        conditions.append((f"{order} <= ?", [_nanoseconds(query.until)]))
    if query.rating == 0:  # the few that are rated are listed, not the many that are not
        conditions.append((f"{number} NOT IN (SELECT id FROM pictures WHERE {_RATED})", [1]))
    of_pictures = _of_pictures(query)
    if of_pictures and words:
        listed, values = _all_of(of_pictures)
        conditions.append((f"{number} IN (SELECT id FROM pictures WHERE {listed})", values))
    else:
        conditions += of_pictures
    condition, values = _all_of(conditions)
    chosen = f"SELECT {order} FROM {table} WHERE {condition} ORDER BY {order} DESC LIMIT ? OFFSET ?"
    sql = (
        "SELECT place, id, facts, (SELECT stars FROM ratings WHERE ratings.identity = pictures.identity) "
        f"FROM pictures WHERE id IN ({chosen}) ORDER BY id DESC"
    )
    limit = _LARGEST if query.limit is None else query.limit
    return connection.execute(sql, (*values, limit, query.offset)).fetchall()


def _of_pictures(query: HistoryQuery) -> list[_Condition]:
    """Return what the table of pictures alone can tell."""
    conditions: list[_Condition] = []
    if query.base:
        named, told = _named(query.base, ("sha256",))
        conditions.append((f"base IN (SELECT id FROM bases WHERE {named})", told))
    if query.seed is not None:
        conditions.append(("seed = ?", [str(query.seed)]))
    if query.rating:
        conditions.append((_RATED, [query.rating]))
    return conditions


def _adapter_used(connection: sqlite3.Connection, adapter: str, picture: str, number: str) -> _Condition:
    """Return the condition that a picture was made with such an adapter.

    The pictures of adapters that few were made with are listed. Of others the list would take longer than to look each
    picture up until enough are found.
    """
    named, told = _named(adapter, ("sha256", "tensor_sha256"))
    of_them = f"adapter IN (SELECT id FROM adapters WHERE {named})"
    first = f"SELECT count(*) FROM (SELECT 1 FROM uses WHERE {of_them} LIMIT {_MANY_USES})"
    if connection.execute(first, told).fetchone()[0] < _MANY_USES:
        return f"{number} IN (SELECT picture FROM uses WHERE {of_them})", told
    return f"EXISTS (SELECT 1 FROM uses WHERE picture = {picture} AND {of_them})", told


def _all_of(conditions: Sequence[_Condition]) -> _Condition:
    return " AND ".join(condition for condition, _ in conditions), [
        value for _, values in conditions for value in values
    ]


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


def _words(query: HistoryQuery) -> str:
    """Return what the index of words is asked, "" for nothing. Raises ConfigError for what it cannot be asked."""
    conditions: list[str] = []
    for column, text in (("prompt", query.prompt), ("negative", query.negative_prompt)):
        if len(text) > _LONGEST_TEXT:
            raise ConfigError(f"a search of {len(text)} characters is too long; give at most {_LONGEST_TEXT}")
        wanted = asked(text)
        if text.strip() and not wanted:
            raise ConfigError(
                f"a search for {text[:40]!r} has no letter or digit to look for; give a word, or leave it out"
            )
        conditions += [f"{column} : {condition}" for condition in wanted[:_MOST_WORDS]]
    return " AND ".join(conditions)


def _named(text: str, hashes: Sequence[str]) -> _Condition:
    """Return the condition that a name has the text in it, or that a hash begins so; other programs note 10 or 12 digits."""
    wanted = folded(text)[:_LONGEST_TEXT]
    if not _HASH.fullmatch(wanted):
        return "instr(name, ?) > 0", [wanted]
    by_hash = " OR ".join(
        f"instr({column}, ?) = 1 OR (length({column}) >= 8 AND instr(?, {column}) = 1)" for column in hashes
    )
    return f"(instr(name, ?) > 0 OR {by_hash})", [wanted] * (1 + 2 * len(hashes))

"""What a library is asked for, as conditions on its table. Every text is a value there, never a part of the SQL."""

from __future__ import annotations

from dataclasses import dataclass, field

from sdlora.adapters.header_text import as_hash, plain
from sdlora.errors import ConfigError
from sdlora.sharing.library_entry import KINDS
from sdlora.sharing.library_file import folded

UNKNOWN = "unknown"
FAMILIES = ("sd1", "sd2", "sdxl", UNKNOWN)
_SHORTEST_HASH, _LONGEST_TEXT = 6, 1000
_MOST_WORDS = 100
_SEARCHED = ("names", "triggers", "tags", "base")
_HASHES = ("sha256", "data_sha256", "autov1", "claimed", "legacy")


@dataclass(frozen=True)
class Query:
    """Conditions that a file must fulfil, all of them."""

    words: list[str] = field(default_factory=list)
    """Each is in its name, triggers, tags or base, folded."""
    names: list[str] = field(default_factory=list)
    """What a file's name should hold, for it to be the one that stands for its copies; folded."""
    triggers: list[str] = field(default_factory=list)
    """What a file's triggers should hold, likewise."""
    conditions: list[str] = field(default_factory=list)
    values: list[str | bytes] = field(default_factory=list)

    @property
    def sql(self) -> str:
        """What stands behind WHERE."""
        return " AND ".join(["problem = ''", *self.conditions])


def query_of(text: str, *, name: str, trigger: str, family: str, base: str, tag: str, hash: str, kind: str) -> Query:
    """Return the conditions; what is empty is none. Raises ConfigError for what no adapter can be."""
    words, part = list(dict.fromkeys(folded(plain(text, _LONGEST_TEXT)).split())), folded(plain(name))
    if len(words) > _MOST_WORDS:
        raise ConfigError(f"the search has {len(words)} different words; expected at most {_MOST_WORDS}")
    query = Query(words, [*words, part], [*words, folded(plain(trigger))])
    for word in query.words:
        _add(query, " OR ".join(f"instr({column}, ?)" for column in _SEARCHED), *[word] * len(_SEARCHED))
    for column, wanted in (("names", name), ("triggers", trigger), ("tags", tag)):
        if wanted:
            _add(query, f"instr({column}, ?)", folded(plain(wanted)))
    if base:
        digest = as_reference(base)
        _add(query, "instr(base, ?) OR (? != '' AND instr(base_hash, ?) = 1)", folded(plain(base)), digest, digest)
    if family:
        _add(query, "family = ?", "" if _one_of("family", family, FAMILIES) == UNKNOWN else family)
    if kind:
        _add(query, "instr(kinds, ?)", f" {_one_of('kind', kind, KINDS)} ")
    if hash:
        if not (digest := as_reference(hash)):
            raise ConfigError(f"hash is {plain(hash, 80)!r}; expected {_SHORTEST_HASH} or more hexadecimal digits")
        _add_hash(query, digest)
    return query


def query_of_hash(digest: str) -> Query:
    """Return the conditions of files of which a hash of any kind begins so."""
    query = Query()
    _add_hash(query, digest)
    return query


def as_reference(text: str) -> str:
    """Return the hash that a text may be the beginning of, else ""."""
    digest = as_hash(text)
    return digest if len(digest) >= _SHORTEST_HASH else ""


def _add_hash(query: Query, digest: str) -> None:
    _add(query, " OR ".join(f"instr({column}, ?) = 1" for column in _HASHES), *[digest] * len(_HASHES))


def _add(query: Query, condition: str, *values: str) -> None:
    query.conditions.append(f"({condition})")
    query.values.extend(values)


def _one_of(what: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ConfigError(f"{what} is {plain(value, 80)!r}; expected {', '.join(known[:-1])} or {known[-1]}")
    return value

"""`LibraryEntry`: what a library knows of one adapter, whatever its files are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.adapters.formats.detect import EMBEDDING
from sdlora.adapters.header_text import base_of, plain, tags_of, title_of, triggers_of
from sdlora.adapters.inspect import AdapterReport

KINDS = ("lora", "loha", "lokr", "dense", "dora", EMBEDDING)
"""What an adapter may be asked for as. DoRA is one of the first three too."""
_MOST_WORDS, _MOST_PROBLEMS, _LONGEST_PROBLEM = 100, 20, 300


@dataclass(frozen=True)
class Facts:
    """What the content of an adapter tells; texts are plain and short."""

    title: str
    """What it calls itself."""
    triggers: Sequence[str]
    words: Sequence[str]
    """New words that come with it."""
    family: str
    """"sd1", "sd2", "sdxl", or "" where it does not tell."""
    format: str
    kinds: Mapping[str, int]
    """Layers of each kind, as in `AdapterReport`."""
    rank: int | list[int] | None
    modules: Mapping[str, int]
    base: str
    """Name of the base that it was trained on, "" where it does not tell."""
    base_hash: str
    tags: Mapping[str, int]
    """How often each tag stood in the captions, the commonest first."""
    bytes: int
    problems: Sequence[str]
    """What keeps it from being used."""

    def kind_names(self) -> list[str]:
        """Return those of KINDS that it is."""
        names = {name for kind in self.kinds for name in kind.split()}
        return [kind for kind in KINDS if kind in names or kind == self.format]


@dataclass(frozen=True)
class LibraryEntry:
    """One adapter of a library: one content, in one file or several."""

    id: str
    """SHA-256 of the file, or of a folder of PEFT's as `adapter_hashes` has it; "" where it was not computed yet."""
    name: str
    """The first of its paths from the library's folder on, without suffix."""
    paths: Sequence[Path]
    """All files, or folders of PEFT's, that hold this content, those first whose names have what was asked for."""
    autov3: str
    autov1: str
    modified: float
    """Seconds since 1970, the latest of its files."""
    facts: Facts

    @property
    def autov2(self) -> str:
        """First 10 digits of the id, as other programs show whole files."""
        return self.id[:10]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data, which UTF-8 can hold whatever files are called."""
        paths = [str(path).encode("utf-8", "replace").decode() for path in self.paths]
        own = {"id": self.id, "name": self.name, "paths": paths, "autov1": self.autov1, "autov2": self.autov2}
        return {**own, "autov3": self.autov3, "modified": self.modified, **vars(self.facts)}


@dataclass(frozen=True)
class RefusedFile:
    """A file of a library that is no adapter, and why."""

    path: Path
    problem: str


def facts_of(report: AdapterReport) -> Facts:
    """Return what a report on a header tells of the adapter's content, every text of the file's made plain."""
    base, base_hash = base_of(report.metadata)
    return Facts(
        title=title_of(report.metadata),
        triggers=triggers_of(report.metadata),
        words=[word for token in report.tokens[:_MOST_WORDS] if (word := plain(token))],
        family=report.family,
        format=report.format,
        kinds=report.kinds,
        rank=report.rank,
        modules=report.modules,
        base=base,
        base_hash=base_hash,
        tags=tags_of(report.metadata),
        bytes=report.bytes,
        problems=[plain(problem, _LONGEST_PROBLEM) for problem in report.problems[:_MOST_PROBLEMS]],
    )

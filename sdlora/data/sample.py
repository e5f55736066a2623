"""What a data set is made of: concepts, and their samples."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sdlora.config import ConceptSection
from sdlora.data.captions import plain_caption


@dataclass(frozen=True, eq=False)
class Concept:
    """One subject or style, with the settings that hold for its pictures; two are equal if they are the same object."""

    name: str
    settings: ConceptSection
    prior: bool = False
    """Whether its pictures show other things, for prior preservation."""


class RowReader(Protocol):
    """A table of pictures, too large for the memory; several threads may read."""

    def read(self, row: int) -> bytes:
        """Return the picture file in row `row` (0, 1, 2, ...). Rising numbers are fast. Raises DataError."""
        ...

    def stamp(self, row: int) -> str:
        """Return a text that is another one once the row's picture is; "" where nothing tells."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture and the text it is trained with."""

    path: Path
    """Its file; of a row in a table, a name for messages: the table's path, "#" and the row."""
    lines: tuple[str, ...]
    """The caption, or the captions of which one is drawn each time; the trigger is filled in."""
    concept: Concept
    mask: Path | None = None
    train_size: tuple[int, int] | None = None
    """Width and height that the data set itself prescribes, in pixels."""
    rows: RowReader | None = None
    row: int = 0

    @property
    def prior(self) -> bool:
        """Whether it shows something else, for prior preservation."""
        return self.concept.prior

    @property
    def caption(self) -> str:
        """The caption with nothing left to chance."""
        settings = self.concept.settings
        return plain_caption(self.lines, settings.captions, settings.trigger)

    def source(self) -> Path | io.BytesIO:
        """Return what the picture can be opened from; samples of one table in their order."""
        return self.path if self.rows is None else io.BytesIO(self.rows.read(self.row))

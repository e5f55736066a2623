"""WebDataset archives: tar files in which a picture and its caption follow one another under one name.

They are read with the standard library. Listing reads the headers and the captions and skips the pictures,
and where each picture lies is kept, so that any can be read at once. The `datasets` library (5.2) would read
every picture to list the captions, and refuses archives whose first samples differ in what they hold.
"""

from __future__ import annotations

import json
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO

from sdlora.config import ConceptSection
from sdlora.data.layouts.columns import Kind, caption_column, caption_lines
from sdlora.data.layouts.listing import PICTURE_SUFFIXES
from sdlora.data.layouts.origin import Origin, Row
from sdlora.errors import DataError, first_line

_LOOKED_AT = 64
"""So many samples show what the archive holds."""
_TEXT_FIELDS = {"txt", "text", "caption", "captions", "prompt", "prompts", "description"}
_AHEAD = 8 << 20
"""Bytes that are fetched at once from an archive over the network."""
_LONGEST_TEXT = 1 << 24


@dataclass
class _Sample:
    """The members of one name: of each ending, where its data begin, and how many bytes they are."""

    name: str
    fields: dict[str, tuple[int, int]] = field(default_factory=dict)


class Archive:
    """One tar file of a data set: its samples, and the picture of each. Not for several threads at once."""

    def __init__(self, origin: Origin, settings: ConceptSection) -> None:
        """Open the archive and find out what it holds. Raises DataError."""
        self._origin = origin
        self._settings = settings
        self._errors: tuple[type[Exception], ...] = (tarfile.TarError, EOFError, *origin.errors)
        self._file: BinaryIO | None = None
        self._offsets, self._sizes = array("q"), array("q")
        try:
            first = self._first_samples()
            if not any(self._picture_of(sample) for sample in first):
                raise DataError(f"{origin.name}: holds no pictures in its first members; {self._wanted()}")
            self._caption = self._caption_field(first)
        except self._errors as error:
            self.close()
            raise DataError(
                f"{origin.name}: cannot be read as a tar archive ({first_line(error)}); fetch it again, and unpack .gz"
            ) from error

    @property
    def rows(self) -> int:
        """The number of samples listed so far."""
        return len(self._offsets)

    def list_rows(self, problems: list[str]) -> Iterator[Row]:
        """Yield the samples that have a picture, with their captions; the others are problems."""
        try:
            for sample in self._samples(problems):
                place = self._picture_of(sample)
                if place is None:
                    problems.append(
                        f"{self._origin.name}: {sample.name} ({', '.join(sample.fields)}) has no picture directly "
                        "before or after it; pack the files in the order of their names"
                    )
                    continue
                lines = self._lines(sample, problems)
                self._offsets.append(place[0])
                self._sizes.append(place[1])
                yield Row(len(self._offsets) - 1, sample.name.removeprefix("./"), lines)
        except self._errors as error:
            problems.append(f"{self._origin.name}: cannot be read to its end ({first_line(error)}); fetch it again")
        finally:
            self.close()

    def picture(self, row: int) -> bytes:
        """Return the picture file of a sample. Raises DataError."""
        try:
            data = self._bytes(self._offsets[row], self._sizes[row])
        except self._errors as error:
            self.close()
            raise DataError(f"{self._origin.name}#{row}: cannot be read ({first_line(error)})") from error
        if len(data) < self._sizes[row]:
            raise DataError(f"{self._origin.name}#{row}: the archive ends within this picture; fetch it again")
        return data

    def close(self) -> None:
        """Let go of the file; it is opened again when it is needed."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _open(self) -> BinaryIO:
        if self._file is None:
            self._file = self._origin.open(_AHEAD)
        return self._file

    def _bytes(self, offset: int, size: int) -> bytes:
        file = self._open()
        file.seek(offset)
        return file.read(size)

    def _first_samples(self) -> list[_Sample]:
        """Return samples that show what the archive holds; damage after them is found in listing."""
        first: list[_Sample] = []
        try:
            first.extend(islice(self._samples([]), _LOOKED_AT))
        except self._errors:
            if not first:
                raise
        return first

    def _samples(self, problems: list[str]) -> Iterator[_Sample]:
        """Yield the samples in order. What is damaged or cut off ends them with an EOFError."""
        sample = _Sample("")
        file = self._open()
        end = file.seek(0, 2)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # they would pile up
                if not member.isreg() or not (parts := re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", member.name)):
                    continue
                name, ending = parts[1], parts[2].lower()
                if name != sample.name:
                    if sample.fields:
                        yield sample
                    sample = _Sample(name)
                if ending in sample.fields:
                    problems.append(f"{self._origin.name}: holds {member.name} twice; remove one")
                if member.offset_data + member.size > end:
                    raise EOFError(f"{member.name} is cut off")
                sample.fields[ending] = (member.offset_data, member.size)
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # a damaged header looks like the end to tarfile
                raise EOFError(f"the header after {sample.name} is damaged")
        if sample.fields:
            yield sample

    def _picture_of(self, sample: _Sample) -> tuple[int, int] | None:
        """Return where the sample's picture lies."""
        if wanted := self._settings.image_column.lower():
            return sample.fields.get(wanted)
        return next((place for ending, place in sample.fields.items() if f".{ending}" in PICTURE_SUFFIXES), None)

    def _wanted(self) -> str:
        if self._settings.image_column:
            return f'data.image_column = "{self._settings.image_column}" must be the ending of the pictures\' names'
        return f"what follows the first dot of their names must be one of {', '.join(sorted(PICTURE_SUFFIXES))}"

    def _caption_field(self, samples: list[_Sample]) -> str | None:
        """Return the ending of the captions' names, or the key in .json that holds them. Raises DataError."""
        endings = {ending for sample in samples for ending in sample.fields}
        texts = [ending for ending in self._text_endings() if ending in endings]
        settings = self._settings
        if texts and not settings.caption_column and settings.caption_from in {"auto", "files"}:
            return texts[0]
        kinds: dict[str, Kind] = {ending: "text" if ending in texts else "other" for ending in sorted(endings)}
        for sample in samples:
            for key, value in self._json(sample, []).items():
                text = isinstance(value, str) or (isinstance(value, list) and any(isinstance(v, str) for v in value))
                if text or key not in kinds:
                    kinds[key] = "text" if text else "other"
        return caption_column(kinds, settings, self._origin.name)

    def _text_endings(self) -> list[str]:
        """Return the endings of caption files, those of the setting first."""
        wanted = [suffix.lower().lstrip(".") for suffix in self._settings.caption_suffixes]
        return list(dict.fromkeys([*wanted, *sorted(_TEXT_FIELDS)]))

    def _lines(self, sample: _Sample, problems: list[str]) -> tuple[str, ...] | None:
        """Return a sample's caption: the lines of its text file, or what its .json says."""
        name = self._caption
        if name is None:
            return None
        if name in sample.fields and name in self._text_endings():
            try:
                text = self._bytes(*self._short(sample.fields[name])).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                problems.append(f"{self._origin.name}: {sample.name}.{name} is not UTF-8 ({error}); save it as UTF-8")
                return None
            return tuple(line for line in map(str.strip, text.splitlines()) if line) or ("",)
        try:
            return caption_lines(self._json(sample, problems).get(name))
        except TypeError as error:
            problems.append(f'{self._origin.name}: {sample.name}.json: "{name}" is not text but {error}; make it text')
            return None

    def _json(self, sample: _Sample, problems: list[str]) -> Mapping[str, Any]:
        """Return what the sample's .json says; nothing, and a problem more, where it cannot be read."""
        if "json" not in sample.fields:
            return {}
        try:
            value = json.loads(self._bytes(*self._short(sample.fields["json"])))
        except (ValueError, RecursionError) as error:
            problems.append(f"{self._origin.name}: {sample.name}.json is not JSON ({first_line(error)}); correct it")
            return {}
        return value if isinstance(value, dict) else {}

    def _short(self, place: tuple[int, int]) -> tuple[int, int]:
        """Return where a text lies; no caption fills the memory."""
        return place[0], min(place[1], _LONGEST_TEXT)

"""Looks at every picture file once: header, content, pixels and mask, in threads, little of it kept."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from sdlora.data import Progress
from sdlora.data.check.duplicates import SIDE, grey_thumbnail
from sdlora.data.index import FileIndex, PictureFacts, content_hash, state_of
from sdlora.data.pictures import Header, read_header, read_mask, read_picture_and_opacity
from sdlora.data.sample import Sample
from sdlora.errors import DataError

_THREADS = min(8, os.cpu_count() or 1)
_AT_ONCE = 4 * _THREADS


@dataclass(frozen=True, slots=True)
class Look:
    """What is known of one picture after a look at its file."""

    header: Header | None = None
    """None of what cannot be read at all."""
    sha256: str = ""
    """Of the file; "" where it was not read, as only headers were, and no other file has its size."""
    thumbnail: bytes = b""
    """For comparing, see `grey_thumbnail`; empty without pixels."""
    see_through: bool = False
    """Whether parts of it are transparent."""
    mask_black: bool = False
    """Whether nothing in its mask, or its own opacity where that is its mask, is above 0."""
    problem: str = ""
    """Why it cannot be read."""
    mask_problem: str = ""
    """Why its mask cannot be used."""


def look_at(
    samples: Sequence[Sample], index: FileIndex, *, headers_only: bool = False, on_progress: Progress | None = None
) -> list[Look]:
    """Return a look at each sample's picture; what is learnt of files is in `index` for the run.

    With `headers_only` no pixel is decoded, and only files of equal size are read, to tell whether they are
    the same.
    """
    looks: list[Look] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(samples), _AT_ONCE):
            part = samples[start : start + _AT_ONCE]
            states = [state_of(sample) for sample in part]
            # Rows of a table are fetched here, in their order; files are read by the threads.
            jobs = [pool.submit(_look, sample, _source_of(sample), headers_only) for sample in part]
            for state, job in zip(states, jobs, strict=True):
                look = job.result()
                if look.header and look.sha256:
                    index.remember(state, PictureFacts(look.sha256, *look.header.size))
                looks.append(look)
            if on_progress:
                on_progress(len(looks), len(samples))
    index.commit()
    return _hash_where_needed(samples, looks, index) if headers_only else looks


def _source_of(sample: Sample) -> Path | io.BytesIO | DataError:
    try:
        return sample.source()
    except DataError as error:
        return error


def _look(sample: Sample, source: Path | io.BytesIO | DataError, headers_only: bool) -> Look:
    try:
        if isinstance(source, DataError):
            raise source
        if isinstance(source, Path):
            if headers_only:
                return Look(read_header(source))
            source = io.BytesIO(source.read_bytes())
        header = read_header(source, sample.path)
    except OSError as error:
        return Look(problem=f"{sample.path}: cannot be read ({error.strerror or error})")
    except DataError as error:
        return Look(problem=str(error))
    look = Look(header, hashlib.sha256(source.getbuffer()).hexdigest())
    return look if headers_only else _decode(sample, source, look, header)


def _decode(sample: Sample, source: io.BytesIO, look: Look, header: Header) -> Look:
    settings = sample.concept.settings
    try:
        picture, opacity = read_picture_and_opacity(
            source, sample.path, background=settings.background, at_least=(SIDE, SIDE)
        )
    except DataError as error:
        return replace(look, problem=str(error))
    look = replace(
        look, thumbnail=grey_thumbnail(picture), see_through=opacity is not None and _range(opacity)[0] < 255
    )
    mask = opacity if settings.masks.source == "alpha" else None
    if sample.mask is not None:
        try:
            mask = read_mask(sample.mask, header, sample.path)
        except DataError as error:
            return replace(look, mask_problem=str(error))
    return replace(look, mask_black=mask is not None and _range(mask)[1] == 0)


def _range(picture: Image.Image) -> tuple[int, int]:
    low, high = picture.getextrema()
    assert isinstance(low, int) and isinstance(high, int)  # of one channel
    return low, high


def _hash_where_needed(samples: Sequence[Sample], looks: list[Look], index: FileIndex) -> list[Look]:
    """Return the looks with a hash of each file that another has the size of."""
    sizes = [0 if sample.rows else _size_of(sample.path) for sample in samples]
    often = Counter(sizes)
    found = []
    for sample, look, size in zip(samples, looks, sizes, strict=True):
        if look.header and size and often[size] > 1:
            try:
                look = replace(look, sha256=content_hash(sample.path, index))
            except DataError as error:
                look = replace(look, problem=str(error))
        found.append(look)
    return found


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0

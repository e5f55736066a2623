"""Caption files that a model writes: which pictures get one, and how no text of a person's is lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from PIL import Image

from sdlora.data.layouts.listing import PICTURE_SUFFIXES, pictures_below
from sdlora.data.pictures import read_header, read_picture
from sdlora.errors import DataError, OutputError
from sdlora.storage import write_bytes, write_text

CAPTION_SUFFIXES = (".txt", ".caption")
"""What caption files end in; readers take the first that exists."""
_PIXELS = 1024 * 1024  # more than a model sees, or than is trained on; some would take memory for all of it
_READERS = 4

Describe = Callable[[Sequence[Image.Image]], Sequence[str]]
"""From RGB pictures to what they show; raises DataError where it cannot take one of them."""
Save = Callable[[Path, str], bool]
"""Puts the caption of a picture into its file; returns whether it did."""


@dataclass(frozen=True)
class CaptionPlan:
    """Which pictures below a folder get a caption file, and which do not."""

    pictures: tuple[Path, ...]
    """Those that get one."""
    kept: tuple[Path, ...]
    """Those that have one, which is not touched."""
    shared: tuple[Path, ...]
    """Those whose caption file is that of another picture: a.jpg beside a.png."""


@dataclass(frozen=True)
class Captioned:
    """What became of one picture."""

    picture: Path
    caption: str = ""
    problem: str = ""
    """Why it has no caption, in one sentence; "" where it has."""
    saved: bool = False
    """Whether the caption went into a file."""


def plan_captions(folder: Path, *, overwrite: bool = False) -> CaptionPlan:
    """Return what is to be done for the pictures in `folder` and its subfolders.

    A picture that has a caption file, be it empty, is left as it is, unless `overwrite`.
    Raises DataError where there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        what = "is a file; name the folder it lies in" if folder.is_file() else "there is no such folder"
        raise DataError(f"{folder}: {what}")
    found = pictures_below(folder)
    if not found:
        raise DataError(f"{folder}: holds no pictures; expected files of type {', '.join(sorted(PICTURE_SUFFIXES))}")
    firsts: dict[Path, Path] = {}
    for picture in found:
        firsts.setdefault(picture.with_suffix(""), picture)
    kept = {picture for picture in firsts.values() if caption_files(picture) and not overwrite}
    return CaptionPlan(
        pictures=tuple(picture for picture in firsts.values() if picture not in kept),
        kept=tuple(sorted(kept)),
        shared=tuple(picture for picture in found if firsts[picture.with_suffix("")] != picture),
    )


def caption_files(picture: Path) -> list[Path]:
    """Return the caption files that lie beside a picture."""
    files = (picture.with_suffix(suffix) for suffix in CAPTION_SUFFIXES)
    return [file for file in files if file.exists() or file.is_symlink()]


def caption_pictures(
    pictures: Sequence[Path],
    describe: Describe,
    *,
    batch_size: int = 1,
    prefix: str = "",
    suffix: str = "",
    save: Save | None = None,
) -> Iterator[Captioned]:
    """Yield what became of each picture as soon as it is known, its caption saved.

    Pictures are read ahead. One that cannot be read or described is told of, and the others go on.
    """
    batch: list[tuple[Path, Image.Image]] = []
    for path, picture in _read_ahead(pictures, ahead=batch_size + _READERS):
        if isinstance(picture, DataError):
            yield Captioned(path, problem=str(picture))
            continue
        batch.append((path, picture))
        if len(batch) == batch_size:
            yield from _caption_batch(batch, describe, prefix, suffix, save)
            batch = []
    yield from _caption_batch(batch, describe, prefix, suffix, save)


def _caption_batch(
    batch: Sequence[tuple[Path, Image.Image]],
    describe: Describe,
    prefix: str,
    suffix: str,
    save: Save | None,
) -> Iterator[Captioned]:
    if not batch:
        return
    try:
        texts = describe([picture for _, picture in batch])
    except DataError as error:
        if len(batch) == 1:
            yield Captioned(batch[0][0], problem=f"{batch[0][0]}: {error}")
            return
        for single in batch:  # to find out which it is
            yield from _caption_batch([single], describe, prefix, suffix, save)
        return
    for (path, _), text in zip(batch, texts, strict=True):
        if not text.strip():
            problem = f"{path}: the model said nothing; a larger --max-tokens may help, or another --prompt"
            yield Captioned(path, problem=problem)
            continue
        caption = " ".join(f"{prefix}{text.strip()}{suffix}".split())
        yield Captioned(path, caption, saved=save is not None and save(path, caption))


def _read_ahead(paths: Iterable[Path], ahead: int) -> Iterator[tuple[Path, Image.Image | DataError]]:
    """Yield each path with its picture, or with why it has none; about `ahead` of them are held in memory."""
    waiting: deque[tuple[Path, Future[Image.Image | DataError]]] = deque()
    with ThreadPoolExecutor(_READERS) as readers:
        try:
            for path in paths:
                waiting.append((path, readers.submit(_read, path)))
                if len(waiting) > ahead:
                    first, picture = waiting.popleft()
                    yield first, picture.result()
            while waiting:
                first, picture = waiting.popleft()
                yield first, picture.result()
        finally:
            readers.shutdown(wait=False, cancel_futures=True)


def _read(path: Path) -> Image.Image | DataError:
    try:
        size = _reduced(*read_header(path).size)
        picture = read_picture(path, at_least=size)
    except DataError as error:
        return error
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def _reduced(width: int, height: int) -> tuple[int, int]:
    """Return the size that a picture is shown to the model in, of the same shape."""
    scale = min(1.0, (_PIXELS / (width * height)) ** 0.5)
    return max(1, round(width * scale)), max(1, round(height * scale))


def write_caption(picture: Path, caption: str, *, ending: str = ".txt", overwrite: bool = False) -> bool:
    """The caption file beside `picture` holds `caption`, one line, and is the only one; returns whether it does.

    Where there is one already, nothing is done, unless `overwrite`: then texts of before are kept in copies
    that no program reads, NAME.txt.bak, NAME.txt.bak2, and so on.
    Raises OutputError where the folder cannot be written.
    """
    file = picture.with_suffix(ending)
    before = caption_files(picture)
    if before and not overwrite:  # somebody wrote it meanwhile
        return False
    line = caption + "\n"
    try:
        for old in before:
            if old != file or old.read_bytes() != line.encode():
                _keep_copy(old)
        write_text(file, line)
        for old in before:
            if old != file:
                old.unlink()
    except OSError as error:
        raise OutputError(f"{file}: cannot be replaced ({error.strerror or error})") from error
    return True


def _keep_copy(file: Path) -> None:
    """NAME.bak beside it, or NAME.bak2, NAME.bak3, ..., holds the same text, unless that is blank."""
    text = file.read_bytes()
    for number in count(1) if text.strip() else ():
        copy = file.with_name(f"{file.name}.bak{number if number > 1 else ''}")
        if not copy.exists():
            write_bytes(copy, text)
        if copy.read_bytes() == text:
            return

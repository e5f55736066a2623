"""Finds the pictures and captions of a folder and opens each picture upright in RGB."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from sdlora.config import DataSection
from sdlora.errors import DataError

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"}
_CAPTION_SUFFIXES = (".txt", ".caption")
# What Pillow's decoders raise on damaged files, as fuzzing shows.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, struct.error)


@dataclass(frozen=True)
class Sample:
    """One picture file and the text it is trained with."""

    path: Path
    caption: str
    prior: bool = False
    """Whether it shows something else, which the adapter must leave as the base has it."""


@dataclass(frozen=True)
class Dataset:
    """The samples of a run, in the order of their paths; those of the prior folder last."""

    folder: Path
    samples: tuple[Sample, ...]
    captioned: int

    def summary(self) -> str:
        """Return a sentence for the start of a run."""
        others = sum(sample.prior for sample in self.samples)
        count = len(self.samples) - others
        text = f"{count} picture{'s' * (count != 1)} in {self.folder}, {self.captioned} with their own caption"
        return text + (f"; {others} of other things" if others else "")

    def fingerprint(self) -> str:
        """Return a hash of the file names, sizes and captions; a changed data set has another."""
        digest = hashlib.sha256()
        for sample in self.samples:
            size = sample.path.stat().st_size
            name = sample.path.name if sample.prior else sample.path.relative_to(self.folder)
            digest.update(f"{name}|{size}|{sample.caption}|{sample.prior}\n".encode())
        return digest.hexdigest()


def open_dataset(section: DataSection) -> Dataset:
    """Return the pictures below `section.folder` and `section.prior_folder` with captions, "[trigger]" filled in.

    A folder and its parent give the same pictures. Raises DataError for a missing folder, a folder
    without pictures, pictures that have no caption when `section.caption` is empty, and a prior folder
    that shares pictures with the other.
    """
    folder = Path(section.folder).expanduser()
    samples, captioned = _samples_below(folder, "data.folder", section.caption, section.trigger)
    if section.prior_folder:
        others, _ = _samples_below(Path(section.prior_folder).expanduser(), "data.prior_folder", "", section.trigger)
        if shared := {s.path.resolve() for s in samples} & {s.path.resolve() for s in others}:
            raise DataError(f"{min(shared)}: lies in data.folder and in data.prior_folder; keep the two apart")
        samples += tuple(replace(sample, prior=True) for sample in others)
    return Dataset(folder, samples, captioned)


def _samples_below(folder: Path, setting: str, caption: str, trigger: str) -> tuple[tuple[Sample, ...], int]:
    """Return the samples, and how many had a caption of their own."""
    if not folder.exists():
        raise DataError(f"{folder}: there is no such folder; {setting} must name the folder of pictures")
    if not folder.is_dir():
        raise DataError(f"{folder}: is a file; {setting} must name the folder it lies in")
    pictures = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not pictures:
        raise DataError(_explain_empty(folder))
    texts = [_caption_of(path) for path in pictures]
    bare = [path for path, text in zip(pictures, texts, strict=True) if text is None]
    if bare and not caption:
        raise DataError(
            f"{bare[0]}: has no caption file ({bare[0].stem}.txt)"
            + (f", and {len(bare) - 1} other pictures have none" if len(bare) > 1 else "")
            + (
                "; write them, each saying what its picture shows"
                if setting == "data.prior_folder"
                else '; write them, or set data.caption, for example "a photo of [trigger]"'
            )
        )
    samples = tuple(
        Sample(path, fill_trigger(caption if text is None else text, trigger))
        for path, text in zip(pictures, texts, strict=True)
    )
    return samples, len(pictures) - len(bare)


def fill_trigger(text: str, trigger: str) -> str:
    """Return `text` with "[trigger]" replaced. Raises DataError when there is no trigger to put there."""
    if "[trigger]" not in text:
        return text
    if not trigger:
        raise DataError(f"{text!r} holds [trigger] but data.trigger is not set")
    return text.replace("[trigger]", trigger)


def read_picture(path: Path) -> Image.Image:
    """Return the picture upright (EXIF), in RGB, transparency laid on white.

    Raises DataError with the file's name when it is no whole picture.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            return _as_rgb(ImageOps.exif_transpose(opened))
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: has more than 178 megapixels; resize it") from error
    except _DECODE_ERRORS as error:
        reason = "it is not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"{path}: cannot be read as a picture ({reason}); replace or remove the file") from error


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in {"I;16", "I;16B", "I;16L", "I"}:  # 16 bits; Pillow's own conversion clips them
        return picture.convert("I").point(lambda value: value / 257 + 0.5).convert("L").convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _caption_of(path: Path) -> str | None:
    """Return the one line of the caption file beside the picture, or None where there is no file."""
    for suffix in _CAPTION_SUFFIXES:
        file = path.with_suffix(suffix)
        if not file.is_file():
            continue
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from error
        texts = [line.strip() for line in lines if line.strip()]
        if len(texts) > 1:
            raise DataError(
                f"{file}: holds {len(texts)} lines; a caption is one line (join them, or remove all but one)"
            )
        return texts[0] if texts else ""
    return None


def _explain_empty(folder: Path) -> str:
    others = sorted({path.suffix.lower() or "no suffix" for path in folder.rglob("*") if path.is_file()})
    seen = f"it holds files of type {', '.join(others[:5])}" if others else "it is empty"
    return f"{folder}: holds no pictures ({seen}); expected {', '.join(sorted(PICTURE_SUFFIXES))}"

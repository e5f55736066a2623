"""Pictures that go with an adapter: upright, in sRGB, and with nothing in the file but pixels."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdlora.adapters.header_text import plain
from sdlora.data.pictures import read_picture
from sdlora.storage import user_path

FOLDER = "samples"
_JPEG = (".jpg", ".jpeg")
PICTURES = (".png", *_JPEG)
"""What pictures on a card are called."""
_LONGEST_PROMPT = 2000
_PREVIEW_PIXELS, _THUMBNAIL_PIXELS = 1024, 256
_QUALITY, _THUMBNAIL_QUALITY = 93, 85


@dataclass(frozen=True)
class Sample:
    """A picture to show on a model card."""

    place: str
    """Where it lies beside the card: "samples/00.png". Its own name, which may tell something, is forgotten."""
    data: bytes
    prompt: str


def samples(pictures: Sequence[tuple[Path, str]]) -> list[Sample]:
    """Return (file, prompt) pairs as pictures for a card, encoded anew. Raises DataError for what is no picture."""
    found = []
    for number, (path, prompt) in enumerate(pictures):
        place = f"{FOLDER}/{number:02d}{_suffix(path)}"
        found.append(Sample(place, public_picture(path), plain(prompt, _LONGEST_PROMPT)))
    return found


def public_picture(path: Path) -> bytes:
    """Return the picture encoded anew, as JPEG if it is called so, else as PNG. Raises DataError for what is none."""
    return _encoded(read_picture(user_path(path)), _suffix(path))


def preview_png(path: Path) -> bytes:
    """Return the picture as a PNG of at most 1024 pixels. Raises DataError for what is no picture."""
    return _encoded(_within(read_picture(user_path(path)), _PREVIEW_PIXELS), ".png")


def thumbnail_url(path: Path) -> str:
    """Return the picture as a data URL of a JPEG of at most 256 pixels. Raises DataError for what is no picture."""
    data = _encoded(_within(read_picture(user_path(path)), _THUMBNAIL_PIXELS), ".jpg", _THUMBNAIL_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _suffix(path: Path) -> str:
    return ".jpg" if path.suffix.lower() in _JPEG else ".png"


def _within(picture: Image.Image, pixels: int) -> Image.Image:
    picture.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    return picture


def _encoded(picture: Image.Image, suffix: str, quality: int = _QUALITY) -> bytes:
    """Return the file of these pixels. Neither format writes text or EXIF that it is not handed."""
    picture.info.clear()
    buffer = io.BytesIO()
    if suffix == ".png":
        picture.save(buffer, format="PNG", optimize=True)
    else:
        picture.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()

"""Opens picture files by what they hold, whatever their name says, and reads their headers."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from sdlora.data.colours import profile_title
from sdlora.errors import PICTURE_DAMAGE, DataError, first_line

MAX_PIXELS = 178_956_970
"""So many are decoded at most; Pillow takes more for an attack on the memory."""
_LARGEST_REDUCTION = 8
"""A JPEG can be decoded at an eighth of its width and height."""
_TIFF_ORIENTATION = 0x0112
_TIFF_PHOTOMETRIC = 0x0106


@dataclass(frozen=True, slots=True)
class Header:
    """What a picture file says of itself before its pixels."""

    width: int
    """In pixels, upright."""
    height: int
    format: str
    """As Pillow calls it: "JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"."""
    mode: str
    """As Pillow decodes it: "RGB", "RGBA", "L", "P", "CMYK", "I;16", ..."""
    bits: int
    """Of one channel, or of a palette's index, in a PNG or TIFF; 8 in the other formats."""
    orientation: int
    """EXIF orientation, 1 to 8; 1 is upright."""
    transparent: bool
    """Whether it has an opacity, even if all of it is opaque."""
    animated: bool
    """Whether frames or pages follow the first, which alone is read."""
    profile: str
    """Title of the colour profile: "sRGB", another, "" where there is none, "unreadable" where it is ignored."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, upright."""
        return self.width, self.height

    @property
    def turned(self) -> bool:
        """Whether the pixels lie in the file otherwise than upright."""
        return self.orientation != 1


def read_header(source: Path | BinaryIO, name: str | Path | None = None) -> Header:
    """Return what the file's header says; no pixel is decoded. `name` stands for the file in messages.

    Raises DataError for what is no picture, is of no known format, is damaged before its pixels, has
    pixels whose white is not known, or is too large to be read at any scale.
    """
    with open_picture(source, name) as (_, header):
        return header


@contextmanager
def open_picture(source: Path | BinaryIO, name: str | Path | None = None) -> Iterator[tuple[ImageFile, Header]]:
    """Give the picture, not yet decoded, and its header. A file opened here is closed afterwards.

    Raises DataError as `read_header` does, and in place of what decoding it in the block raises.
    """
    label = str(name or (source if isinstance(source, Path) else "picture"))
    try:
        with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
            file.seek(0)
            start = file.read(64)
            plugin = _plugin_for(start)
            if plugin is None:
                raise DataError(f"{label}: {_what_else(start)}")
            file.seek(0)
            opened = plugin(file)
            header = _describe(opened, file, start)
            if refusal := _refusal(opened, header):
                raise DataError(f"{label}: {refusal}")
            yield opened, header
    except Image.DecompressionBombError as error:
        raise DataError(f"{label}: {_too_large()}") from error
    except PICTURE_DAMAGE as error:
        raise DataError(f"{label}: {_explain(error)}") from error


class _Jpeg(JpegImageFile):
    """A JPEG whose resolution is not looked up in its EXIF, which is slow and prints warnings of damaged EXIF.

    Opened as such, a file of several pictures (MPO) is the first of them.
    """

    def _read_dpi_from_exif(self) -> None:
        pass


class _Tiff(TiffImageFile):
    """A TIFF whose memory is reserved before Pillow does, which would print a warning above 89 megapixels."""

    def load_prepare(self) -> None:
        if self._im is None:
            self.im = Image.new(self.mode, (self.tag_v2[256], self.tag_v2[257])).im
        super().load_prepare()


_PLUGINS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\xff\xd8\xff", _Jpeg),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"GIF87a", GifImageFile),
    (b"GIF89a", GifImageFile),
    (b"BM", BmpImageFile),
    (b"II*\0", _Tiff),
    (b"MM\0*", _Tiff),
    (b"II+\0", _Tiff),
    (b"MM\0+", _Tiff),
)
_OTHERS = (
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (b"8BPS", "a Photoshop document"),
    (b"gimp xcf", "a GIMP document"),
    (b"v/1\x01", "an OpenEXR picture"),
    (b"\0\0\1\0", "a Windows icon"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"PK\3\4", "a ZIP archive"),
)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def _plugin_for(start: bytes) -> type[ImageFile] | None:
    """Return what opens a file that begins with `start`, None where nothing does."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return WebPImageFile
    if start[4:8] == b"ftyp" and (b"avif" in start[8:] or start[8:12] == b"avis"):
        return AvifImageFile
    return next((plugin for magic, plugin in _PLUGINS if start.startswith(magic)), None)


def _what_else(start: bytes) -> str:
    """Return what a file is that begins with `start` and is no picture, to follow its name."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not start:
        return "is empty; replace or remove the file"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the picture itself; fetch the pictures with `git lfs pull`"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "is a web page, not a picture; download the picture again, or remove the file"
    if start[4:8] == b"ftyp":
        title = "an HEIC picture" if start[8:12] in _HEIC_BRANDS else "a film"
    elif text.startswith((b"<svg", b"<?xml")):
        title = "an SVG drawing or other XML"
    else:
        title = next((title for magic, title in _OTHERS if start.startswith(magic)), "")
    if title:
        return f"is {title}, which is not read; convert it to PNG or JPEG, or remove the file"
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in start):
        return "is text, not a picture; replace or remove the file"
    return "is not a picture in a known format; expected JPEG, PNG, WebP, AVIF, GIF, BMP or TIFF"


def _describe(opened: ImageFile, file: BinaryIO, start: bytes) -> Header:
    width, height = opened.size
    bits, exif = 8, opened.info.get("exif")
    if isinstance(opened, TiffImageFile):
        bits = max(opened.tag_v2.get(0x0102, (1,)))
        orientation = opened.tag_v2.get(_TIFF_ORIENTATION, 1)
        orientation = orientation if orientation in range(1, 9) else 1  # Pillow's size is already upright
    else:
        if isinstance(opened, PngImageFile):
            bits = start[24]
            exif = exif or _late_exif(file) or _exif_as_text(opened)
        orientation = _orientation(exif)
        if orientation > 4:
            width, height = height, width
    profile = profile_title(opened.info["icc_profile"], opened.mode) if "icc_profile" in opened.info else ""
    return Header(
        width,
        height,
        str(opened.format),
        opened.mode,
        bits,
        orientation,
        transparent=opened.has_transparency_data or not _fills_canvas(opened),
        animated=bool(getattr(opened, "is_animated", False)),
        profile=profile,
    )


def _fills_canvas(opened: ImageFile) -> bool:
    """Return false of a GIF whose first frame leaves parts of the canvas empty."""
    return not isinstance(opened, GifImageFile) or opened.tile[0][1] == (0, 0, *opened.size)


def _refusal(opened: ImageFile, header: Header) -> str:
    """Return why a picture cannot be read though its format can, to follow its name; "" where it can."""
    pixels = header.width * header.height
    # Of a progressive JPEG the decoder holds everything, at any scale.
    if isinstance(opened, JpegImageFile) and "progressive" not in opened.info:
        pixels //= _LARGEST_REDUCTION**2
    if pixels > MAX_PIXELS:
        return _too_large()
    if header.mode in ("I", "F"):
        kind = "floating-point" if header.mode == "F" else "signed or 32-bit"
        return f"has {kind} pixels, whose black and white are not known; save it with 8 or 16 bits"
    if isinstance(opened, TiffImageFile) and opened.tag_v2.get(_TIFF_PHOTOMETRIC) == 6 and not opened.use_load_libtiff:
        return "is a TIFF of uncompressed YCbCr pixels, which cannot be read; save it as RGB"
    return ""


def _late_exif(file: BinaryIO) -> bytes:
    """Return the EXIF that a PNG has behind its pixels, in its last 64 KiB; b"" where there is none."""
    back = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
    tail = file.read()
    file.seek(back)
    place = tail.rfind(b"eXIf")
    if place < 4:
        return b""
    (length,) = struct.unpack_from(">I", tail, place - 4)
    chunk, checksum = tail[place : place + 4 + length], tail[place + 4 + length : place + 8 + length]
    # Pixels may hold these four letters by chance, but not the checksum too.
    return chunk[4:] if checksum == struct.pack(">I", zlib.crc32(chunk)) else b""


def _exif_as_text(opened: PngImageFile) -> bytes:
    """Return EXIF in the form that ImageMagick used to give it in a PNG: hexadecimal after three lines."""
    text = opened.info.get("Raw profile type exif", "")
    try:
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:
        return b""


def _orientation(exif: object) -> int:
    """Return the orientation, 1 to 8, that EXIF data tell; 1 where they are missing or damaged."""
    if not isinstance(exif, bytes):
        return 1
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (place,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, place)
        for entry in range(count):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, place + 2 + 12 * entry)
            if tag == _TIFF_ORIENTATION:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _too_large() -> str:
    return f"has more than {MAX_PIXELS // 10**6} megapixels; resize it"


def _explain(error: BaseException) -> str:
    """Return what went wrong with a file, to follow its name."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror}); restore or remove the file"
    if isinstance(error, MemoryError):
        return "does not fit into the memory; resize it"
    telling = isinstance(error, OSError | SyntaxError | ValueError) and error.__cause__ is None
    reason = first_line(error) if telling else "it is damaged or cut short"
    return f"cannot be read as a picture ({reason}); replace or remove the file"

"""Text that Forge and NovelAI hide in the lowest bits of a picture's pixels, where it outlives lost metadata."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from sdlora.errors import PICTURE_DAMAGE

_SIGNATURES = {
    b"stealth_pnginfo": ("A", False),
    b"stealth_pngcomp": ("A", True),
    b"stealth_rgbinfo": ("RGB", False),
    b"stealth_rgbcomp": ("RGB", True),
}
_LENGTH_BYTES = 4
_LONGEST = 4 << 20
_GZIP = 31
"""What zlib is told to expect."""


def hidden_text(path: Path) -> str:
    """Return the text that is hidden in a PNG's or WebP's pixels, "" where there is none.

    The bits go down each column, in alpha or in red, green and blue in turn: a signature of 15 bytes, the text's length in
    bits (32, the highest first), then the text in UTF-8, compressed by gzip where the signature says so.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:
            if picture.format not in ("PNG", "WEBP") or picture.mode not in ("RGB", "RGBA"):
                return ""
            pixels = np.asarray(picture).transpose(1, 0, 2)  # [W,H,C]: columns first
    except (*PICTURE_DAMAGE, Image.DecompressionBombError):
        return ""
    found = _hidden_in(pixels[..., 3:]) if pixels.shape[2] == 4 else b""
    return (found or _hidden_in(pixels[..., :3])).decode("utf-8", "replace")


def _hidden_in(values: np.ndarray) -> bytes:
    """Return what is hidden in these channels [W,H,C], b"" for nothing."""
    channels = "A" if values.shape[2] == 1 else "RGB"
    bits = values.reshape(-1) & 1
    head = np.packbits(bits[: 8 * (15 + _LENGTH_BYTES)]).tobytes()
    place, compressed = _SIGNATURES.get(head[:15], ("", False))
    count = int.from_bytes(head[15:], "big") // 8
    if place != channels or not 0 < count <= _LONGEST:
        return b""
    start = 8 * (15 + _LENGTH_BYTES)
    data = np.packbits(bits[start : start + 8 * count]).tobytes()
    if len(data) < count:
        return b""
    try:
        return zlib.decompressobj(_GZIP).decompress(data, _LONGEST) if compressed else data
    except zlib.error:
        return b""

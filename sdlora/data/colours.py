"""Brings decoded pixels of any kind to 8-bit sRGB, and tells their opacity."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

UNREADABLE = "unreadable"
_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
"""The pixels that a profile describes, by the colour space in its header."""
_SAME_LEVELS = 2


class _Profile(NamedTuple):
    title: str
    mode: str
    """Of the pixels it describes."""
    to_srgb: Callable[[Image.Image], Image.Image] | None
    """Makes a new picture, mode "RGB", of one of that mode; None where nothing is to be done."""


def profile_title(profile: bytes | None, mode: str) -> str:
    """Return "sRGB", another profile's own title, or "unreadable" where pixels of `mode` cannot be converted by it."""
    found = _read_profile(profile or b"")
    return found.title if _describes(found, mode) else UNREADABLE


def split_opacity(picture: Image.Image, bits: int) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours in 8 bits without palette or alpha, and the opacity, "L", where the picture has any.

    `bits` is what one channel has in the file: it scales grey values, and the colour that a PNG
    declares transparent.
    """
    key = picture.info.get("transparency")
    if picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.uint32)
        white = 2**bits - 1
        grey = Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))
        return grey, None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    if not picture.has_transparency_data:
        return (picture.convert("RGB") if picture.mode == "P" else picture), None
    if isinstance(key, int) and picture.mode == "L":
        picture.info["transparency"] = key * 255 // (2**bits - 1)
    if isinstance(key, tuple) and bits == 16:  # Pillow has kept the upper byte of each pixel, but all of the key
        picture.info["transparency"] = tuple(value >> 8 for value in key)
    grey_kinds = ("1", "L", "LA")
    with_alpha = picture.convert("LA" if picture.mode in grey_kinds else "RGBA")
    return with_alpha.convert("L" if picture.mode in grey_kinds else "RGB"), with_alpha.getchannel("A")


def to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Return a new picture in 8-bit sRGB. Pixels whose profile is unreadable, or sRGB already, keep their values."""
    found = _read_profile(profile or b"")
    if found.to_srgb is not None and _describes(found, picture.mode):
        converted = found.to_srgb(picture if picture.mode == found.mode else picture.convert(found.mode))
    else:
        converted = picture.convert("RGB")
    converted.info.clear()
    return converted


def _describes(profile: _Profile, mode: str) -> bool:
    # Grey pixels under an RGB profile are common: many programs keep the profile when they drop the colour.
    grey = mode in ("1", "L", "LA") or mode.startswith("I;16")
    if profile.mode == "RGB":
        return grey or mode in ("RGB", "RGBA", "P", "PA")
    return grey if profile.mode == "L" else mode == profile.mode


@lru_cache(maxsize=16)
def _read_profile(data: bytes) -> _Profile:
    """Return what an ICC profile says; its mode is "" where it cannot be read.

    Relative colorimetric with black point compensation: colours that sRGB holds stay as they were,
    and black stays black, whatever ink the profile is of. Perceptual would change colours that need
    no change, each maker's profile in its own way.
    """
    mode = _MODES.get(data[16:20], "")
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    if mode == "L":  # else a coarse grid is built of the curve, up to ten levels off; of colours it is good
        flags |= ImageCms.Flags.NOOPTIMIZE
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(data))
        title = ImageCms.getProfileDescription(profile).strip()
        transform = ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=flags,
        )
    except ImageCms.PyCMSError:
        return _Profile(UNREADABLE, "", None)
    if mode != "CMYK" and _changes_little(transform, mode):
        return _Profile("sRGB", mode, None)
    return _Profile(title or "unnamed", mode, partial(_by_table, transform) if mode == "L" else transform.apply)


_GREYS = np.arange(256, dtype=np.uint8).reshape(1, -1)


def _by_table(transform: ImageCms.ImageCmsTransform, picture: Image.Image) -> Image.Image:
    """Return a grey picture converted through the 256 values that it may have."""
    paletted = picture.copy()
    paletted.putpalette(transform.apply(Image.fromarray(_GREYS)).tobytes())
    return paletted.convert("RGB")


def _changes_little(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether no colour moves by more than rounding; sRGB has too many titles to know it by them."""
    before = np.stack([_GREYS] * 3, axis=-1)
    if mode == "RGB":
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        before = np.concatenate([before, np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)], axis=1)
    after = np.asarray(transform.apply(Image.fromarray(before).convert(mode)))
    return bool(np.abs(after.astype(int) - before).max() <= _SAME_LEVELS)

"""Checks picture files, masks and shapes: what is converted, left out, enlarged or cropped away."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from sdlora.data.check import findings
from sdlora.data.check.findings import Finding
from sdlora.data.check.picture import Picture
from sdlora.data.pictures import Header

MOST_CROPPED = 0.2
"""A larger share is worth a warning."""


def check_files(pictures: Sequence[Picture]) -> Iterator[Finding]:
    """Yield what is unusual about the files themselves."""
    for number, picture in enumerate(pictures):
        header = picture.look.header
        if header is None:
            continue
        if header.turned:
            text = f"{picture.name}: EXIF orientation {header.orientation}, {header.width}x{header.height} upright"
            yield Finding(findings.TURNED, text, (number,))
        if header.animated:
            yield Finding(findings.ANIMATED, f"{picture.name}: {header.format} with several frames", (number,))
        if picture.look.see_through:
            yield Finding(findings.TRANSPARENT, f"{picture.name}: {_what_becomes_of(picture)}", (number,))
        if kind := _unusual(header):
            yield Finding(findings.CONVERTED, f"{picture.name}: {kind}", (number,))
        if header.profile == "unreadable":
            yield Finding(findings.PROFILE_UNREADABLE, f"{picture.name}: its profile is ignored", (number,))
        elif header.profile not in ("", "sRGB"):
            yield Finding(findings.PROFILE, f"{picture.name}: {header.profile}", (number,))


def _what_becomes_of(picture: Picture) -> str:
    settings = picture.sample.concept.settings
    if settings.masks.source == "alpha":
        return f"its opacity is its mask, and {settings.background} is laid behind"
    return f"{settings.background} is laid behind"


def _unusual(header: Header) -> str:
    if header.mode.startswith("I;16") or header.bits > 8:
        return f"{header.bits} bits a channel become 8"
    if header.mode in ("1", "L", "LA"):
        return "black and white only" if header.mode == "1" else "grey, without colour"
    if header.mode in ("P", "PA"):
        return "a palette of colours"
    return "" if header.mode in ("RGB", "RGBA", "RGBX") else f"{header.mode} colours become RGB"


def check_masks(pictures: Sequence[Picture]) -> Iterator[Finding]:
    """Yield what is wrong with masks, and which pictures have none though others of their concept do."""
    without: dict[int, list[int]] = defaultdict(list)
    masked = set()
    for number, picture in enumerate(pictures):
        concept = id(picture.sample.concept)
        if picture.look.mask_problem:
            yield Finding(findings.MASK_UNFIT, picture.look.mask_problem, (number,))
        if picture.look.mask_black:
            yield Finding(findings.MASK_BLACK, f"{picture.sample.mask or picture.name}: is black all over", (number,))
        if _has_mask(picture):
            masked.add(concept)
        elif picture.bucket:
            without[concept].append(number)
    for concept in masked:
        for number in without[concept]:
            yield Finding(findings.MASK_MISSING, f"{pictures[number].name}: has no mask", (number,))


def _has_mask(picture: Picture) -> bool:
    if picture.sample.mask is not None:
        return True
    header = picture.look.header
    return header is not None and header.transparent and picture.sample.concept.settings.masks.source == "alpha"


def check_shapes(pictures: Sequence[Picture]) -> Iterator[Finding]:
    """Yield which pictures are enlarged, and which lose much, the worst first."""
    order = sorted(range(len(pictures)), key=lambda number: -pictures[number].enlarged)
    for number in order:
        picture, header = pictures[number], pictures[number].look.header
        if header and picture.bucket and picture.enlarged > 1:
            size, shape = f"{header.width}x{header.height}", "x".join(map(str, picture.bucket))
            yield Finding(
                findings.ENLARGED,
                f"{picture.name}: {size} is enlarged {_factor(picture.enlarged)}x for {shape}",
                (number,),
            )
    for number in sorted(order, key=lambda number: -pictures[number].cropped):
        picture, header = pictures[number], pictures[number].look.header
        if header and picture.bucket and picture.cropped > MOST_CROPPED:
            size, shape = f"{header.width}x{header.height}", "x".join(map(str, picture.bucket))
            yield Finding(
                findings.CROPPED,
                f"{picture.name}: {picture.cropped:.0%} of {size} is cropped away for {shape}",
                (number,),
            )


def _factor(enlarged: float) -> str:
    """Return the factor with the digits that it takes not to be 1."""
    return f"{enlarged:.1f}" if enlarged >= 1.05 else f"{max(enlarged, 1.001):.3f}"

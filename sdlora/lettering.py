"""Text in pictures: a font that has many scripts where there is one, lines that fit."""

from __future__ import annotations

from functools import cache

from PIL import ImageFont

_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "arial.ttf")


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return a font of so many pixels."""
    for name in _FONTS:  # these have more scripts than Pillow's own
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def fit(text: str, width: int, size: int) -> str:
    """Return the text, cut to `width` pixels, with "..." where it is cut."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "...") > width:
        text = text[: min(len(text) - 1, int(len(text) * 0.95))]
    return text + "..."


def wrap(text: str, width: int, size: int, most: int) -> list[str]:
    """Return the text in at most `most` lines, at spaces; a word may be wider than `width`, and the last line be longer."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font(size).getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return lines

"""The contact sheet as PNG files: what the model will see, with captions, for any program that shows pictures."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw

from sdlora.data.check.checking import Report
from sdlora.data.check.drawing import draw_all
from sdlora.data.check.findings import Finding, Severity
from sdlora.data.check.picture import Picture
from sdlora.data.check.report import verdict
from sdlora.lettering import fit, font, wrap
from sdlora.storage import atomic_path

COLUMNS, ROWS, MOST_SHEETS = 5, 6, 10
_SIDE, _GAP, _MARGIN = 256, 20, 28
_SMALL, _LINE, _CAPTION_LINES, _BADGE_LINES = 13, 18, 4, 2
_HEAD = 120
_PAPER, _INK, _FAINT, _TILE, _FINE = "#fafaf9", "#1c1917", "#78716c", "#e7e5e4", "#15803d"
_COLOURS: dict[Severity, str] = {"error": "#b91c1c", "warning": "#a16207", "note": "#1d4ed8"}


def write_sheets(report: Report, path: Path) -> list[Path]:
    """Write all pictures, on 10 sheets of 30 at most, to `path` and beside it under names ending in -2, -3, ...

    Returns the files. Where there are more pictures, those with errors and warnings come first.
    """
    chosen, note = _choose(report)
    by_picture = findings_by_picture(report)
    per_sheet = COLUMNS * ROWS
    parts = [chosen[start : start + per_sheet] for start in range(0, len(chosen), per_sheet)] or [[]]
    paths = []
    for number, part in enumerate(parts, start=1):
        name = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix or '.png'}")
        head = [report.summary, verdict(report), note or LEGEND]
        if len(parts) > 1:
            head[0] += f" (sheet {number} of {len(parts)})"
        sheet = _draw_sheet(report, part, by_picture, head)
        with atomic_path(name) as temporary:
            sheet.save(temporary, "PNG")
        paths.append(name)
    return paths


LEGEND = "in the frame: what is trained on; dark: cropped away; pink: masked out"


def findings_by_picture(report: Report) -> dict[int, list[Finding]]:
    """Return the findings about each picture."""
    found: dict[int, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        for number in finding.pictures:
            found[number].append(finding)
    return found


def _choose(report: Report) -> tuple[list[int], str]:
    """Return the numbers of the pictures to show, and a sentence where these are not all."""
    everything = list(range(len(report.pictures)))
    most = COLUMNS * ROWS * MOST_SHEETS
    if len(everything) <= most:
        return everything, ""
    grave = {n for f in report.findings if f.kind.severity != "note" for n in f.pictures}
    first = sorted(everything, key=lambda number: number not in grave)[:most]
    return sorted(first), (
        f"{most} of {len(everything)} pictures, those with errors and warnings before others; --html shows all"
    )


def _draw_sheet(report: Report, numbers: list[int], found: dict[int, list[Finding]], head: list[str]) -> Image.Image:
    pictures = [report.pictures[number] for number in numbers]
    texts = [_lines_below(number, report.pictures[number], found.get(number, [])) for number in numbers]
    tops = [_MARGIN + _HEAD]
    for start in range(0, len(texts), COLUMNS):
        tops.append(tops[-1] + _SIDE + max(map(len, texts[start : start + COLUMNS])) * _LINE + 2 * _GAP)
    width = 2 * _MARGIN + COLUMNS * (_SIDE + _GAP) - _GAP
    sheet = Image.new("RGB", (width, tops[-1]), _PAPER)
    pen = ImageDraw.Draw(sheet)
    colours = (_INK, _FINE if report.ok else _COLOURS["error"], _FAINT)
    for line, (text, size, colour) in enumerate(zip(head, (22, 16, 14), colours, strict=True)):
        pen.text((_MARGIN, _MARGIN + 32 * line), fit(text, width - 2 * _MARGIN, size), fill=colour, font=font(size))
    for place, (drawn, lines) in enumerate(zip(draw_all(pictures, _SIDE, lambda drawn: drawn), texts, strict=True)):
        left, top = _MARGIN + place % COLUMNS * (_SIDE + _GAP), tops[place // COLUMNS]
        pen.rectangle((left - 1, top - 1, left + _SIDE, top + _SIDE), fill=_TILE)
        sheet.paste(drawn, (left + (_SIDE - drawn.width) // 2, top + (_SIDE - drawn.height) // 2))
        for number, (text, colour) in enumerate(lines):
            at = (left, top + _SIDE + 8 + number * _LINE)
            pen.text(at, fit(text, _SIDE, _SMALL), fill=colour, font=font(_SMALL))
    return sheet


def _lines_below(number: int, picture: Picture, found: list[Finding]) -> list[tuple[str, str]]:
    """Return the lines of text below a picture, with their colours."""
    lines = [(f"{number + 1}  {picture.sample.path.name}", _INK), (describe_cut(picture), _FAINT)]
    more = f"  (+{len(picture.texts) - 1} texts)" if len(picture.texts) > 1 else ""
    lines += [(line, _INK) for line in wrap((picture.texts[0] or "(no caption)") + more, _SIDE, _SMALL, _CAPTION_LINES)]
    for place, finding in enumerate(found[:_BADGE_LINES], start=1):
        extra = f", and {len(found) - place} more" if place == _BADGE_LINES and len(found) > place else ""
        lines.append((f"{finding.kind.severity}: {finding.kind.name}{extra}", _COLOURS[finding.kind.severity]))
    return lines


def describe_cut(picture: Picture) -> str:
    """Return what becomes of a picture's size: "1024x768 -> 512x384, 3.1% cropped"."""
    header, bucket = picture.look.header, picture.bucket
    if header is None or bucket is None:
        return "cannot be read"
    parts = [f"{header.width}x{header.height} -> {bucket[0]}x{bucket[1]}"]
    if picture.cropped >= 0.0005:
        parts.append(f"{picture.cropped:.1%} cropped")
    settings = picture.sample.concept.settings
    if settings.crops > 1:
        parts.append(f"{settings.crops} crops")
    if settings.flip:
        parts.append("mirrored too")
    if picture.part != "training":
        parts.append(picture.part)
    return ", ".join(parts)

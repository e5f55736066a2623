"""Contact sheets, and grids whose columns, rows and planes are named by what changes along them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from sdlora.errors import PICTURE_DAMAGE, ConfigError, OutputError
from sdlora.generation.batch.grid import label
from sdlora.generation.batch.job_fields import SHEETS, field_of, name_parts
from sdlora.generation.batch.plan import Picture
from sdlora.lettering import fit, font, wrap
from sdlora.storage import atomic_path

_COLUMNS, _ROWS, _SIDE = 6, 5, 256
_GAP, _MARGIN = 12, 24
_SMALL, _LARGE = 14, 20
_LINE = 18
_LABEL_LINES, _CAPTION_LINES = 4, 3
_LABEL_WIDTH = 190
_TITLE = 40
_ROOM, _SMALLEST_CELL = 8_000, 64
"""Pixels across all columns or rows, and of the smallest cell."""
_PAPER, _INK, _FAINT, _TILE = "#fafaf9", "#1c1917", "#78716c", "#e7e5e4"
_PLACES = ("x", "y", "z")


@dataclass(frozen=True)
class Layout:
    """What changes along the columns, the rows and from plane to plane; "" for nothing."""

    x: str
    y: str = ""
    z: str = ""


@dataclass(frozen=True)
class Plane:
    """One picture of a grid."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: Mapping[tuple[str, str], Picture]
    """By the labels of column and row."""


def parse_layout(words: Sequence[str], pictures: Sequence[Picture]) -> Layout:
    """Return the layout of "x=seed", "y=weight", "z=adapter"; without any, of the grid's axes in their order.

    Raises ConfigError for anything else, and where there is no grid to take it from.
    """
    axes = list(dict.fromkeys(name for picture in pictures for name, _ in picture.point))
    named = dict[str, str]()
    for word in words:
        place, equals, name = word.partition("=")
        if place not in _PLACES or not equals or not name or place in named:
            raise ConfigError(f"--xyz {word!r} is no axis of a picture; expected for example x=seed y=weight z=adapter")
        named[place] = name if name in axes else _matching(name, axes)
    if words and "x" not in named:
        raise ConfigError("--xyz names no x; expected for example x=seed y=weight")
    if not words:
        if not axes:
            raise ConfigError("--xyz needs a grid, or names such as x=seed y=weight")
        named = dict(zip(_PLACES, axes, strict=False))
    return Layout(**named)


def _matching(name: str, axes: Sequence[str]) -> str:
    """Return the axis that goes by another name of its setting, or the setting. Raises ConfigError for an unknown one."""
    close = [axis for axis in axes if axis.split()[0] == name]
    if len(close) == 1:
        return close[0]
    field = field_of(name)
    return next((axis for axis in axes if " " not in axis and field_of(axis) == field), field)


def planes(pictures: Sequence[Picture], layout: Layout) -> list[Plane]:
    """Return the planes of the grid, in the order in which what makes them comes first.

    Axes of the grid that the layout does not name make planes too, and so do further pictures of one cell. Raises ConfigError for
    more columns or rows than one picture can have.
    """
    columns = tuple(dict.fromkeys(_label_of(picture, layout.x) for picture in pictures))
    rows = tuple(dict.fromkeys(_label_of(picture, layout.y) for picture in pictures))
    most = _ROOM // (_SMALLEST_CELL + _GAP)
    for name, labels in ((layout.x, columns), (layout.y, rows)):
        if len(labels) > most:
            raise ConfigError(
                f"--xyz: {name} has {len(labels)} values, a grid at most {most} in a line; choose another axis for it"
            )
    cells: dict[tuple[str, int], dict[tuple[str, str], Picture]] = {}
    for picture in pictures:
        rest = [(name, text) for name, text in picture.point if name not in (layout.x, layout.y, layout.z)]
        named = [(layout.z, _label_of(picture, layout.z)), *rest] if layout.z else rest
        title = ", ".join(f"{name}: {text}" for name, text in named)
        place = (_label_of(picture, layout.x), _label_of(picture, layout.y))
        number = 1
        while place in cells.setdefault((title, number), {}):
            number += 1
        cells[title, number][place] = picture
    ordered = sorted(cells.items(), key=lambda item: list(dict.fromkeys(t for t, _ in cells)).index(item[0][0]))
    return [Plane(title if n == 1 else f"{title} ({n})".strip(), columns, rows, held) for (title, n), held in ordered]


def _label_of(picture: Picture, name: str) -> str:
    if not name:
        return ""
    at = dict(picture.point)
    if name in at:
        return at[name]
    request, field = picture.request, field_of(name)
    if field == "weight":
        return ", ".join(f"{choice.weight:g}" for choice in request.adapters) or "none"
    if field == "adapters":
        return label([choice.path for choice in request.adapters])
    if field == "size":
        return f"{request.width}x{request.height}"
    return picture.file if field == "name" else label(getattr(request, field))


def write_grids(
    pictures: Sequence[Picture], files: Mapping[str, str], layout: Layout, folder: Path, side: int = _SIDE
) -> list[Path]:
    """Write one PNG a plane into `folder`/sheets and return them; `files` are {identity: file below `folder`}."""
    paths = []
    for number, plane in enumerate(planes(pictures, layout), start=1):
        path = folder / SHEETS / f"grid-{number}.png"
        _save(_draw_plane(plane, layout, files, folder, side), path)
        paths.append(path)
    _drop_older(folder, "grid", len(paths))
    return paths


def _draw_plane(plane: Plane, layout: Layout, files: Mapping[str, str], folder: Path, side: int) -> Image.Image:
    room = _room(plane, side)
    thumbnails = {
        place: _thumbnail(folder / files[picture.identity] if picture.identity in files else None, room)
        for place, picture in plane.cells.items()
    }
    width = max(picture.width for picture in thumbnails.values())
    height = max(picture.height for picture in thumbnails.values())
    above = [_lines(f"{layout.x}: {text}", width, _LABEL_LINES) for text in plane.columns]
    beside = [_lines(f"{layout.y}: {text}", _LABEL_WIDTH, max(1, height // _LINE)) for text in plane.rows if layout.y]
    left = _MARGIN + (_GAP + max(map(_width, beside)) if beside else 0)
    top = _MARGIN + (_TITLE if plane.title else 0) + max(text.count("\n") + 1 for text in above) * _LINE + _GAP
    size = (left + len(above) * (width + _GAP) + _MARGIN, top + len(plane.rows) * (height + _GAP) + _MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), fit(plane.title, size[0] - 2 * _MARGIN, _LARGE), _INK, font(_LARGE))
    for column, text in enumerate(above):
        at = (left + column * (width + _GAP) + width / 2, top - _GAP / 2)
        pen.text(at, text, _INK, font(_SMALL), anchor="md", align="center")
    for row, text in enumerate(beside):
        at = (left - _GAP, top + row * (height + _GAP) + height / 2)
        pen.text(at, text, _INK, font(_SMALL), anchor="rm", align="right")
    for (x, y), thumbnail in thumbnails.items():
        across = left + plane.columns.index(x) * (width + _GAP) + (width - thumbnail.width) // 2
        down = top + plane.rows.index(y) * (height + _GAP) + (height - thumbnail.height) // 2
        sheet.paste(thumbnail, (across, down))
    return sheet


def _room(plane: Plane, side: int) -> int:
    """Return the side of a cell, smaller than wanted where there are very many."""
    return min(side, *(_ROOM // len(labels) - _GAP for labels in (plane.columns, plane.rows)))


def _width(text: str) -> int:
    return max(round(font(_SMALL).getlength(line)) for line in text.split("\n"))


def write_contact_sheets(pictures: Sequence[Picture], files: Mapping[str, str], folder: Path) -> list[Path]:
    """Write all pictures that are there, 30 a sheet with their names and prompts, into `folder`/sheets; return the sheets."""
    there = [picture for picture in pictures if picture.identity in files]
    per_sheet = _COLUMNS * _ROWS
    paths = []
    for start in range(0, len(there), per_sheet):
        path = folder / SHEETS / f"contact-{start // per_sheet + 1}.png"
        _save(_draw_contact(there[start : start + per_sheet], files, folder), path)
        paths.append(path)
    _drop_older(folder, "contact", len(paths))
    return paths


def _drop_older(folder: Path, kind: str, written: int) -> None:
    """Where sheets were written, those that an earlier run numbered higher are gone."""
    for number in itertools.count(written + 1) if written else ():
        path = folder / SHEETS / f"{kind}-{number}.png"
        if not path.is_file():
            break
        try:
            path.unlink()
        except OSError as error:
            raise OutputError(
                f"{path}: is of an earlier run and cannot be removed ({error.strerror or error})"
            ) from error


def _draw_contact(pictures: Sequence[Picture], files: Mapping[str, str], folder: Path) -> Image.Image:
    columns = min(_COLUMNS, len(pictures))
    height = _SIDE + (1 + _CAPTION_LINES) * _LINE + 2 * _GAP
    size = (2 * _MARGIN + columns * (_SIDE + _GAP) - _GAP, 2 * _MARGIN + -(-len(pictures) // columns) * height - _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, picture in enumerate(pictures):
        left, top = _MARGIN + place % columns * (_SIDE + _GAP), _MARGIN + place // columns * height
        pen.rectangle((left, top, left + _SIDE - 1, top + _SIDE - 1), fill=_TILE)
        thumbnail = _thumbnail(folder / files[picture.identity], _SIDE)
        sheet.paste(thumbnail, (left + (_SIDE - thumbnail.width) // 2, top + (_SIDE - thumbnail.height) // 2))
        stem, _ = name_parts(picture.file.rpartition("/")[2])
        name = f"{stem.split('-')[0]}  seed {picture.request.seed}"
        pen.text((left, top + _SIDE + 6), fit(name, _SIDE, _SMALL), _FAINT, font(_SMALL))
        text = _lines(picture.request.prompt, _SIDE, _CAPTION_LINES)
        pen.text((left, top + _SIDE + 6 + _LINE), text, _INK, font(_SMALL))
    return sheet


def _thumbnail(path: Path | None, side: int) -> Image.Image:
    """Return the picture with `side` pixels on its longer side; a crossed square where there is none."""
    try:
        if path is not None:
            with Image.open(path) as picture:
                scale = side / max(picture.size)
                size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
                return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    except PICTURE_DAMAGE:
        pass
    crossed = Image.new("RGB", (side, side), _TILE)
    pen = ImageDraw.Draw(crossed)
    pen.line((0, 0, side, side), _FAINT)
    pen.line((0, side, side, 0), _FAINT)
    return crossed


def _lines(text: str, width: int, most: int) -> str:
    return "\n".join(fit(line, width, _SMALL) for line in wrap(text, width, _SMALL, most))


def _save(sheet: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")

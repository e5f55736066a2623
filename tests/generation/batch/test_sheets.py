"""Contact sheets and labelled grids: which picture is where, and what stands beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdlora.errors import ConfigError
from sdlora.generation.batch.plan import Picture
from sdlora.generation.batch.sheets import Layout, parse_layout, planes, write_contact_sheets, write_grids
from sdlora.generation.request import make_request

COLOURS = ((220, 30, 30), (30, 200, 30), (30, 30, 220), (220, 220, 30), (220, 30, 220), (30, 220, 220))


def picture(number: int, *point: tuple[str, str], **values: Any) -> Picture:
    request = make_request(**{"prompt": "a ball", "seed": number, **values})
    return Picture(f"id{number}", f"{number:05d}-a-ball.png", request, "jobs.txt:1", point)


def saved(pictures: list[Picture], folder: Path, size: tuple[int, int] = (64, 64)) -> dict[str, str]:
    """Each picture's file in its own colour; returns {identity: file}."""
    for one in pictures:
        Image.new("RGB", size, COLOURS[one.request.seed % 6]).save(folder / one.file)
    return {one.identity: one.file for one in pictures}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is drawn."""
    texts: list[str] = []
    real = ImageDraw.ImageDraw.text

    def draw(self: Any, xy: Any, text: str, *more: Any, **options: Any) -> None:
        texts.append(text)
        real(self, xy, text, *more, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", draw)
    return texts


def colours_in(sheet: Path) -> list[int]:
    """The numbers of the colours in the order in which they stand, row by row."""
    pixels = np.asarray(Image.open(sheet)).astype(int)
    found: dict[int, tuple[int, int]] = {}
    for number, colour in enumerate(COLOURS):
        rows, columns = np.nonzero(np.abs(pixels - np.array(colour)).max(axis=2) < 3)
        if len(rows):
            found[number] = (int(rows.min()), int(columns.min()))
    return sorted(found, key=found.__getitem__)


def test_a_grid_has_each_picture_in_its_row_and_column(tmp_path: Path, said: list[str]) -> None:
    points = [(("seed", s), ("weight", w)) for w in ("0.5", "1") for s in ("7", "8", "9")]
    pictures = [picture(number, *point) for number, point in enumerate(points)]
    files = saved(pictures, tmp_path)
    (sheet,) = write_grids(pictures, files, Layout("seed", "weight"), tmp_path)
    assert sheet == tmp_path / "sheets" / "grid-1.png"
    assert colours_in(sheet) == [0, 1, 2, 3, 4, 5]
    assert said == ["", "seed: 7", "seed: 8", "seed: 9", "weight: 0.5", "weight: 1"]
    (swapped,) = write_grids(pictures, files, Layout("weight", "seed"), tmp_path)
    assert colours_in(swapped) == [0, 3, 1, 4, 2, 5]


def test_other_axes_make_planes_with_their_names(tmp_path: Path, said: list[str]) -> None:
    points = [(("seed", s), ("adapter", a), ("steps", t)) for s in "12" for a in ("cat", "dog") for t in ("5", "9")]
    pictures = [picture(number, *point) for number, point in enumerate(points)]
    found = planes(pictures, Layout("seed", z="adapter"))
    assert [plane.title for plane in found] == [
        "adapter: cat, steps: 5",
        "adapter: cat, steps: 9",
        "adapter: dog, steps: 5",
        "adapter: dog, steps: 9",
    ]
    assert [picture.request.seed for picture in found[2].cells.values()] == [2, 6]
    assert len(write_grids(pictures, saved(pictures, tmp_path), Layout("seed", "adapter", "steps"), tmp_path)) == 2
    assert "steps: 5" in said and "adapter: dog" in said


def test_sheets_of_an_earlier_run_that_had_more_are_gone(tmp_path: Path) -> None:
    pictures = [picture(number, ("seed", str(number)), ("steps", "5")) for number in range(3)]
    files = saved(pictures, tmp_path)
    assert len(write_grids(pictures, files, Layout("steps", z="seed"), tmp_path)) == 3
    write_contact_sheets(pictures, files, tmp_path)
    (tmp_path / "sheets" / "contact-2.png").touch()
    write_grids(pictures[:1], files, Layout("steps", z="seed"), tmp_path)
    write_contact_sheets(pictures, files, tmp_path)
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["contact-1.png", "grid-1.png"]


def test_several_pictures_of_one_cell_are_on_further_planes() -> None:
    pictures = [picture(number, ("steps", "5" if number < 3 else "9")) for number in range(5)]
    found = planes(pictures, Layout("steps"))
    assert [[one.request.seed for one in plane.cells.values()] for plane in found] == [[0, 3], [1, 4], [2]]
    assert [plane.title for plane in found] == ["", "(2)", "(3)"]


def test_a_layout_is_taken_from_the_grid_or_named() -> None:
    pictures = [picture(0, ("seed", "1"), ("w", "64"), ("replace red", "blue"), ("cfg", "3"))]
    assert parse_layout([], pictures) == Layout("seed", "w", "replace red")
    assert parse_layout(["y=seed", "x=width"], pictures) == Layout("w", "seed")
    assert parse_layout(["x=replace", "z=guidance_scale"], pictures) == Layout("replace red", "", "cfg")
    assert parse_layout(["x=prompt", "y=steps"], pictures) == Layout("prompt", "steps")


def test_what_is_no_axis_of_the_grid_is_read_from_the_requests() -> None:
    adapters = ({"path": "loras/cat.safetensors", "weight": 0.5},)
    pictures = [picture(0, steps=5, adapters=adapters), picture(1, steps=9)]
    (plane,) = planes(pictures, Layout("steps", "adapters"))
    assert (plane.columns, plane.rows) == (("5", "9"), ("cat", "none"))
    assert planes(pictures, Layout("weight"))[0].columns == ("0.5", "none")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["seed"], "--xyz 'seed' is no axis of a picture"),
        (["a=seed"], "--xyz 'a=seed' is no axis of a picture"),
        (["x=sed"], "unknown setting 'sed'; did you mean seed?"),
        (["y=seed"], "--xyz names no x"),
        ([], "--xyz needs a grid"),
    ],
)
def test_wrong_layouts_are_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_layout(words, [picture(0)])
    assert sentence in str(caught.value)


def test_too_many_columns_are_refused_before_anything_is_made() -> None:
    with pytest.raises(ConfigError, match="seed has 200 values, a grid at most 105 in a line"):
        planes([picture(number) for number in range(200)], Layout("seed"))


def test_a_picture_that_is_not_there_is_a_crossed_cell(tmp_path: Path) -> None:
    pictures = [picture(number, ("seed", str(number))) for number in range(3)]
    files = saved(pictures[:2], tmp_path)
    (tmp_path / pictures[1].file).write_bytes(b"no picture")
    (sheet,) = write_grids(pictures, files, Layout("seed"), tmp_path)
    assert colours_in(sheet) == [0]
    assert Image.open(sheet).width > 3 * 256


def test_long_labels_are_wrapped_and_cut(tmp_path: Path, said: list[str]) -> None:
    pictures = [picture(0, ("prompt", "word " * 60 + "x" * 300), ("seed", "0"))]
    (sheet,) = write_grids(pictures, saved(pictures, tmp_path, (64, 32)), Layout("prompt", "seed"), tmp_path)
    label = next(text for text in said if text.startswith("prompt: "))
    assert label.count("\n") == 3 and label.endswith("...")
    assert Image.open(sheet).height < 300  # as flat as the picture


def test_contact_sheets_hold_thirty_each(tmp_path: Path, said: list[str]) -> None:
    pictures = [picture(number) for number in range(32)]
    files = saved(pictures, tmp_path)
    del files["id1"]
    sheets = write_contact_sheets(pictures, files, tmp_path)
    assert [sheet.name for sheet in sheets] == ["contact-1.png", "contact-2.png"]
    assert Image.open(sheets[1]).width < 350
    assert "00000  seed 0" in said and "00001  seed 1" not in said and said.count("a ball") == 31
    assert write_contact_sheets(pictures, {}, tmp_path) == []

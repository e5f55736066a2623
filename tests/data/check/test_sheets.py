"""The contact sheets show what the model will see, and nothing that a file is called can break them."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from check_help import check, photo, save
from PIL import Image, ImageDraw

from sdlora import lettering
from sdlora.data.check import Report, sheet, write_page, write_sheets
from sdlora.data.check.drawing import draw, draw_all

RED = (220, 40, 40)


def drawn(report: Report, number: int = 0, side: int = 128) -> np.ndarray:
    """Return the pixels of one drawing, [h,w,3]."""
    picture = report.pictures[number]
    return np.asarray(draw(picture, side, picture.sample.source())).astype(int)


def close(pixel: np.ndarray, colour: tuple[int, int, int], by: int = 6) -> bool:
    return bool(np.abs(pixel - np.array(colour)).max() <= by)


# --- drawings ----------------------------------------------------------------------------------------


def test_what_is_cropped_away_is_dark_and_the_crop_has_a_frame(tmp_path: Path) -> None:
    # 10:1 into 128x32, the longest shape at 64 pixels: of 1000 pixels 400 are kept, from 300 on.
    save(tmp_path, "long.png", Image.new("RGB", (1000, 100), RED))
    pixels = drawn(check(tmp_path), side=500)
    assert pixels.shape == (50, 500, 3)
    row = pixels[25]
    assert close(row[250], RED) and close(row[155], RED) and close(row[345], RED)
    assert row[100].max() < 100 and row[400].max() < 100
    assert close(row[150], (0, 0, 0)) and close(row[151], (255, 255, 255))
    assert close(row[349], (0, 0, 0)) and close(row[348], (255, 255, 255))


def test_several_crops_have_a_frame_each(tmp_path: Path) -> None:
    save(tmp_path, "long.png", Image.new("RGB", (1000, 100), RED))
    row = drawn(check(tmp_path, crops=3), side=500)[25]
    edges = np.flatnonzero((row == 255).all(axis=1))
    assert len(edges) == 6
    assert sum(close(pixel, RED) for pixel in row) > 200


def test_a_whole_picture_is_nowhere_dark(tmp_path: Path) -> None:
    save(tmp_path, "square.png", Image.new("RGB", (100, 100), RED))
    pixels = drawn(check(tmp_path))
    assert all(close(pixel, RED) for pixel in pixels[2:-2, 2:-2].reshape(-1, 3))


def test_what_is_masked_out_is_tinted(tmp_path: Path) -> None:
    save(tmp_path, "a.png", Image.new("RGB", (100, 100), (40, 120, 40)))
    mask = Image.new("L", (50, 50))
    mask.paste(255, (0, 0, 25, 50))
    mask.save(tmp_path / "a-masklabel.png")
    pixels = drawn(check(tmp_path))
    assert close(pixels[64, 30], (40, 120, 40))
    red, green, blue = pixels[64, 100]
    assert red > 140 and green < 70 and blue > 80


def test_it_is_upright_with_the_background_behind(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 96), (10, 200, 10))
    picture.paste((200, 10, 10), (0, 0, 32, 96))
    exif = Image.Exif()
    exif[0x0112] = 6  # the left half of the file is the top
    save(tmp_path, "a.jpg", picture, exif=exif, quality=95)
    clear = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    save(tmp_path, "b.png", clear)
    report = check(tmp_path, background="#2040a0")
    turned = drawn(report)
    assert turned.shape == (85, 128, 3)
    assert close(turned[20, 64], (200, 10, 10), 12) and close(turned[65, 64], (10, 200, 10), 12)
    assert close(drawn(report, 1)[64, 64], (0x20, 0x40, 0xA0))


def test_what_cannot_be_read_is_a_crossed_square(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_text("a")
    save(tmp_path, "b.png", 1)
    report = check(tmp_path)
    sizes = list(draw_all(report.pictures, 40, lambda picture: (picture.size, picture.getpixel((20, 20)))))
    assert sizes[0] == ((40, 40), (255, 255, 255)) and sizes[1][0] == (40, 40)


# --- page --------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Collects the elements of a page and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


HOSTILE = "zorblin <script>alert(1)</script> & \"quoted\" 'too' <img src=x onerror=alert(2)>"


def page_of(report: Report, path: Path) -> Outline:
    write_page(report, path)
    return Outline(path.read_text(encoding="utf-8"))


def test_the_page_has_a_card_for_each_picture(tmp_path: Path) -> None:
    for seed in range(3):
        save(tmp_path / "set", f"{seed}.png", photo(seed, (128, 64)), f"zorblin, thing {seed}")
    save(tmp_path / "set", "3.jpg", photo(0, (128, 64)), "zorblin, once more")
    page = page_of(check(tmp_path / "set", trigger="zorblin"), tmp_path / "page.html")
    cards, images = page.all("figure"), page.all("img")
    assert [card["id"] for card in cards] == ["p1", "p2", "p3", "p4"]
    assert [(image["width"], image["height"], image["loading"]) for image in images] == [("256", "128", "lazy")] * 4
    kind, _, data = str(images[1]["src"]).partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 128)
    assert "zorblin, thing 1" in page.text and "128x64 -> 88x40, 9.1% cropped" in page.text
    assert "found-near-duplicate" in str(cards[0]["data-is"]) and "found" not in str(cards[1]["data-is"])
    assert {"href": "#p4"} in page.all("a")
    assert [button["data-mark"] for button in page.all("button") if button.get("data-group") == "found"] == [
        "found-near-duplicate"
    ]


def test_nothing_in_a_data_set_becomes_markup(tmp_path: Path) -> None:
    folder = tmp_path / "a <b> & c"
    save(folder, "<i>'x'&\".png", 1, HOSTILE)
    save(
        folder,
        "y.png",
        2,
        HOSTILE + " two",
    )
    clean = page_of(check(folder, trigger="<script>alert(1)</script>"), tmp_path / "page.html")
    assert len(clean.all("script")) == 1 and len(clean.all("img")) == 2
    assert not clean.all("i") and not any("onerror" in image for image in clean.all("img"))
    assert HOSTILE in clean.text and "<i>'x'&\".png" in clean.text and "a <b> & c" in clean.text
    assert clean.all("img")[0]["alt"] == "<i>'x'&\".png"


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    save(tmp_path / "set", "a.png", 1)
    page = page_of(check(tmp_path / "set"), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", text) and not page.all("link")
    assert page.all("nav")[0].get("hidden", "no") is None  # its buttons would do nothing without the script
    assert "default-src 'none'" in str(page.all("meta"))


def test_the_page_says_what_was_found_and_marks_the_trigger(tmp_path: Path) -> None:
    save(tmp_path / "set", "a.png", photo(1, (32, 32)), "one Zorblin, red, green")
    report = check(tmp_path / "set", trigger="zorblin", captions={"shuffle": True, "keep_tags": 1})
    page = page_of(report, tmp_path / "page.html")
    assert "32x32 is enlarged 2.0x for 64x64" in page.text and "enlarging adds blur" in page.text
    assert "2 texts" in page.text and len(page.all("mark")) == 1
    assert any(badge.get("title") == "one Zorblin, green, red" for badge in page.all("span"))


def test_an_empty_page_is_a_page(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"")
    page = page_of(check(tmp_path / "set"), tmp_path / "page.html")
    assert page.all("figure") == [] and "would refuse" in page.text


# --- sheets ------------------------------------------------------------------------------------------


def test_a_sheet_holds_thirty_pictures_and_the_rest_goes_on(tmp_path: Path) -> None:
    for seed in range(32):
        save(tmp_path / "set", f"{seed:02d}.png", photo(seed, (32, 32)), f"thing {seed}")
    paths = write_sheets(check(tmp_path / "set"), tmp_path / "sheet.png")
    assert [path.name for path in paths] == ["sheet.png", "sheet-2.png"]
    first, second = (Image.open(path) for path in paths)
    assert first.format == "PNG" and first.width == second.width and first.height > 5 * second.height / 2
    again = write_sheets(check(tmp_path / "set"), tmp_path / "again.png")
    assert again[0].read_bytes() == paths[0].read_bytes()


def test_of_too_many_pictures_those_with_warnings_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheet, "ROWS", 1)
    monkeypatch.setattr(sheet, "MOST_SHEETS", 1)
    said: list[str] = []
    real = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, **options: object) -> None:
        said.append(text)
        real(self, xy, text, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    for seed in range(8):
        save(tmp_path / "set", f"{seed}.png", photo(seed, (32 if seed > 5 else 64,) * 2), f"thing {seed}")
    assert len(write_sheets(check(tmp_path / "set"), tmp_path / "sheet.png")) == 1
    names = [line.split()[1] for line in said if re.fullmatch(r"\d+ +\d\.png", line)]
    assert names == ["0.png", "1.png", "2.png", "6.png", "7.png"]
    assert "5 of 8 pictures, those with errors and warnings before others; --html shows all" in said


def test_long_captions_are_cut_and_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "set", "a.png", photo(1), "word " * 200 + "x" * 400)
    monkeypatch.setattr(lettering, "_FONTS", ())
    lettering.font.cache_clear()
    (path,) = write_sheets(check(tmp_path / "set"), tmp_path / "sheet.png")
    lettering.font.cache_clear()
    assert Image.open(path).height < 700

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sdlora.errors import ConfigError, FormatError, OutputError
from sdlora.generation.pictures.files import picture_name, read_recipe, save_picture
from sdlora.generation.pictures.infotext import infotext
from sdlora.generation.pictures.texts import read_texts
from sdlora.generation.recipe import Recipe


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8))


def test_a_saved_picture_holds_pixels_recipe_and_infotext(picture, recipe, tmp_path):
    path = tmp_path / "new" / "a.png"
    save_picture(picture, recipe, path)
    assert read_recipe(path) == recipe
    with Image.open(path) as opened:
        assert opened.format == "PNG"
        assert opened.info["parameters"] == infotext(recipe)
        assert np.array_equal(np.asarray(opened), np.asarray(picture))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red ball!", "00041-a-red-ball.png"),
        ("../../etc/passwd", "00041-etc-passwd.png"),
        ("", "00041-picture.png"),
        ("???", "00041-picture.png"),
        ("猫 café", "00041-猫-café.png"),
        ("x" * 500, f"00041-{'x' * 60}.png"),
    ],
)
def test_picture_names(recipe, prompt, name):
    assert picture_name(replace(recipe, prompt=prompt)) == name


def test_the_longest_name_in_a_wide_script_can_be_written(picture, recipe, tmp_path):
    wide = replace(recipe, prompt="\U00020000" * 100)
    save_picture(picture, wide, tmp_path / picture_name(wide))
    assert read_recipe(tmp_path / picture_name(wide)) == wide


def test_a_picture_without_recipe_and_a_file_that_is_none_are_refused(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    with pytest.raises(FormatError, match=r"a\.png: carries no sdlora recipe"):
        read_recipe(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("hello")
    with pytest.raises(FormatError, match=r"b\.png: cannot be read as a picture"):
        read_recipe(tmp_path / "b.png")
    with pytest.raises(FormatError, match=r"c\.png: cannot be read as a picture"):
        read_recipe(tmp_path / "c.png")


def test_a_place_that_cannot_be_written_is_refused(picture, recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_picture(picture, recipe, tmp_path / "file" / "a.png")


def test_random_damage_is_refused_or_harmless(picture, recipe, tmp_path):
    path = tmp_path / "a.png"
    save_picture(picture, recipe, path)
    sound, draw, refused = path.read_bytes(), random.Random(5), 0
    for _ in range(400):
        data = bytearray(sound)
        for _ in range(draw.choice((1, 3))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            read_recipe(path)
        except FormatError:
            refused += 1
    assert refused > 50


# --- JPEG and WebP ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
def test_every_format_carries_recipe_and_infotext(picture, recipe, tmp_path, suffix):
    path = save_picture(picture, recipe, tmp_path / f"a{suffix}")
    assert path == tmp_path / f"a{suffix}"
    assert read_recipe(path) == recipe
    assert read_texts(path).texts["parameters"] == infotext(recipe)


def test_a_jpeg_holds_the_infotext_as_other_programs_look_for_it(picture, recipe, tmp_path):
    path = save_picture(picture, recipe, tmp_path / "a.jpg")
    with Image.open(path) as opened:
        raw = opened.info["exif"]
    assert b"UNICODE\0" + infotext(recipe).encode("utf-16-be") in raw
    assert infotext(recipe).encode("utf-16-le") not in raw


@pytest.mark.parametrize("code", ["utf-16-le", "utf-16-be", "utf-16"])
def test_comments_of_either_order_of_bytes_are_read(picture, tmp_path, code):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a cat, 猫, Steps: 20".encode(code)
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert read_texts(tmp_path / "a.jpg").texts["parameters"] == "a cat, 猫, Steps: 20"


@pytest.mark.parametrize("comment", [b"ASCII\0\0\0a cat", b"\0\0\0\0\0\0\0\0a cat", b"a cat"])
def test_comments_in_other_encodings_are_read(picture, tmp_path, comment):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    picture.save(tmp_path / "a.webp", exif=exif)
    assert read_texts(tmp_path / "a.webp").texts["parameters"] == "a cat"


def test_xmp_that_another_program_wrote_again_is_read(picture, recipe, tmp_path):
    quoted = json.dumps(json.loads(recipe.to_json())).replace("&", "&amp;").replace('"', "&quot;")
    packet = f'<rdf:Description xmlns:sdlora="urn:sdlora:picture:1:" sdlora:recipe="{quoted}"/>'
    picture.save(tmp_path / "a.jpg", xmp=packet.encode())
    assert read_recipe(tmp_path / "a.jpg") == recipe


def test_quality_is_what_was_asked_for(picture, recipe, tmp_path):
    def error(path):
        with Image.open(path) as opened:
            return np.abs(np.asarray(opened.convert("RGB")).astype(int) - np.asarray(picture)).mean()

    paths = [save_picture(picture, recipe, tmp_path / "a.jpg", quality=quality) for quality in (10, 95)]
    assert error(paths[0]) > 2 * error(paths[1]) > 0
    assert error(save_picture(picture, recipe, tmp_path / "a.webp")) > 0
    assert error(save_picture(picture, recipe, tmp_path / "b.webp", lossless=True)) == 0


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("a.gif", {}, "saved as .png, .jpg, .jpeg or .webp, not as '.gif'"),
        ("a", {}, "not as 'a name without suffix'"),
        ("a.jpg", {"quality": 0}, "quality is 0; expected 1 to 100"),
        ("a.png", {"quality": 80}, "a png keeps every bit"),
        ("a.jpg", {"lossless": True}, "a jpg cannot be lossless"),
    ],
)
def test_what_makes_no_sense_is_refused(picture, recipe, tmp_path, name, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        save_picture(picture, recipe, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_too_long_for_a_jpeg_is_refused_and_leaves_nothing(picture, recipe, tmp_path):
    long = replace(recipe, prompt="word " * 10_000)
    with pytest.raises(
        ConfigError, match=r"a\.jpg: cannot be written \(the prompt is too long for a JPEG.*save as PNG"
    ):
        save_picture(picture, long, tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []
    assert read_recipe(save_picture(picture, long, tmp_path / "a.webp")) == long


def test_half_a_character_of_a_command_line_is_written_as_a_question_mark(picture, recipe, tmp_path):
    for suffix in (".png", ".jpg", ".webp"):
        path = save_picture(picture, replace(recipe, prompt="b\udcff"), tmp_path / f"a{suffix}")
        assert read_texts(path).texts["parameters"].startswith("b? <lora")


# --- never overwritten --------------------------------------------------------------------------------


def test_nothing_is_overwritten(picture, recipe, tmp_path):
    first = save_picture(picture, recipe, tmp_path / "a.png")
    kept = first.read_bytes()
    others = [save_picture(picture, replace(recipe, seed=seed), tmp_path / "a.png") for seed in (1, 2)]
    assert [path.name for path in others] == ["a-2.png", "a-3.png"]
    assert first.read_bytes() == kept
    assert [read_recipe(path).seed for path in others] == [1, 2]


def test_what_is_to_be_replaced_is(picture, recipe, tmp_path):
    save_picture(picture, recipe, tmp_path / "a.png")
    path = save_picture(picture, replace(recipe, seed=1), str(tmp_path / "a.png"), replace=True)
    assert path == tmp_path / "a.png" and read_recipe(path).seed == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False])
def test_many_at_once_all_get_names_of_their_own(picture, recipe, tmp_path, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)

    def save(seed):  # of a copy: Pillow notes on the picture how it is being saved
        return save_picture(picture.copy(), replace(recipe, seed=seed), tmp_path / "a.png")

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(save, range(40)))
    assert sorted(read_recipe(path).seed for path in paths) == list(range(40))
    assert sorted(tmp_path.iterdir()) == sorted(paths)


# --- recipes of other versions ------------------------------------------------------------------------


def test_a_recipe_of_a_newer_version_is_refused_by_name(picture, recipe):
    text = recipe.to_json().replace('"seed": 41', '"seed": 41, "tiling": true').replace("0.1.0", "9.9")
    with pytest.raises(FormatError, match=r"of sdlora 9\.9, says 'tiling', which this version does not know"):
        Recipe.from_json(text)
    inner = recipe.to_json().replace('"weight": 0.8', '"weight": 0.8, "masks": []')
    with pytest.raises(FormatError, match="says 'masks'"):
        Recipe.from_json(inner)


def test_a_recipe_of_wrong_types_is_refused(recipe):
    with pytest.raises(FormatError, match="not a recipe of sdlora \\(seed: "):
        Recipe.from_json(recipe.to_json().replace('"seed": 41', '"seed": "many"'))

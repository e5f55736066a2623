import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sdlora.errors import FormatError, OutputError
from sdlora.generation.pictures import infotext, picture_name, read_recipe, save_picture


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


def test_the_infotext_is_what_other_programs_read(recipe):
    assert infotext(recipe) == (
        'ein roter Ball, "schön", 猫 <lora:zorb:0.8>\n'
        "Negative prompt: blurry, blue\n"
        "Steps: 20, Sampler: PNDMScheduler, CFG scale: 6.5, Seed: 41, Size: 24x16, Model hash: ababababab, "
        'Model: dreamy, RNG: CPU, Lora hashes: "zorb: efefefefefef", Version: sdlora 0.1.0'
    )


def test_the_infotext_without_negative_prompt_and_adapter(recipe):
    lines = infotext(replace(recipe, negative_prompt="", adapters=(), prompt="a ball", base="a, b")).split("\n")
    assert lines[0] == "a ball"
    assert len(lines) == 2
    assert "Lora" not in lines[1]
    assert 'Model: "a, b", ' in lines[1]


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
    assert 50 < refused < 400

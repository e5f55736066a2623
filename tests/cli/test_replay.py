"""`sdlora replay` and `sdlora history` as a user meets them, `sdlora generate` before them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from sdlora import read_recipe, save_picture, write_adapter
from sdlora.cli import main as cli

THEIRS = (
    "a ball <lora:zorb:0.5> <lora:gone:1>\nSteps: 2, Sampler: Euler a, CFG scale: 4, Seed: 9, Size: 64x64, "
    "Model hash: 6ce0161689, Model: v1-5-pruned, Version: v1.10.1"
)

NOTE = "its UNet's file holds 1 tensors for which"


@pytest.fixture
def base(tiny_folder, tmp_path):
    """A base whose UNet has a tensor that no model of its family has, which is told."""
    folder = Path(shutil.copytree(tiny_folder("sd1"), tmp_path / "base"))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "odd": torch.zeros(1)}, file)
    return str(folder)


@pytest.fixture
def library(tmp_path, tiny_base, make_adapter):
    write_adapter(make_adapter(tiny_base("sd1")), tmp_path / "lib" / "zorb.safetensors")
    return tmp_path / "lib"


@pytest.fixture
def made(base, library, tmp_path):
    """A picture of `sdlora generate`."""
    adapter = f"{library / 'zorb.safetensors'}:0.5"
    flags = [
        "--base",
        base,
        "--precision",
        "fp32",
        "--adapter",
        adapter,
        "--steps",
        "2",
        "--seed",
        "5",
        "--out",
        str(tmp_path / "out"),
    ]
    assert (
        cli.main(
            ["generate", *flags, "--prompt", "a {red} ball", "--name", "{date}/{seed}-{adapters}", "--format", "webp"]
        )
        == 0
    )
    (path,) = (tmp_path / "out").glob("*/5-zorb.webp")
    return path


def test_made_replayed_found_and_rated(made, base, library, tmp_path, capsys):
    (library / "zorb.safetensors").rename(library / "other.safetensors")
    flags = ["--base", base, "--library", str(library), "--out", str(tmp_path / "again"), "--offload", "model"]
    assert cli.main(["replay", str(made), *flags]) == 0
    said, told = capsys.readouterr()
    assert f"note: {NOTE}" in told
    assert "not the same: adapter zorb: name: zorb then, other now" in said
    assert "identical: all 4096 pixels are the same" in said
    assert (tmp_path / "again" / "5-zorb-replayed.png").is_file()

    assert cli.main(["history", "rate", str(made), "4"]) == 0
    capsys.readouterr()
    assert cli.main(["history", str(tmp_path / "out"), "--prompt", "ball", "--adapter", "zorb", "--rating", "4"]) == 0
    said = capsys.readouterr().out
    assert re.search(
        rf"\*\*\*\*\.  {re.escape(str(made))}  seed 5  a \{{red\}} ball \+ zorb:0.5\n1 of the 1 pictures", said
    )
    assert cli.main(["history", str(tmp_path / "out"), "--json", "--rebuild", "--until", "2020-01-01"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_changed_pixels_are_counted_and_make_the_status_1(made, base, library, tmp_path, capsys):
    with Image.open(made) as opened:
        pixels = np.array(opened.convert("RGB"))
    path = save_picture(Image.fromarray(255 - pixels), read_recipe(made), tmp_path / "b.png")
    assert cli.main(["replay", str(path), "--base", base, "--library", str(library)]) == 1
    assert re.search(r"different: \d+ of 4096 pixels differ, by \d+ of 255 at most", capsys.readouterr().out)


def test_nothing_is_made_where_only_the_recipe_is_asked_for(made, capsys):
    assert cli.main(["replay", str(made), "--show"]) == 0
    said = capsys.readouterr().out
    assert "prompt: a {red} ball" in said and "adapter: zorb at 0.5" in said and "identical" not in said


@pytest.fixture
def theirs(tmp_path):
    info = PngInfo()
    info.add_text("parameters", THEIRS)
    Image.new("RGB", (64, 64)).save(tmp_path / "theirs.png", pnginfo=info)
    return tmp_path / "theirs.png"


def test_another_programs_picture_becomes_a_request(theirs, base, library, tmp_path, capsys):
    flags = ["--library", str(library), "--out", str(tmp_path / "out")]
    assert cli.main(["replay", str(theirs), *flags]) == 2
    said = capsys.readouterr()
    assert "made by: AUTOMATIC1111" in said.out and "left out: adapter gone, which is not in the library" in said.out
    assert "--base is not given; name the base to make it with, v1-5-pruned (6ce0161689)" in said.err
    assert cli.main(["replay", str(theirs), *flags, "--base", base, "--offload", "model"]) == 0
    assert f"note: {NOTE}" in capsys.readouterr().err
    (path,) = (tmp_path / "out").glob("*.png")
    recipe = read_recipe(path)
    assert (recipe.seed, recipe.steps, recipe.guidance_scale, recipe.prompt) == (9, 2, 4.0, "a ball")
    assert [(item.name, item.weight) for item in recipe.adapters] == [("zorb", 0.5)]


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["replay", "gone.png"], 1, "FormatError: gone.png: there is no such picture"),
        (["replay", "lib"], 1, "FormatError: lib: there is no such picture"),
        (
            ["replay", "theirs.png", "--out", "theirs.png"],
            1,
            "OutputError: theirs.png: cannot be used as output folder",
        ),
        (["history", "gone"], 1, "gone: there is no such folder"),
        (["history", ".", "--rating", "7"], 2, "ConfigError: rating is 7; expected 1 to 5 stars"),
        (["history", ".", "--limit", "0"], 2, "ConfigError: limit is 0; expected 1 or more"),
        (["history", "rate", "theirs.png", "many"], 2, "ConfigError: a rating is 'many'; expected 1 to 5 stars"),
        (["history", "rate", "gone.png", "3"], 1, "FormatError: gone.png: cannot be read"),
        (["generate", "--prompt", "a", "--base", "tiny", "--name", "{sed}"], 2, "did you mean {seed}?"),
        (
            ["generate", "--prompt", "a", "--base", "tiny", "--format", "jpg", "--lossless"],
            2,
            "a jpg cannot be lossless",
        ),
    ],
)
def test_mistakes_are_one_sentence(theirs, library, monkeypatch, capsys, arguments, status, sentence):
    monkeypatch.chdir(theirs.parent)
    assert cli.main(arguments) == status
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and "Traceback" not in error


def test_a_date_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["history", "--since", "yesterday"])
    assert caught.value.code == 2 and "'yesterday' is no date; expected 2026-11-22" in capsys.readouterr().err

"""`sdlora generate` with pictures to start from, and when it is interrupted."""

from __future__ import annotations

import os
import pty
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from control_files import draw_map, random_control, write_original
from forked import forked, needs_fork
from PIL import Image

from sdlora import read_recipe
from sdlora.cli import main as cli


@pytest.fixture
def usual(tiny_folder: Any, tmp_path: Path) -> list[str]:
    return [
        "generate",
        "--base",
        str(tiny_folder("sd1")),
        "--prompt",
        "x",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]


def test_the_flags_reach_the_recipe(usual: list[str], tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), (200, 10, 10)).save(tmp_path / "photo.png")
    mask = Image.new("L", (64, 48))
    mask.paste(255, (32, 0, 64, 48))
    mask.save(tmp_path / "mask.png")
    flags = ["--image", str(tmp_path / "photo.png"), "--strength", "0.5", "--mask", str(tmp_path / "mask.png")]
    flags += ["--mask-blur", "0", "--inpaint-area", "only masked", "--masked-padding", "8", "--vae-tiling", "on"]
    assert cli.main([*usual, *flags]) == 0
    (path,) = (tmp_path / "out").glob("*.png")
    recipe = read_recipe(path)
    assert recipe.start and recipe.start.mask and recipe.start.strength == 0.5
    assert (recipe.start.mask.blur, recipe.start.mask.area, recipe.start.mask.padding) == (0, "only masked", 8)
    with Image.open(path) as made:
        assert made.size == (64, 48) and made.getpixel((5, 5)) == (200, 10, 10)


def test_controlnets_by_flags(
    usual: list[str], tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = write_original(random_control(tiny_base("sd1").unet), tmp_path / "net.safetensors")
    image, other = draw_map(tmp_path / "a.png"), draw_map(tmp_path / "b: 2.png", 1)
    assert cli.main([*usual, "--control", net, image, "0.5", "0-0.6", "--control", net, other]) == 0
    (path,) = (tmp_path / "out").glob("*.png")
    used = read_recipe(path).controls
    assert [(one.model, one.picture.name, one.strength, one.end) for one in used] == [
        ("net.safetensors", "a.png", 0.5, 0.6),
        ("net.safetensors", "b: 2.png", 1.0, 1.0),
    ]
    monkeypatch.setattr("sdlora.cli.generate.load_engine", lambda *_: pytest.fail("the base was loaded"))
    foreign = write_original(random_control(tiny_base("sd2").unet), tmp_path / "two.safetensors")
    assert cli.main([*usual, "--control", foreign, image]) == 1


def test_a_second_pass(usual: list[str], tmp_path: Path) -> None:
    assert cli.main([*usual, "--hires-scale", "1.5", "--hires-steps", "1", "--hires-upscaler", "lanczos"]) == 0
    (path,) = (tmp_path / "out").glob("*.png")
    with Image.open(path) as made:
        assert made.size == (96, 96)
    assert read_recipe(path).hires


@pytest.mark.parametrize(
    ("flags", "status", "sentence"),
    [
        (["--image", "missing.png"], 1, "DataError: missing.png: cannot be read (No such file or directory)"),
        (["--mask", "m.png"], 2, "ConfigError: request: mask is given without image"),
        (["--strength", "1.5"], 2, "ConfigError: request: strength is 1.5"),
        (["--hires-scale", "2", "--hires-upscaler", "foo"], 2, "ConfigError: hires_upscaler is 'foo'"),
    ],
)
def test_mistakes_are_one_line_before_a_base_is_loaded(
    usual: list[str], capsys: pytest.CaptureFixture[str], flags: list[str], status: int, sentence: str
) -> None:
    assert cli.main([*usual, "--base", "no/such/base", *flags]) == status
    error = capsys.readouterr().err
    assert error.startswith(sentence) and error.count("\n") == 1


@needs_fork
def test_ctrl_c_ends_it_with_one_line_and_nothing_half_written(usual: list[str], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with (tmp_path / "stderr").open("w") as stderr, os.fdopen(reading) as stdout:
        words = [*usual, "--steps", "20", "--count", "500"]
        running = forked(lambda: cli.main(words), writing, stderr.fileno())
        os.close(writing)
        assert "00000-x.png" in stdout.readline()  # the next one is on its way
        time.sleep(0.2)
        os.kill(running.pid or 0, signal.SIGINT)
        stdout.read()
        running.join(180)
    assert running.exitcode == 130
    assert (tmp_path / "stderr").read_text() == "interrupted\n"
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == [f"{number:05d}-x.png" for number in range(len(names))]
    for name in names:
        assert read_recipe(tmp_path / "out" / name).steps == 20


@needs_fork
def test_a_terminal_shows_steps_and_the_time_left(usual: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    running = forked(lambda: cli.main([*usual, "--steps", "30", "--count", "2"]), slave)
    os.close(slave)
    said = b""
    while True:
        try:
            said += os.read(master, 65536)
        except OSError:  # the terminal's other end is closed
            break
    os.close(master)
    running.join(180)
    assert running.exitcode == 0
    assert b"picture 1 of 2, step " in said and b" of 31" in said and b"0:00:0" in said
    assert b"00001-x.png" in said

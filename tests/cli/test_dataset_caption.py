"""`sdlora dataset caption`, with a tiny model, as a person meets it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_captioners import save_captioner

from sdlora.cli import dataset_caption
from sdlora.errors import ConfigError, DataError, ModelError
from sdlora.families.captioner import Captioner


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_captioner("git", tmp_path_factory.mktemp("models") / "git"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures, the second with a person's caption, and room for more."""
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    for name in ("1.png", "2.png", "sub/3.jpg"):
        Image.new("RGB", (30, 20), "red").save(pictures / name)
    (pictures / "2.caption").write_text("mine")
    return pictures


def caption(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    dataset_caption.add_parser(parser.add_subparsers())
    options = parser.parse_args(["caption", *map(str, arguments), "--device", "cpu"])
    return int(options.run(options))


def captions(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*.*")
        if path.suffix not in (".png", ".jpg", ".webp")
    }


def test_pictures_without_caption_get_one(folder, model, capsys):
    assert caption(folder, "--model", model, "--prefix", "[trigger], ", "--suffix", ".") == 0
    assert captions(folder) == {
        "1.txt": "[trigger], a red cat.\n",
        "2.caption": "mine",
        "sub/3.txt": "[trigger], a red cat.\n",
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"loading {model}"
    assert lines[-1] == (f"2 captions written, 1 kept, 0 failed; for example {folder / '1.png'}: [trigger], a red cat.")
    assert caption(folder, "--model", "there/is/none") == 0  # nothing to do, so no model is needed
    assert capsys.readouterr().out == f"every picture in {folder} has a caption; --overwrite writes new ones\n"


def test_the_options_reach_the_model(folder, model, monkeypatch):
    asked = []
    real = Captioner.describe

    def describe(self, pictures, **options):
        asked.append((len(pictures), options))
        return real(self, pictures, **options)

    monkeypatch.setattr(Captioner, "describe", describe)
    flags = ["--batch-size", 2, "--max-tokens", 2, "--beams", 3, "--prompt", "a", "--extension", ".caption"]
    assert caption(folder, "--model", model, *flags, "--precision", "bf16") == 0
    assert asked == [(2, {"max_tokens": 2, "beams": 3})]
    assert captions(folder) == {"1.caption": "red cat\n", "2.caption": "mine", "sub/3.caption": "red cat\n"}


def test_a_dry_run_prints_and_writes_nothing(folder, model, capsys):
    assert caption(folder, "--model", model, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        f"{folder / '1.png'}: a red cat",
        f"{folder / 'sub/3.jpg'}: a red cat",
        f"2 captions tried out, 1 kept, 0 failed; for example {folder / '1.png'}: a red cat",
    ]
    assert captions(folder) == {"2.caption": "mine"}


def test_overwriting_is_asked_for(folder, model, capsys):
    assert caption(folder, "--model", model, "--overwrite") == 0
    written = {"1.txt": "a red cat\n", "2.txt": "a red cat\n", "sub/3.txt": "a red cat\n"}
    assert captions(folder) == written | {"2.caption.bak": "mine"}
    assert "3 captions written, 0 kept, 0 failed" in capsys.readouterr().out


def test_unreadable_pictures_are_told_of_at_the_end(folder, model, capsys):
    (folder / "0.png").write_bytes(b"nothing")
    Image.new("RGB", (9, 9)).save(folder / "1.webp")
    assert caption(folder, "--model", model) == 1
    assert captions(folder) == {"1.txt": "a red cat\n", "2.caption": "mine", "sub/3.txt": "a red cat\n"}
    printed = capsys.readouterr()
    assert "2 captions written, 1 kept, 1 failed" in printed.out
    shared, failed = printed.err.splitlines()
    assert shared == f"{folder / '1.webp'}: shares its caption file with another picture of that name; left out"
    assert failed.startswith(f"no caption: {folder / '0.png'}: ")


def test_stopped_it_goes_on_where_it_was(folder, model, capsys, monkeypatch):
    calls = iter([["first"]])

    def describe(self, pictures, **options):
        try:
            return next(calls)
        except StopIteration:
            raise KeyboardInterrupt from None

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Captioner, "describe", describe)
        caption(folder, "--model", model)
    assert captions(folder) == {"1.txt": "first\n", "2.caption": "mine"}
    assert "stopped: 1 caption written, 1 kept, 0 failed; for example" in capsys.readouterr().out
    assert caption(folder, "--model", model) == 0
    assert captions(folder) == {"1.txt": "first\n", "2.caption": "mine", "sub/3.txt": "a red cat\n"}


def test_a_caption_written_meanwhile_is_kept(folder, model, capsys, monkeypatch):
    def describe(self, pictures, **options):
        (folder / "1.txt").write_text("quicker")
        return ["slow"]

    monkeypatch.setattr(Captioner, "describe", describe)
    assert caption(folder, "--model", model) == 0
    assert captions(folder) == {"1.txt": "quicker", "2.caption": "mine", "sub/3.txt": "slow\n"}
    assert "1 caption written, 2 kept, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--batch-size", "0"], "--batch-size is 0; expected 1 or more"),
        (["--max-tokens", "-3"], "--max-tokens is -3; expected 1 or more"),
        (["--beams", "-1"], "--beams is -1; expected 0 or more"),
    ],
)
def test_wrong_numbers_are_one_sentence(folder, flags, sentence):
    with pytest.raises(ConfigError, match=f"^{sentence}$"):
        caption(folder, "--model", "none", *flags)


def test_what_is_not_there_is_told(folder, tmp_path):
    with pytest.raises(DataError, match="nothing: there is no such folder"):
        caption(tmp_path / "nothing", "--model", "none")
    with pytest.raises(ModelError, match="none: there is no such folder; --model takes"):
        caption(folder, "--model", "none")


def test_a_caption_file_can_be_no_picture(folder, capsys):
    with pytest.raises(SystemExit):
        caption(folder, "--model", "none", "--extension", ".png")
    assert "invalid choice: '.png'" in capsys.readouterr().err


def test_lines_tell_how_far_it_is_where_there_is_no_terminal(folder, model, capsys, monkeypatch):
    monkeypatch.setattr(dataset_caption, "_SECONDS_BETWEEN_LINES", 0.0)
    assert caption(folder, "--model", model) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == ["1 of 2", "2 of 2"]


def test_help_is_quick():
    """Without the libraries whose import takes seconds."""
    code = (
        "import argparse, sys\nfrom sdlora.cli import dataset_caption\n"
        "dataset_caption.add_parser(argparse.ArgumentParser().add_subparsers())\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'PIL', 'pydantic', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

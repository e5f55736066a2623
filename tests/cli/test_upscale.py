"""`sdlora upscale` as a person meets it."""

from pathlib import Path

import pytest
from PIL import Image
from upscaler_files import write_upscaler

from sdlora.cli import main as cli


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_upscaler(tmp_path / "tiny.safetensors", scale=2, blocks=1, features=4, growth=2))


def picture(path: Path, size: tuple[int, int] = (20, 12)) -> str:
    Image.new("RGB", size, (10, 200, 30)).save(path)
    return str(path)


def test_pictures_become_larger(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = [picture(tmp_path / "a.png"), picture(tmp_path / "b.jpg", (9, 7))]
    out = tmp_path / "large"
    assert cli.main(["upscale", *names, "--model", model, "--out", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}/a-x2.png  (1 of 2, 40x24)",
        f"{out}/b-x2.png  (2 of 2, 18x14)",
    ]
    assert [Image.open(out / f"{name}-x2.png").size for name in "ab"] == [(40, 24), (18, 14)]


def test_what_cannot_be_done_is_one_line_and_nothing_is_written(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out = picture(tmp_path / "a.png"), tmp_path / "large"
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x02}q\x00." * 20)
    (tmp_path / "there").mkdir()
    picture(tmp_path / "there" / "a-x2.png")
    (tmp_path / "other").mkdir()
    same_name = picture(tmp_path / "other" / "a.png")
    cases = [
        ([good, str(tmp_path / "missing.png")], model, out, "DataError", "missing.png: cannot be read"),
        ([good], str(tmp_path / "x.safetensors"), out, "FormatError", "is a pickle or zip archive"),
        ([good], str(tmp_path / "no.safetensors"), out, "FormatError", "no.safetensors: cannot be read"),
        ([good], model, tmp_path / "there", "OutputError", "a-x2.png: is there already; remove it"),
        ([good, same_name], model, out, "ConfigError", "two of the pictures would be written under one name"),
    ]
    for pictures, file, folder, error, sentence in cases:
        assert cli.main(["upscale", *pictures, "--model", file, "--out", str(folder)]) != 0
        said = capsys.readouterr().err
        assert said.startswith(error) and sentence in said and said.count("\n") == 1
    assert not out.exists()

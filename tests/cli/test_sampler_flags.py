from pathlib import Path

import pytest

from sdlora.cli import main as cli
from sdlora.families.samplers.names import SAMPLERS, SCHEDULES
from sdlora.generation.pictures.files import read_recipe


def test_the_samplers_are_listed_without_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "--list-samplers"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name in (*SAMPLERS, *SCHEDULES):
        assert any(line.startswith(f"  {name}  ") for line in lines)


def test_the_flags_reach_the_picture(tiny_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--sampler", "euler a karras", "--noise", "cuda", "--guidance-rescale", "0.5", "--steps", "2"]
    base = ["--base", str(tiny_folder("sd1")), "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(["generate", *base, "--prompt", "x", *flags]) == 0
    recipe = read_recipe(next(tmp_path.glob("*.png")))
    assert (recipe.sampler, recipe.schedule, recipe.noise_device) == ("Euler a", "Karras", "cuda")
    assert recipe.guidance_rescale == 0.5


def test_a_wrong_name_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = ["generate", "--base", "tiny", "--prompt", "x", "--out", str(tmp_path / "none")]
    assert cli.main([*usual, "--sampler", "deis"]) == 2
    assert capsys.readouterr().err == (
        "ConfigError: request: sampler is 'deis'; the sampler DEIS is not offered; the nearest is DPM++ 2M\n"
    )
    assert not (tmp_path / "none").exists()

"""`sdlora batch` as a person meets it, alone and launched as two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import needs_fork
from launched import launched
from PIL import Image

from sdlora.adapters.write import write_adapter
from sdlora.cli.main import COMMANDS, main
from sdlora.generation.pictures.files import read_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    path = tmp_path / "jobs.txt"
    path.write_text("a red ball\n# no\na blue box --d 5 --n dull\n")
    return path


@pytest.fixture
def common(tiny_folder: Any, tmp_path: Path) -> list[str]:
    base = ["--base", str(tiny_folder("sd1")), "--steps", "1", "--precision", "fp32", "--device", "cpu"]
    return [*base, "--library", str(tmp_path), "--out", str(tmp_path / "out")]


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_batch_and_the_same_command_again(
    jobs: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["batch", str(jobs), *common, "--sheet"]) == 0
    said = capsys.readouterr().out
    assert "2 pictures, 2 to make" in said and "2 of 2" in said and "pictures/s" in said
    first, second, manifest, sheet = names(tmp_path / "out")
    assert first.startswith("00001-a-red-ball-") and second.startswith("00002-a-blue-box-")
    assert (manifest, sheet) == ("manifest.jsonl", "sheets/contact-1.png")
    assert read_recipe(tmp_path / "out" / second).negative_prompt == "dull"
    before = (tmp_path / "out" / first).stat().st_mtime_ns
    assert main(["batch", str(jobs), *common]) == 0
    assert "2 pictures, 2 of them there already, 0 to make" in capsys.readouterr().out
    assert (tmp_path / "out" / first).stat().st_mtime_ns == before


def test_names_are_made_of_a_template(
    jobs: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, sentence in (("{time}", "for {time} itself"), ("", "names no file"), ("a:b", "expected a file's name")):
        assert main(["batch", str(jobs), *common, "--name", wrong]) == 2
        assert sentence in (said := capsys.readouterr().err) and "jobs.txt" not in said
    assert main(["batch", str(jobs), *common, "--name", "{base}/{width}"]) == 0
    assert names(tmp_path / "out") == ["manifest.jsonl", "sd1/64-2.png", "sd1/64.png"]


def test_a_grid_from_the_command_line(
    common: list[str], tiny_base: Any, make_adapter: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(make_adapter(tiny_base("sd1")), tmp_path / "mine.safetensors")
    grid = ["--grid", "seed=1..2", "weight=0,0.5,1", "--grid", "adapter=mine,none", "--xyz"]
    assert main(["batch", *common, "--prompt", "a ball", *grid]) == 0
    assert "8 pictures, asked for 12 times, 8 to make" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert {tuple(line["axes"]) for line in lines} == {("seed", "weight", "adapter")}
    assert [name for name in names(tmp_path / "out") if "grid" in name] == ["sheets/grid-1.png", "sheets/grid-2.png"]


def test_a_dry_run_writes_nothing(
    jobs: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["batch", str(jobs), *common, "--count", "3", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "6 pictures, 6 to make" in said and "batches of up to 4: 2, in 1 kinds" in said
    assert "time: not known yet" in said and f"disk: at most {6 * 64 * 64 * 3 / 1e6:.1f} MB" in said
    assert not (tmp_path / "out").exists()
    assert main(["batch", str(jobs), *common, "--dry-run", "--measure"]) == 0
    assert "as two batches took just now" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_wrong_use_is_one_error_with_all_lines(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdlora.cli.batch.load_engine", None)  # nothing is loaded
    path = tmp_path / "bad.txt"
    path.write_text("a --s 0\nfine\nb <lora:nobody:1>\nc --sed 5\n")
    assert main(["batch", str(path), *common]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "ConfigError: 3 things are wrong with the jobs:"
    assert [line.partition(": ")[0].strip() for line in told[1:]] == [f"{path}:{n}" for n in (1, 3, 4)]
    assert "nobody: no adapter in" in told[2]
    for arguments, sentence in (
        ([str(path), *common, "--batch-size", "0"], "--batch-size is 0"),
        ([str(path), *common, "--measure"], "--measure belongs to --dry-run"),
        ([*common], "prompt is not given"),
        ([*common, "--prompt", "a", "--xyz"], "--xyz needs a grid"),
    ):
        assert main(["batch", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_batch_says_how_to_go_on(
    jobs: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: object, progress: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("sdlora.cli.batch_progress.BatchView.show", interrupt)
        assert main(["batch", str(jobs), *common, "--batch-size", "1"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert len(names(tmp_path / "out")) == 2
    assert main(["batch", str(jobs), *common]) == 0
    assert "1 of them there already, 1 to make" in capsys.readouterr().out


def test_pictures_that_fail_are_listed_and_the_status_says_so(
    jobs: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdlora.errors import GenerationError
    from sdlora.generation.render import Renderer

    real = Renderer.render

    def render(self: Any, batch: Any, *more: Any) -> Any:
        if any(asked.seed == 5 for asked in batch):
            raise GenerationError("the VAE gave NaN")
        return real(self, batch, *more)

    with monkeypatch.context() as context:
        context.setattr(Renderer, "render", render)
        assert main(["batch", str(jobs), *common, "--xyz", "x=seed"]) == 1
    said = capsys.readouterr()
    assert "1 could not be made; the same command tries them again:" in said.err
    assert f"{jobs}:3: 00002-a-blue-box-" in said.err and "the VAE gave NaN" in said.err
    assert "1 pictures are in" in said.out and "sheets/grid-1.png" in said.out.replace(os.sep, "/")
    assert main(["batch", str(jobs), *common]) == 0


def forked_two(words: list[str], folder: Path) -> str:
    return "".join(launched(lambda: main(words), folder))


def launched_two(words: list[str], folder: Path) -> str:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*launch, "-m", "sdlora.cli.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "two_processes",
    [pytest.param(forked_two, marks=needs_fork), pytest.param(launched_two, marks=pytest.mark.slow)],
)
def test_two_processes_share_a_batch_and_one_goes_on(
    tmp_path: Path,
    common: list[str],
    capsys: pytest.CaptureFixture[str],
    two_processes: Callable[[list[str], Path], str],
) -> None:
    path = tmp_path / "jobs.csv"
    path.write_text("prompt,seed,width\n" + "".join(f"a ball,{n},{48 if n % 3 else 64}\n" for n in range(9)))
    said = two_processes(["batch", str(path), *common, "--batch-size", "2", "--sheet"], tmp_path)
    assert said.count("9 pictures, 9 to make") == 1 and "one of 2" in said
    out = tmp_path / "out"
    files = [name for name in names(out) if name.startswith("0")]
    assert len(files) == 9 and len(names(out)) == 11  # no process left a manifest of its own
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert sorted(line["file"] for line in lines) == files
    assert Image.open(out / "sheets" / "contact-1.png").width > 6 * 256

    # As if both had been killed: their parts are there, one ends in half a line, two pictures are missing.
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / "manifest.jsonl").unlink()
    (out / "manifest.rank1.jsonl").write_text(text + '{"file": "00')
    for name in files[:2]:
        (out / name).unlink()
    assert main(["batch", str(path), *common]) == 0
    assert "9 pictures, 7 of them there already, 2 to make" in capsys.readouterr().out
    assert [name for name in names(out) if name.startswith("0")] == files


def test_the_command_is_listed() -> None:
    assert "batch" in COMMANDS

"""The benchmark scripts run end to end on a tiny untrained base and report what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import families
import machine
import pytest
import train_step

from sdlora.families.tiny import save_tiny

SCRIPTS = Path(machine.__file__).parent


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("sd1", tmp_path_factory.mktemp("base"))


def run(script: str, base: Path, out: Path, *options: str) -> dict:
    command = [sys.executable, str(SCRIPTS / script), "--models", str(base), "--precisions", "fp32"]
    command += ["--rounds", "1", "--out", str(out), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    name = script.removesuffix(".py")
    assert (out / f"{name}.md").read_text() in done.stdout
    return json.loads((out / f"{name}.json").read_text())


@pytest.mark.slow  # several processes that import everything
def test_train_step_measures_us_and_the_peer_on_the_same_job(base: Path, tmp_path: Path) -> None:
    result = run("train_step.py", base, tmp_path, "--steps-tiny", "2")
    assert {"torch", "diffusers", "peft"} <= set(result["machine"]["versions"])
    assert result["machine"]["commit"] and result["machine"]["device"]
    (job,) = result["runs"]
    assert job["seconds"] > 0 and job["peer"]["seconds"] > 0
    assert job["ratio"] == pytest.approx(job["seconds"] / job["peer"]["seconds"], abs=0.01)
    assert job["floor_seconds"] == pytest.approx(job["operations"] / job["matmul_rate"], abs=1e-4)
    assert job["startup_seconds"] > job["seconds"]
    assert 0.1 < job["peak_gb"] < 4
    assert len(job["losses"]) == 4


@pytest.mark.slow  # a process that imports everything
def test_generate_measures_pictures_and_adapters(base: Path, tmp_path: Path) -> None:
    options = ["--pictures-tiny", "1", "--denoising-steps", "1"]
    (job,) = run("generate.py", base, tmp_path, *options)["runs"]
    assert job["pixels"] == 64
    for key in ("bare", "adapter", "load", "switch", "remove"):
        assert job[f"{key}_seconds"] > 0
    assert job["operations"] > 0 and job["floor_seconds"] >= 0 and job["peak_gb"] > 0.1


@pytest.mark.slow  # several processes that import everything
def test_mixed_measures_batches_of_several_adapters(base: Path, tmp_path: Path) -> None:
    options = ["--turns", "1", "--each", "1", "--denoising-steps", "1", "--threads", "1"]
    (job,) = run("mixed.py", base, tmp_path, *options)["runs"]
    seconds = job["seconds"]
    assert set(seconds) == {"mixed", "one", "mixed_read_anew", "diffusers"}
    assert job["mixed_pictures_per_second"] == pytest.approx(8 / seconds["mixed"][0], abs=1e-3)
    assert job["mixed_to_one"] == pytest.approx(seconds["one"][0] / seconds["mixed"][0], abs=1e-4)
    anew = seconds["diffusers"][0] / seconds["mixed_read_anew"][0]
    assert job["mixed_read_anew_to_diffusers"] == pytest.approx(anew, abs=1e-4)


def test_operations_grow_with_the_picture_and_leave_out_frozen_weights(base: Path) -> None:
    small = train_step.count_operations(str(base), 64, 4)
    large = train_step.count_operations(str(base), 128, 4)
    assert 3 < large / small < 6


def test_a_failing_child_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"nowhere"):
        machine.run_child("train_step.py", {"base": tmp_path / "nowhere", "precision": "fp32", "pictures": tmp_path})


def test_table_is_markdown() -> None:
    assert machine.table(["a", "b"], [[1, 2.5]]) == "| a | b |\n| --- | --- |\n| 1 | 2.5 |"


def test_peak_memory_is_the_process_own() -> None:
    assert 0.05 < machine.peak_memory_gb() < 100


@pytest.mark.slow  # five bases are made, trained and saved
def test_every_family_trains_and_gives_diffusers_own_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert families.main(["--out", str(tmp_path), "--steps", "2"]) == 0
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    names = [variant.name for variant in families.VARIANTS]
    assert [line.split()[0] for line in table[1:6]] == names
    assert all((tmp_path / f"{name}.png").is_file() for name in names)

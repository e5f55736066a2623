"""The findings of sdlora.doctor: true on a sound machine, and what they become on others."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from sdlora import doctor
from sdlora.doctor import Check, device, examine, installed, surroundings, trials
from sdlora.errors import ConfigError

CPU = torch.device("cpu")
GIB = 2**30


def named(checks: list[Check] | Iterator[Check]) -> dict[str, Check]:
    """The checks by their names, each of which comes once."""
    checks = list(checks)
    found = {check.name: check for check in checks}
    assert len(found) == len(checks)
    return found


def assert_explained(check: Check) -> None:
    assert check.name and check.value and check.meaning
    assert bool(check.fix) == (check.state != "ok"), check


@pytest.fixture(scope="module")
def checks() -> dict[str, Check]:
    """All findings about this machine's CPU, the self-test among them."""
    return named(examine(device="cpu"))


def test_every_finding_is_explained_and_what_is_not_ok_has_a_fix(checks: dict[str, Check]) -> None:
    for check in checks.values():
        assert_explained(check)


def test_everything_asked_for_is_examined(checks: dict[str, Check]) -> None:
    versions = ["python", "sdlora", "torch", "diffusers", "transformers", "peft", "accelerate", "gradio", "safetensors"]
    if sys.platform != "darwin":  # where it is not required
        versions.append("bitsandbytes")
    others = ["device", "bf16", "precision", "8-bit optimizer", "nf4 layers", "int8 layers"]
    assert {*versions, *others, "memory", "disk", "model cache", "network", "self-test"} <= set(checks)
    assert [checks[name].state for name in versions] == ["ok"] * len(versions)


def test_a_sound_machine_passes(checks: dict[str, Check]) -> None:
    assert [checks[name].state for name in ("device", "precision", "self-test")] == ["ok"] * 3
    assert checks["precision"].value == "fp32" and checks["self-test"].value.startswith("passed in ")


@pytest.mark.skipif(sys.platform != "linux", reason="what bitsandbytes can do elsewhere is its own affair")
def test_bitsandbytes_is_really_used(checks: dict[str, Check]) -> None:
    assert [checks[name].value for name in ("8-bit optimizer", "nf4 layers", "int8 layers")] == ["works"] * 3


@pytest.mark.gpu
def test_a_gpu_is_examined() -> None:
    checks = named(examine(device="cuda"))
    assert "compute capability" in checks["device"].value and "gpu memory" in checks
    assert [check for check in checks.values() if check.state == "problem"] == []


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--device is 'gpu'; expected cpu, cuda, cuda:1 or mps"):
        examine(device="gpu")


# --- what is installed -------------------------------------------------------------------------------


def with_versions(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    real = installed.version
    monkeypatch.setattr(installed, "version", lambda name: versions.get(name) or real(name))


@pytest.mark.parametrize("version", ["0.9.1", "0.20.9"])
def test_a_library_that_is_too_old_is_a_problem(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    with_versions(monkeypatch, peft=version)
    check = named(installed.examine_installation())["peft"]
    assert (check.state, check.value) == ("problem", version)
    assert check.meaning.startswith("Too old.") and check.fix == 'pip install --upgrade "peft>=0.21"'


def test_a_python_that_is_too_old_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed.platform, "python_version", lambda: "3.9.18")
    check = named(installed.examine_installation())["python"]
    assert check.state == "problem" and ">=3.11" in check.fix


def test_an_installation_of_another_version_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, sdlora="0.0.1")
    check = named(installed.examine_installation())["sdlora"]
    assert check.state == "note" and "0.0.1" in check.meaning


def test_with_a_library_missing_nothing_else_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    real = installed.version

    def version(name: str) -> str:
        if name == "gradio":
            raise installed.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(installed, "version", version)
    checks = named(examine())
    assert (checks["gradio"].state, checks["gradio"].value) == ("problem", "not installed")
    assert list(checks)[-1] == "other checks" and "device" not in checks
    for check in checks.values():
        assert_explained(check)


def test_a_torch_that_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    checks = named(examine())
    assert (checks["torch"].state, checks["torch"].value) == ("problem", "does not load")
    assert checks["other checks"].value == "not made"


def test_sdlora_that_is_not_installed_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def metadata(name: str) -> Any:
        raise installed.PackageNotFoundError(name)

    monkeypatch.setattr(installed, "metadata", metadata)
    assert [check.state for check in examine()] == ["problem", "note"]


# --- the device --------------------------------------------------------------------------------------


def test_a_device_that_cannot_compute_is_a_problem_and_not_used() -> None:
    checks = named(examine(device="cuda:99"))
    assert checks["device"].state == "problem" and "Nothing can be computed on it" in checks["device"].meaning
    assert "memory" in checks and not {"bf16", "precision", "8-bit optimizer", "self-test"} & set(checks)


@pytest.mark.parametrize(
    ("cuda", "said", "fix"),
    [
        (None, "torch is a build without CUDA", "pip uninstall torch"),
        ("13.0", "torch cannot start CUDA", "update its driver"),
    ],
)
def test_a_gpu_that_torch_does_not_use_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, said: str, fix: str
) -> None:
    monkeypatch.setattr(device, "_nvidia_smi", lambda: (["NVIDIA GeForce RTX 3060"], ""))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (check,) = device.describe_device(CPU, asked_for=False)
    assert check.state == "problem" and "NVIDIA GeForce RTX 3060" in check.meaning
    assert said in check.meaning and fix in check.fix
    assert device.describe_device(CPU, asked_for=True)[0].state == "ok"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo NVIDIA GeForce RTX 3060", (["NVIDIA GeForce RTX 3060"], "")),
        ("echo NVIDIA-SMI has failed; exit 9", ([], "NVIDIA-SMI has failed")),
        (None, ([], "")),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="the program is a shell script")
def test_the_driver_is_asked_for_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, expected: Any
) -> None:
    if script:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device._nvidia_smi() == expected


def test_a_driver_without_gpu_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_nvidia_smi", lambda: ([], "NVIDIA-SMI has failed"))
    (check,) = device.describe_device(CPU, asked_for=False)
    assert check.state == "note" and "nvidia-smi: NVIDIA-SMI has failed" in check.meaning
    assert_explained(check)


@pytest.mark.parametrize(("free", "state"), [(10.5, "ok"), (2.0, "note")])
def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch, free: float, state: str) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * GIB), 12 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3060")
    checks = named(device.describe_device(torch.device("cuda:0"), asked_for=False))
    assert checks["device"].value == "cuda:0, NVIDIA GeForce RTX 3060, compute capability 8.6"
    assert checks["gpu memory"].value == f"{free} of 12.0 GiB free" and checks["gpu memory"].state == state
    assert_explained(checks["gpu memory"])


@pytest.mark.parametrize(
    ("capabilities", "state", "value"),
    [
        ({"avx2": True, "amx_bf16": True, "avx512_bf16": True}, "ok", "native (amx_bf16, avx512_bf16)"),
        ({"avx2": True, "avx512_bf16": False}, "note", "not native"),
    ],
)
def test_bf16_of_a_cpu_is_what_torch_reports(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], state: str, value: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    check = device.examine_bf16(CPU)
    assert (check.state, check.value) == (state, value)
    assert_explained(check)


def test_without_bitsandbytes_there_are_notes_and_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    checks = named(trials.try_bitsandbytes(CPU))
    assert [check.state for check in checks.values()] == ["note"] * 3
    assert "training uses one of 32 bits" in checks["8-bit optimizer"].meaning


def test_a_step_that_does_nothing_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", lambda self: None)
    check = named(trials.try_bitsandbytes(CPU))["8-bit optimizer"]
    assert check.value == "does not work" and "its step gives nothing" in check.meaning


# --- room and network --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gib", "states"),
    [(100, ["ok", "ok", "ok"]), (1, ["note", "note", "note"]), (0.1, ["problem", "problem", "note"])],
)
def test_little_room_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gib: float, states: list[str]) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=gib * GIB))
    monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda folder: SimpleNamespace(free=gib * GIB))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--owner--name").mkdir()
    checks = named(surroundings.examine_space())
    assert [check.state for check in checks.values()] == states
    assert f"{tmp_path} (1 models)" in checks["model cache"].value
    for check in checks.values():
        assert_explained(check)


def test_a_cache_that_is_not_there_yet_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "there"))
    assert "not there yet" in named(surroundings.examine_space())["model cache"].value


def test_offline_is_reported(checks: dict[str, Check], monkeypatch: pytest.MonkeyPatch) -> None:
    assert (checks["network"].state, checks["network"].value) == ("note", "offline")  # as all tests run
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(surroundings.importlib.util, "find_spec", lambda name: None)
    assert (surroundings.examine_network().state, surroundings.examine_network().fix) == ("ok", "")


def test_a_package_that_downloads_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(surroundings.importlib.util, "find_spec", lambda name: object())
    check = surroundings.examine_network()
    assert check.state == "note" and "kernels" in check.meaning and "HF_HUB_OFFLINE" in check.fix


def test_a_failing_examination_is_a_finding_and_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SDLORA_DEBUG", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    inside = []

    def probe() -> list[Check]:
        print("chatter")
        inside.append(constants.HF_HUB_OFFLINE)
        raise KeyError("something unforeseen")

    (check,) = doctor._guarded("space", probe)
    assert check.state == "problem" and check.meaning == "KeyError: 'something unforeseen'"
    assert_explained(check)
    assert inside == [True] and constants.HF_HUB_OFFLINE is False
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("SDLORA_DEBUG", "1")
    with pytest.raises(KeyError):
        doctor._guarded("space", probe)


# --- the self-test -----------------------------------------------------------------------------------


def test_the_self_test_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "as it was")
    assert doctor.run_self_test(CPU).state == "ok"
    assert list(tmp_path.iterdir()) == []
    assert doctor.self_test.os.environ["ACCELERATE_TORCH_DEVICE"] == "as it was"


def run_result(loss: float, delta_share: float, interrupted: bool = False) -> Any:
    effect = SimpleNamespace(delta_share=delta_share)
    return SimpleNamespace(interrupted=interrupted, loss_before=0.1, loss_after=loss, effect=effect, adapter=None)


@pytest.mark.parametrize(
    ("loss", "delta_share", "sentence"),
    [
        (math.nan, 0.1, "TrainingError: the held-out loss went from 0.1 to nan"),
        (0.1, 0.0, "TrainingError: the trained adapter changes the weights by 0.0 of their size"),
    ],
)
def test_bad_numbers_of_training_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, loss: float, delta_share: float, sentence: str
) -> None:
    monkeypatch.setattr("sdlora.training.run.train", lambda config: run_result(loss, delta_share))
    (check,) = doctor._guarded("self-test", lambda: [doctor.run_self_test(CPU)])
    assert (check.state, check.meaning) == ("problem", sentence)


def test_ctrl_c_in_the_training_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdlora.training.run.train", lambda config: run_result(0.1, 0.1, interrupted=True))
    with pytest.raises(KeyboardInterrupt):
        doctor._guarded("self-test", lambda: [doctor.run_self_test(CPU)])


def test_a_flat_picture_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = Image.new("RGB", (16, 16), (9, 9, 9))
    monkeypatch.setattr("sdlora.generation.engine.Engine.generate", lambda self, request: iter([(flat, None)]))
    (check,) = doctor._guarded("self-test", lambda: [doctor.run_self_test(CPU)])
    assert check.meaning == "GenerationError: the picture is of one flat colour"


def test_changed_base_weights_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = iter("ab")
    monkeypatch.setattr("sdlora.generation.engine.Engine.weights_sha256", lambda self: next(hashes))
    (check,) = doctor._guarded("self-test", lambda: [doctor.run_self_test(CPU)])
    assert check.state == "problem" and check.meaning.startswith("ModelError: the weights of the base were changed")

"""`sdlora doctor` as a person and as a script meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from sdlora import doctor
from sdlora.cli import main as cli
from sdlora.doctor import Check
from sdlora.errors import TrainingError

WELL = Check("python", "ok", "3.11.7", "sdlora needs >=3.11.")
NOTED = Check("network", "note", "offline", "Ids work for what is there.", "unset HF_HUB_OFFLINE")
BAD = Check("peft", "problem", "0.1", "Too old.", 'pip install --upgrade "peft>=0.21"')


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`find(*checks)`: those are what every examination finds from now on; returns what examinations are asked for."""

    def prepare(*checks: Check) -> list[Any]:
        asked: list[Any] = []

        def examine_each(*arguments: Any) -> Iterator[Check]:
            asked.append(arguments)
            yield from checks

        monkeypatch.setattr("sdlora.cli.doctor.examine_each", examine_each)
        monkeypatch.setattr("sdlora.cli.doctor.examine", lambda *arguments: list(examine_each(*arguments)))
        return asked

    return prepare


def test_the_list_has_state_name_value_meaning_and_fix(find: Any, capsys: pytest.CaptureFixture[str]) -> None:
    find(WELL, NOTED)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok       python           3.11.7 - sdlora needs >=3.11.",
        "note     network          offline - Ids work for what is there.",
        "                          fix: unset HF_HUB_OFFLINE",
        "",
        "everything works; notes: network",
    ]


def test_a_problem_is_the_exit_status(find: Any, capsys: pytest.CaptureFixture[str]) -> None:
    find(WELL, NOTED, BAD)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("\nto be mended: peft\n")


@pytest.mark.parametrize(("checks", "well"), [((WELL, NOTED), True), ((WELL, BAD), False)])
def test_json_holds_the_findings(
    find: Any, capsys: pytest.CaptureFixture[str], checks: tuple[Check, ...], well: bool
) -> None:
    find(*checks)
    assert cli.main(["doctor", "--json"]) == (0 if well else 1)
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is well and list(document) == ["ok", "checks"]
    assert [Check(**fields) for fields in document["checks"]] == list(checks)


def test_flags_reach_the_examination(find: Any) -> None:
    asked = find(WELL)
    cli.main(["doctor"])
    cli.main(["doctor", "--skip-self-test", "--device", "cpu", "--json"])
    assert asked == [(True, None), (False, "cpu")]


def test_an_unknown_device_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--device", "gpu"]) == 2
    assert capsys.readouterr() == ("", "ConfigError: --device is 'gpu'; expected cpu, cuda, cuda:1 or mps\n")


def test_a_broken_self_test_is_a_problem_without_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: Any) -> Any:
        print("step 1 of 2")
        raise TrainingError("the loss is NaN from the first step on")

    monkeypatch.setattr("sdlora.training.run.train", train)
    monkeypatch.delenv("SDLORA_DEBUG", raising=False)
    assert cli.main(["doctor", "--json", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    last = json.loads(said.out)["checks"][-1]
    assert (last["name"], last["state"]) == ("self-test", "problem")
    assert last["meaning"] == "TrainingError: the loss is NaN from the first step on" and last["fix"]
    assert "Traceback" not in said.err


def test_a_reader_may_stop_early(find: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find(WELL, NOTED)
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["doctor"]) == 1


def test_a_script_reads_one_document() -> None:
    """In a process of its own: what libraries say when they are loaded must not get into the document either."""
    command = [sys.executable, "-m", "sdlora.cli.main", "doctor", "--json", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    document = json.loads(done.stdout)
    assert done.returncode == (0 if document["ok"] else 1)
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert document["checks"][-1]["name"] == "self-test" and document["checks"][-1]["state"] == "ok"


def test_help_is_quick() -> None:
    code = "import sys; from sdlora.cli.doctor import run\ntry: run(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run([sys.executable, "-c", f"{code}sys.exit('torch' in sys.modules)"], capture_output=True)
    assert done.returncode == 0 and b"--skip-self-test" in done.stdout


def test_the_names_of_the_package_are_the_public_ones() -> None:
    assert doctor.__all__ == ["Check", "State", "examine", "examine_each"]

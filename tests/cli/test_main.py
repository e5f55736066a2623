"""The command line as a person meets it: exit status and one line, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora import AdapterFile, read_adapter, read_recipe
from sdlora.adapters.layers import LoraLayer
from sdlora.adapters.write import write_adapter
from sdlora.cli import main as cli
from sdlora.cli.train import parse_arguments
from sdlora.errors import ConfigError
from sdlora.generation.adapter_text import parse_adapter


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0 and cli.main(["--help"]) == 0
    assert "generate" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sdlora ")


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generat"]) == 2
    assert "did you mean generate?" in capsys.readouterr().err


def test_help_is_quick() -> None:
    """Without torch: its import alone takes seconds."""
    code = "import sys; from sdlora.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[training]\nsteps = 7\nseed = 5\n[adapter]\ntargets = ["transformer"]\n')
    config = parse_arguments(["--config", str(file), "--training.steps", "9", "--training.batch-size=4"])
    assert (config.training.steps, config.training.seed, config.training.batch_size) == (9, 5, 4)
    assert config.adapter.targets == ("transformer",)
    several = parse_arguments(["--adapter.targets", "attn2.to_k", "attn2.to_v", "--data.flip", "true"])
    assert several.adapter.targets == ("attn2.to_k", "attn2.to_v") and several.data.flip is True


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--training.stepz", "5"], "unknown key training.stepz; did you mean training.steps?"),
        (["--learning_rate", "5"], "unknown key learning_rate; did you mean optimizer.learning_rate?"),
        (["--training.steps=-1"], "training.steps is '-1'; input should be greater than or equal to 0"),
        (["--optimizer.learning_rate", "-1e-4"], "optimizer.learning_rate is '-1e-4'"),
        (["--optimizer.learning_rate", "nan"], "optimizer.learning_rate is 'nan'"),
        (["--training.seed", "1.5"], "training.seed is '1.5'"),
        (["stray"], "'stray' belongs to no flag"),
        (["--config", "missing.toml"], "missing.toml: there is no such configuration file"),
    ],
)
def test_wrong_settings_are_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(arguments)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_broken_toml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("steps = = 3")
    with pytest.raises(ConfigError, match=r"run\.toml: is not valid TOML"):
        parse_arguments(["--config", str(file)])


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", {}),
        ("a.safetensors:0.5", "a.safetensors", {"weight": 0.5}),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", {}),
        (r"C:\loras\a.safetensors:-1", r"C:\loras\a.safetensors", {"weight": -1.0}),
    ],
)
def test_adapter_and_weight(text: str, path: str, weight: dict[str, float]) -> None:
    assert parse_adapter(text) == {"path": path, **weight}


def test_a_weight_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="'strong' is no weight"):
        parse_adapter("a.safetensors:strong")


def test_train_then_generate(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--{section}.{key}={value}" for section, part in settings.items() for key, value in part.items()]
    flags += ["--samples.prompts", "a [trigger]", "--samples.steps=2"]
    assert cli.main(["train", *flags]) == 0
    said = capsys.readouterr().out
    adapter = tmp_path / "run" / "adapter.safetensors"
    assert "held-out loss" in said and f"adapter: {adapter}" in said
    assert [path.name for path in (tmp_path / "run" / "samples" / "step-000006").iterdir()] == ["00.png"]
    assert read_adapter(adapter).components() == {"unet": 32}

    out = tmp_path / "made"
    base = ["--base", settings["base"]["path"], "--steps", "2", "--count", "2", "--seed", "5", "--out", str(out)]
    status = cli.main(["generate", *base, "--adapter", f"{adapter}:0.5", "--prompt", "a zorb, shiny", "--verify"])
    assert status == 0
    assert "base weights unchanged" in capsys.readouterr().out
    names = sorted(path.name for path in out.glob("*.png"))
    assert names == ["00005-a-zorb-shiny.png", "00006-a-zorb-shiny.png"]
    recipe = read_recipe(out / names[1])
    assert recipe.seed == 6 and recipe.adapters[0].weight == 0.5


@pytest.mark.parametrize(
    ("change", "status", "sentence"),
    [
        (["--base", "no/such/folder"], 1, "ModelError: no/such/folder: there is no such file or folder"),
        (["--base", "owner/name"], 1, "ModelError: owner/name: there is no such folder, it is not in the"),
        (["--steps", "0"], 2, "ConfigError: request: steps is 0; input should be greater than 0"),
        (["--seed", "-1"], 2, "ConfigError: request: seed is -1"),
        (["--width", "100"], 2, "ConfigError: request: width is 100; input should be a multiple of 8"),
        (["--out", "/dev/null/x"], 1, "OutputError: /dev/null/x: cannot be used as output folder"),
        (["--adapter", "missing.safetensors"], 1, "FormatError: missing.safetensors: there is no such adapter"),
    ],
)
def test_generate_refuses_in_one_line(
    tiny_folder: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    status: int,
    sentence: str,
) -> None:
    usual = ["--base", str(tiny_folder("sd1")), "--prompt", "x", "--steps", "1", "--out", str(tmp_path)]
    assert cli.main(["generate", *usual, *change]) == status
    error = capsys.readouterr().err
    assert error.startswith(sentence) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page saved under this name"),
        (b"\x80\x02}q\x00." * 20, "is a pickle or zip archive"),
        (b"", "is empty"),
    ],
)
def test_what_is_no_adapter_is_named(
    tiny_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, sentence: str
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    usual = ["--base", str(tiny_folder("sd1")), "--prompt", "x", "--steps", "1", "--out", str(tmp_path)]
    assert cli.main(["generate", *usual, "--adapter", str(file)]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_launcher_script_trains(settings: dict[str, Any], tmp_path: Path) -> None:
    """`accelerate launch train/train_lora.py` puts train/ first on the path; nothing there may shadow a library."""
    script = Path(__file__).parents[2] / "train" / "train_lora.py"
    flags = [f"--{section}.{key}={value}" for section, part in settings.items() for key, value in part.items()]
    flags += ["--training.steps=2", "--validation.folder="]
    launch = ["-m", "accelerate.commands.launch", "--num_processes=1", "--cpu", "--mixed_precision=no"]
    done = subprocess.run([sys.executable, *launch, str(script), *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter.safetensors").exists()
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


@pytest.mark.parametrize("flags", [[], ["--json"], ["--header"]])
def test_names_that_the_terminal_cannot_show_are_no_obstacle(tmp_path: Path, flags: list[str]) -> None:
    adapter = tmp_path / "\u732b.safetensors"
    layer = LoraLayer(torch.ones(2, 6), torch.ones(4, 2), 1.0)
    text = {"ss_output_name": "\u732b", "modelspec.trigger_phrase": "caf\u00e9"}
    write_adapter(AdapterFile({"unet.mid_block.attentions.0.proj_in": layer}, "sd1", text), adapter)
    command = [sys.executable, "-m", "sdlora.cli.main", "adapter", "inspect"]
    terminal = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run([*command, str(adapter), *flags], capture_output=True, env=terminal)
    assert done.returncode == 0 and done.stderr == b""
    assert "caf\u00e9" in (said := done.stdout.decode("cp1252")) and "?" in said
    done = subprocess.run([*command, str(tmp_path / "\u72ac.safetensors")], capture_output=True, env=terminal)
    assert done.returncode == 1 and b"Traceback" not in done.stderr and b"there is no such" in done.stderr

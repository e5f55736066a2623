"""`sdlora adapter list` as a command."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from sdlora.cli.main import main

KEY = "lora_unet_mid_block_attentions_0_proj_in"


def make(path, metadata, ranks=(2,)):
    tensors = {}
    for number, rank in enumerate(ranks):
        key = KEY.replace("mid_block_attentions_0", f"down_blocks_{number}_attentions_0")
        tensors |= {f"{key}.lora_down.weight": torch.ones(rank, 6), f"{key}.lora_up.weight": torch.ones(4, rank)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "cat.safetensors", {"modelspec.trigger_phrase": "zorb", "ss_base_model_version": "sd_v1"})
    make(tmp_path / "runs" / "dog.safetensors", {"modelspec.trigger_phrase": "[red]woof"}, ranks=(1, 4))
    shutil.copy(tmp_path / "runs" / "cat.safetensors", tmp_path / "runs" / "more.safetensors")
    (tmp_path / "runs" / "page.safetensors").write_text("<html>")
    return tmp_path / "runs"


def lines(capsys):
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def test_names_that_the_output_cannot_hold_are_no_obstacle(folder):
    (folder / "dog.safetensors").rename(folder / "猫.safetensors")
    for wanted in ([], ["--json"]):
        command = [sys.executable, "-m", "sdlora.cli.main", "adapter", "list", str(folder), *wanted]
        environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
        done = subprocess.run(command, capture_output=True, check=False, env=environment)
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
        assert b"?" in done.stdout and b"cat" in done.stdout


def test_adapters_are_a_line_each(folder, capsys):
    assert main(["adapter", "list"]) == 0
    captured = capsys.readouterr()
    cat, dog = (line.split("\t") for line in captured.out.splitlines())
    assert cat[:4] == ["cat (and 1 more of it)", "sd1", "lora 2", "zorb"]
    assert dog[:4] == ["dog", "?", "lora 1-4", "[red]woof"]
    assert len(cat[5]) == 10 and cat[5] != dog[5]
    assert f"{folder}: 2 adapters, 1 files that are none" in captured.err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["zorb"], ["cat"]),
        (["runs", "zorb"], ["cat"]),
        (["./runs", "woof", "dog"], ["dog"]),
        (["woof", "cat"], []),
        (["--family", "sd1"], ["cat"]),
        (["--family", "unknown"], ["dog"]),
        (["--trigger", "[RED]"], ["dog"]),
        (["--kind", "lora", "--limit", "1"], ["cat"]),
        (["--name", "more"], ["more"]),
        (["--tag", "zorb"], []),
        (["--base", "zorb"], []),
        (["--rebuild", "dog"], ["dog"]),
    ],
)
def test_words_and_filters(folder, capsys, words, names):
    assert main(["adapter", "list", *words]) == 0
    assert [line[0].partition(" ")[0] for line in lines(capsys)] == names


def test_json_has_everything(folder, capsys):
    assert main(["adapter", "list", "runs", "cat", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == str(folder)
    (cat,) = found["adapters"]
    assert {
        "id", "name", "paths", "autov1", "autov2", "autov3", "modified", "title", "triggers", "words", "family", "format",
        "kinds", "rank", "modules", "base", "base_hash", "tags", "bytes", "problems",
    } == cat.keys()  # fmt: skip
    assert found["refused"] == [{"path": str(folder / "page.safetensors"), "problem": found["refused"][0]["problem"]}]
    assert main(["adapter", "list", "--hash", cat["autov3"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == [cat]


def test_refused_files_are_listed_with_their_reason(folder, capsys):
    assert main(["adapter", "list", "--refused"]) == 0
    assert capsys.readouterr().out.startswith(f"{folder / 'page.safetensors'}: is a web page saved under this name")


def test_a_faulty_adapter_is_marked(folder, capsys):
    save_file({"lora_unet_conv_in.lora_up.weight": torch.ones(2, 2)}, folder / "half.safetensors")
    assert main(["adapter", "list", "half"]) == 0
    assert lines(capsys)[0][2] == "lora, faulty"


def test_headers_alone_give_no_hash(folder, capsys):
    assert main(["adapter", "list", "--headers-only"]) == 0
    assert [line[5] for line in lines(capsys)] == ["-", "-", "-"]
    assert main(["adapter", "list"]) == 0
    assert len(lines(capsys)) == 2


def test_the_table_on_a_terminal_takes_no_markup_from_files(folder, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["adapter", "list"]) == 0
    text = capsys.readouterr().out
    assert "[red]woof" in text and "trigger" in text


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["./nowhere"], 1, "./nowhere: there is no such folder; name the one that your adapters are in"),
        (["runs", "--limit", "0"], 2, "--limit is 0; expected 1 or more"),
        (["runs", "--hash", "12345"], 2, "hash is '12345'; expected 6 or more hexadecimal digits"),
        (["runs", "--family", "flux"], 2, "family is 'flux'; expected sd1, sd2, sdxl or unknown"),
        (["runs", "--kind", "oft"], 2, "kind is 'oft'; expected lora"),
    ],
)
def test_mistakes_are_told_in_a_sentence(folder, capsys, words, status, sentence):
    assert main(["adapter", "list", *words]) == status
    assert sentence in capsys.readouterr().err


def test_without_a_folder_the_default_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["adapter", "list", "zorb"]) == 1
    assert "runs: there is no such folder" in capsys.readouterr().err

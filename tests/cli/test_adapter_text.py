"""`sdlora adapter rename | strip` as commands."""

import json

import pytest
import torch
from adapter_kinds import random_layer

from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.write import write_adapter
from sdlora.cli.main import main
from sdlora.headers import read_header
from sdlora.storage import sha256_of_tensor_data

PATH = "unet.mid_block.attentions.0.proj_in"
TEXT = {
    "ss_output_name": "zorb",
    "modelspec.trigger_phrase": "zorb",
    "ss_training_comment": "anna's",
    "odd\x1b[2J": "x",
}


@pytest.fixture
def file(tmp_path):
    words = {"zorb": {"text_encoder": torch.ones(1, 768)}}
    layers = {PATH: random_layer("lora", (8, 6)), PATH.replace("in", "out"): random_layer("lora", (8, 6), 1)}
    write_adapter(AdapterFile(layers, "sd1", TEXT, words), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_rename_says_what_it_is_called_now(file, tmp_path, capsys):
    target = tmp_path / "glim.safetensors"
    flags = ["--word", "zorb=<glim>", "--name", "Glim 2"]
    assert main(["adapter", "rename", str(file), str(target), *flags]) == 0
    text = capsys.readouterr().out
    autov3 = sha256_of_tensor_data(file)[:12]
    assert f"glim.safetensors: 'Glim 2', trigger '<glim>'; the weights are the same, autov3 {autov3}" in text
    assert "the word 'zorb' is '<glim>' now" in text and "written    " in text
    assert read_adapter(target).tokens.keys() == {"<glim>"}
    assert main(["adapter", "rename", str(file), str(target), "--trigger", "a=b", "--overwrite", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "target": str(target), "name": "glim", "trigger": "a=b", "words": {}, "files": [str(target)], "autov3": autov3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--word", "zorb"], "--word 'zorb' is not understood; expected OLD=NEW"),
        (["--word", "=x"], "--word '=x' is not understood"),
        (["--word", "zorb="], "--word zorb= is ''; expected one line of 1 to 500 characters"),
        (["--word", "zorb=a", "--word", "zorb=b"], "--word gives 'zorb' two names; give one"),
        (["--word", "cat=dog"], "knows no word 'cat'; its words are 'zorb'"),
        (["--name", "a\nb"], "--name is 'a\\nb'; expected one line"),
        (["--trigger", "  "], "--trigger is '  '; expected one line"),
    ],
)
def test_rename_refuses_what_makes_no_sense(file, tmp_path, capsys, flags, sentence):
    assert main(["adapter", "rename", str(file), str(tmp_path / "b.safetensors"), *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()


def test_strip_lists_what_is_gone(file, tmp_path, capsys):
    target = tmp_path / "b.safetensors"
    assert main(["adapter", "strip", str(file), str(target)]) == 0
    text = capsys.readouterr().out
    assert "b.safetensors: 2 entries of the header had to go" in text
    assert "removed    ss_training_comment: a comment on the training" in text
    assert "removed    'odd\\x1b[2J': something of unknown meaning" in text and "\x1b" not in text
    assert main(["adapter", "strip", str(target), str(target), "--overwrite"]) == 0
    assert "b.safetensors: nothing of the header had to go" in capsys.readouterr().out
    dropped = ["words", "unet.mid_block.attentions.0.proj_out"]
    flags = ["--drop", dropped[0], "--drop", dropped[1], "--keep", "none", "--overwrite", "--json"]
    assert main(["adapter", "strip", str(file), str(target), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dropped"] == dict.fromkeys(dropped, 1)
    assert set(found["removed"]) == set(TEXT) and found["keep"] == "none"
    assert list(read_adapter(target).layers) == [PATH]
    assert read_header(target).metadata.keys() == {"sshs_model_hash", "sshs_legacy_hash"}


def test_strip_refuses_in_one_sentence(file, tmp_path, capsys):
    assert main(["adapter", "strip", str(file), str(file)]) == 1
    assert "is there already; name another, or say --overwrite" in capsys.readouterr().err
    assert main(["adapter", "strip", str(file), str(tmp_path / "b"), "--drop", "vae"]) == 2
    assert "--drop vae: the adapter has no layer that begins with 'vae'" in capsys.readouterr().err
    assert main(["adapter", "strip", "nothing", str(tmp_path / "b")]) == 1
    assert "there is no such adapter file" in capsys.readouterr().err

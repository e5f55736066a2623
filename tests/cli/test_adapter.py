"""`sdlora adapter inspect | convert | verify` as commands."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.layers import DenseLayer, LoraLayer
from sdlora.adapters.write import write_adapter
from sdlora.cli.main import main

PATH = "unet.mid_block.attentions.0.proj_in"


@pytest.fixture
def file(tmp_path):
    layer = LoraLayer(torch.ones(2, 6), torch.ones(4, 2), 1.0)
    write_adapter(AdapterFile({PATH: layer}, "sd1", {"ss_output_name": "zorb"}), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_inspect_prints_what_it_is(file, capsys):
    assert main(["adapter", "inspect", str(file)]) == 0
    text = capsys.readouterr().out
    assert "a.safetensors: kohya, family not told, 1 lora layers (unet 1), rank 2" in text
    assert "alpha     1" in text and "ss_output_name: zorb" in text
    assert main(["adapter", "inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["modules"] == {"unet": 1, "text_encoder": 0, "text_encoder_2": 0}
    assert main(["adapter", "inspect", str(file), "--header"]) == 0
    assert "alpha" not in capsys.readouterr().out


def test_a_strangers_text_cannot_steer_the_terminal(tmp_path, capsys):
    tensors = {f"lora_unet_conv_in.lora_{part}.weight": torch.ones(2, 2) for part in ("up", "down")}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_output_name": "x\x1b[2Jy\nz" + "w" * 500})
    assert main(["adapter", "inspect", str(tmp_path / "a.safetensors"), "--header"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "  ss_output_name: x [2Jy zww" in text and len(text) < 600


def test_inspect_of_a_faulty_file_says_so_and_fails(tmp_path, capsys):
    save_file({"lora_unet_conv_in.lora_up.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    assert main(["adapter", "inspect", str(tmp_path / "a.safetensors")]) == 1
    assert "PROBLEM   lora_unet_conv_in has no lora_down.weight" in capsys.readouterr().out


def test_inspect_of_a_folder_lists_all_below_it(file, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    save_file({"<cat>": torch.ones(1, 768)}, tmp_path / "more" / "cat.safetensors")
    (tmp_path / "page.safetensors").write_text("<html>")
    assert main(["adapter", "inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "more/cat.safetensors: embedding, Stable Diffusion 1.x, words '<cat>'" in text
    assert "is a web page" in text and "2 adapters, 1 other files" in text
    assert main(["adapter", "inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (len(found["adapters"]), len(found["refused"])) == (2, 1)


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert main(["adapter", "inspect", str(tmp_path)]) == 1
    assert "holds no .safetensors file" in capsys.readouterr().err


def test_convert_there_and_back(file, tmp_path, capsys):
    assert main(["adapter", "convert", str(file), str(tmp_path / "peft"), "--format", "peft"]) == 0
    assert "peft, 1 layers, largest relative difference of delta-W 0.0e+00" in capsys.readouterr().out
    assert main(["adapter", "inspect", str(tmp_path / "peft")]) == 0
    assert "peft, " in capsys.readouterr().out
    assert main(["adapter", "convert", str(tmp_path / "peft"), str(tmp_path / "b.safetensors")]) == 0
    assert (tmp_path / "b.safetensors").read_bytes() == file.read_bytes()
    assert main(["adapter", "convert", str(file), str(tmp_path / "b.safetensors")]) == 1
    assert "is there already" in capsys.readouterr().err


def test_verify_goes_through_every_format(file, tmp_path, capsys):
    assert main(["adapter", "verify", str(file)]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["kohya", "diffusers", "peft"]
    write_adapter(AdapterFile({PATH: DenseLayer(torch.ones(4, 6))}, "sd1"), tmp_path / "full.safetensors")
    assert main(["adapter", "verify", str(tmp_path / "full.safetensors"), "--json"]) == 0
    assert [line["same"] for line in json.loads(capsys.readouterr().out)] == [True, None, None]


def test_verify_against_another_file(file, tmp_path, capsys):
    assert main(["adapter", "verify", str(file), "--against", str(tmp_path / "full.safetensors")]) == 1
    assert "no such adapter file" in capsys.readouterr().err
    layer = LoraLayer(torch.ones(1, 6), torch.ones(4, 1), 1.0)  # the same product
    write_adapter(AdapterFile({PATH: layer}, "sd1"), tmp_path / "same.safetensors")
    assert main(["adapter", "verify", str(file), "--against", str(tmp_path / "same.safetensors")]) == 0
    assert "same: 1 layers" in capsys.readouterr().out
    write_adapter(AdapterFile({PATH: LoraLayer(layer.down, layer.up * 1.01, 1.0)}, "sd1"), tmp_path / "b.safetensors")
    assert main(["adapter", "verify", str(file), "--against", str(tmp_path / "b.safetensors")]) == 1
    assert "DIFFERS: 1 layers, largest relative difference of delta-W 1.0e-02" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--prompt", "a cat"], "--prompt"),
        (["--prompt", ""], "--prompt"),
        (["--steps", "8", "--precision", "fp32"], "--steps, --precision"),
        (["--variant", "fp16", "--base-config", "x"], "--variant, --base-config"),
    ],
)
def test_flags_of_pictures_without_a_base_are_refused(file, capsys, flags, named):
    assert main(["adapter", "verify", str(file), *flags]) == 2
    sentence = f"ConfigError: {named}: pictures are compared with --base alone; add it, or leave this out\n"
    assert capsys.readouterr().err == sentence


# ------------------------------------------------------------------- merge and resize


@pytest.fixture
def files(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        layers = {
            PATH: LoraLayer(torch.randn(4, 20), torch.randn(16, 4), 4.0),
            "text_encoder.text_model.encoder.layers.0.mlp.fc1": LoraLayer(torch.randn(2, 8), torch.randn(8, 2), 2.0),
        }
        write_adapter(AdapterFile(layers, "sd1", {"ss_base_model_version": "sd_v1"}), tmp_path / f"{name}.safetensors")
    return tmp_path


def test_merge_prints_the_error_against_the_true_sum(files, capsys):
    wanted = ["--adapter", f"{files}/a.safetensors:0.5", "--adapter", f"{files}/b.safetensors:unet=2,text_encoder=0"]
    assert main(["adapter", "merge", str(files / "out.safetensors"), *wanted]) == 0
    assert "out.safetensors: 2 layers, rank 2 to 8, relative error against the true sum " in capsys.readouterr().out
    one, two = (read_adapter(files / f"{name}.safetensors").layers[PATH].delta_weight() for name in "ab")
    made = read_adapter(files / "out.safetensors").layers
    torch.testing.assert_close(made[PATH].delta_weight().flatten(1), 0.5 * one + 2 * two, atol=1e-5, rtol=1e-4)
    assert main(["adapter", "merge", str(files / "cut.safetensors"), *wanted, "--rank", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == [2] and 0.01 < found["error"] <= found["worst_error"] < 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--adapter", "{a}:much"], "'much' is no weight; expected FILE:0.8"),
        (["--adapter", "{a}:nan"], "'nan' is no weight"),
        (["--adapter", "{a}:1e300"], "'1e300' is no weight"),
        (["--adapter", "{a}:0"], "nothing is left to merge: no adapter has layers, or all weights are 0"),
        (["--adapter", "{a}:vae=1"], "a has no layer that begins with 'vae'"),
        (["--adapter", "{a}", "--energy", "2"], "--energy is 2; expected more than 0 and at most 1"),
        (["--adapter", "{a}", "--drop", "1"], "--drop is 1; expected 0 or more and less than 1"),
        (["--adapter", "{a}", "--rank", "-1"], "--rank is -1; expected 1 or more"),
        (["--adapter", "{a}", "--method", "ties", "--format", "diffusers"], "is a dense difference"),
    ],
)
def test_merge_refuses_what_makes_no_sense_and_writes_nothing(files, capsys, flags, sentence):
    flags = [flag.format(a=files / "a.safetensors") for flag in flags]
    assert main(["adapter", "merge", str(files / "out"), *flags]) in (1, 2)
    assert sentence in capsys.readouterr().err
    assert not (files / "out").exists()


def test_resize_tells_what_each_block_keeps(files, capsys):
    source, target = str(files / "a.safetensors"), str(files / "small.safetensors")
    assert main(["adapter", "resize", source, target, "--rank", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 layers, rank 2, " in lines[0] and "of the energy kept" in lines[0]
    assert lines[1].split() == ["text_encoder", "100.00%"] and lines[2].split()[0] == "unet.mid_block"
    assert main(["adapter", "resize", source, target, "--rank", "2"]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["adapter", "resize", source, target, "--error", "0.5", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["energy"][""] >= 0.75
    half = ["--megabytes", "0.0005", "--precision", "fp16", "--overwrite"]
    assert main(["adapter", "resize", source, target, *half]) == 0
    assert {tensor.dtype for tensor in read_adapter(target).layers[PATH].tensors()} == {torch.float16}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "nothing says where to cut; give --rank, --energy, --error or --megabytes"),
        (["--energy", "0.9", "--error", "0.1"], "--energy and --error both say where to cut"),
        (["--error", "0"], "--error is 0; expected more than 0 and at most 1"),
        (["--megabytes", "0"], "--megabytes is 0; expected more than 0"),
        (["--megabytes", "nan"], "--megabytes is nan; expected more than 0"),
        (["--megabytes", "1e-7"], "--megabytes is 1e-07; expected more than 0"),
        (["--megabytes", "0.0001"], "MB is too small: rank 1 in every layer takes"),
    ],
)
def test_resize_refuses_what_makes_no_sense(files, capsys, flags, sentence):
    assert main(["adapter", "resize", str(files / "a.safetensors"), str(files / "out"), *flags]) in (1, 2)
    assert sentence in capsys.readouterr().err
    assert not (files / "out").exists()


def test_a_folder_of_pefts_in_a_library_is_one_adapter(file, tmp_path, capsys):
    assert main(["adapter", "convert", str(file), str(tmp_path / "mine"), "--format", "peft"]) == 0
    capsys.readouterr()
    assert main(["adapter", "inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["adapters"]
    assert [(entry["format"], entry["path"]) for entry in found] == [
        ("kohya", str(file)),
        ("peft", str(tmp_path / "mine")),
    ]


@pytest.mark.parametrize("name", ["~nobody-of-this-name/a.safetensors", "x" * 5000])
def test_paths_that_the_system_refuses_are_no_traceback(files, capsys, name):
    source = str(files / "a.safetensors")
    for words in (
        ["inspect", name],
        ["verify", name],
        ["convert", name, source + ".b"],
        ["resize", name, "b", "--rank", "1"],
    ):
        assert main(["adapter", *words]) == 1
        assert "there is no such adapter file" in capsys.readouterr().err


def test_verify_of_the_folder_that_one_stands_in(files, capsys, monkeypatch):
    assert main(["adapter", "convert", str(files / "a.safetensors"), str(files / "mine"), "--format", "peft"]) == 0
    monkeypatch.chdir(files / "mine")
    assert main(["adapter", "verify", "."]) == 0
    assert capsys.readouterr().out.count("same: 2 layers") == 3

"""`sdlora adapter merge --base | extract | verify --base` as commands."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.layers import DenseLayer, LoraLayer
from sdlora.adapters.write import write_adapter
from sdlora.cli.main import main


@pytest.fixture
def base(tiny_folder) -> str:
    return str(tiny_folder("sd1"))


@pytest.fixture
def file(tiny_base, make_adapter, tmp_path) -> Path:
    write_adapter(make_adapter(tiny_base("sd1")), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def refusal(arguments, capsys) -> str:
    assert main(["adapter", *arguments]) in (1, 2)
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_an_adapter_goes_into_a_base_and_comes_out_again(base, file, tmp_path, capsys):
    merged, back = str(tmp_path / "merged"), str(tmp_path / "back.safetensors")
    assert main(["adapter", "merge", merged, "--base", base, "--adapter", f"{file}:0.5"]) == 0
    assert "layers, Stable Diffusion 1.x, relative error against the true sum" in capsys.readouterr().out
    assert main(["adapter", "extract", base, merged, back, "--rank", "2", "--precision", "fp32"]) == 0
    text = capsys.readouterr().out
    assert "rank 2, 100.00% of the difference's energy" in text and "unet.mid_block" in text
    assert list(tmp_path.glob(".*")) == []
    layers = read_adapter(file).layers
    for path, layer in read_adapter(back).layers.items():
        torch.testing.assert_close(layer.delta_weight(), 0.5 * layers[path].delta_weight(), atol=1e-5, rtol=1e-3)
    assert main(["adapter", "extract", base, merged, back, "--energy", "0.5", "--overwrite", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["energy"][""] >= 0.5 and found["left_out"] == [] and found["layers"] == len(layers)
    assert {tensor.dtype for tensor in load_file(back).values()} == {torch.float16}


def test_new_words_lie_beside_the_merged_base(base, file, tmp_path, capsys):
    adapter = read_adapter(file)
    words = {"zorb": {"text_encoder": torch.ones(2, 32)}}
    write_adapter(AdapterFile(adapter.layers, "sd1", adapter.metadata, words), tmp_path / "b.safetensors")
    target = tmp_path / "new" / "merged"
    assert main(["adapter", "merge", str(target), "--base", base, "--adapter", str(tmp_path / "b.safetensors")]) == 0
    assert "a base has no place for new words" in capsys.readouterr().out
    assert read_adapter(tmp_path / "new" / "embeddings" / "zorb.safetensors").tokens.keys() == {"zorb"}


def test_what_cannot_be_merged_into_a_base_is_refused(base, file, tmp_path, capsys):
    start = ["merge", str(tmp_path / "out"), "--base", base, "--adapter", str(file)]
    assert "with --base the whole sum goes into the weights" in refusal([*start, "--rank", "2"], capsys)
    assert "with --base OUT has the layout of the base" in refusal([*start, "--format", "peft"], capsys)
    assert "there is no such file" in refusal([*start, "--base", "/nowhere"], capsys)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "holds thesis.txt, which is no part of a base" in refusal([*start, "--overwrite"], capsys)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    itself = ["merge", base, "--base", base, "--adapter", str(file), "--overwrite"]
    assert "which stays as it is; name another" in refusal(itself, capsys)
    around = ["merge", str(tmp_path), "--base", base, "--adapter", str(file), "--overwrite"]
    assert f"holds {file} or is part of it" in refusal(around, capsys)
    assert file.is_file() and (tmp_path / "out" / "thesis.txt").is_file()
    for weights in ("text_encodr=0", "unet=0.5,unet=2", "=1", "unet.nowhere=0"):
        text = refusal(["merge", str(tmp_path / "new"), "--base", base, "--adapter", f"{file}:{weights}"], capsys)
        assert "for the second time" in text or "no layer that begins with" in text
    assert "--base-config is for a base" in refusal(
        ["merge", str(tmp_path / "x"), "--adapter", str(file), "--base-config", base], capsys
    )
    new = ["merge", str(tmp_path / "new"), *start[2:], "--base-config", base]
    assert "is a folder, which describes itself" in refusal(new, capsys)


def test_a_word_of_another_adapter_is_not_replaced(base, file, tmp_path, capsys):
    words = {"zorb": {"text_encoder": torch.ones(2, 32)}}
    write_adapter(AdapterFile({}, "sd1", {}, words), tmp_path / "zorb.safetensors")
    (tmp_path / "embeddings").mkdir()
    other = {"zorb": {"text_encoder": torch.zeros(2, 32)}}
    write_adapter(AdapterFile({}, "sd1", {}, other), tmp_path / "embeddings" / "zorb.safetensors")
    before = (tmp_path / "embeddings" / "zorb.safetensors").read_bytes()
    parts = ["--adapter", str(tmp_path / "zorb.safetensors"), "--adapter", str(file)]
    text = refusal(["merge", str(tmp_path / "merged"), "--base", base, *parts], capsys)
    assert "knows 'zorb' with other vectors" in text
    assert (tmp_path / "embeddings" / "zorb.safetensors").read_bytes() == before
    assert not (tmp_path / "merged").exists()


def test_a_merged_checkpoint_needs_its_ending(checkpoints, base, file, tmp_path, capsys):
    start = ["--base", str(checkpoints("sd1")), "--base-config", base, "--adapter", str(file)]
    assert "is a .safetensors file" in refusal(["merge", str(tmp_path / "out"), *start], capsys)
    assert main(["adapter", "merge", str(tmp_path / "out.safetensors"), *start, "--precision", "fp16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["error"] <= found["worst_error"] < 0.1 and found["embeddings"] == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--rank", "-1"], "--rank is -1"),
        (["--energy", "1.5"], "--energy is 1.5"),
        (["--conv-rank", "-1"], "--conv-rank is -1"),
        ([], "there is nothing to extract"),
        (["--only", "unet", "--only", "text_encodr"], "--only text_encodr"),
    ],
)
def test_what_cannot_be_extracted_is_refused_and_leaves_nothing(base, tmp_path, capsys, flags, expected):
    assert expected in refusal(["extract", base, base, str(tmp_path / "out.safetensors"), *flags], capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_or_holds_a_base_is_refused(base, tmp_path, capsys):
    copy = tmp_path / "tuned"
    shutil.copytree(base, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    for target in (copy, weights, tmp_path):
        assert "which stays as it is" in refusal(["extract", base, str(copy), str(target), "--overwrite"], capsys)
    assert "is no name of a file" in refusal(["extract", base, str(copy), ".", "--overwrite"], capsys)
    assert "written as safetensors" in refusal(["extract", base, str(copy), str(tmp_path / "x.pt")], capsys)
    assert weights.read_bytes() == before and sorted(path.name for path in tmp_path.iterdir()) == ["tuned"]


def test_verify_compares_pictures_on_a_base(base, file, tmp_path, capsys):
    assert main(["adapter", "verify", str(file), "--base", base, "--steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("same" in line and "pixels differ by 0.000" in line for line in lines)
    adapter = read_adapter(file)
    dense = {path: DenseLayer(layer.delta_weight()) for path, layer in adapter.layers.items()}
    write_adapter(AdapterFile(dense, "sd1"), tmp_path / "dense.safetensors")
    against = ["verify", str(file), "--against", str(tmp_path / "dense.safetensors"), "--base", base, "--steps", "2"]
    assert main(["adapter", *against, "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert line["same"] and line["mean_pixel_difference"] < 0.5
    assert "--steps is 0" in refusal(["verify", str(file), "--base", base, "--steps", "0"], capsys)


def test_verify_tells_another_adapter(base, file, tmp_path, capsys):
    adapter = read_adapter(file)
    changed = {path: LoraLayer(layer.down, layer.up, layer.alpha * 2) for path, layer in adapter.layers.items()}
    write_adapter(AdapterFile(changed, "sd1"), tmp_path / "b.safetensors")
    assert main(["adapter", "verify", str(file), "--against", str(tmp_path / "b.safetensors")]) == 1
    assert "DIFFERS" in capsys.readouterr().out

"""Bases on the disk: every weight found in its place, and copies in which some are changed."""

import json
import shutil

import ldm_layout
import pytest
import torch
from diffusers import DiffusionPipeline
from families_help import load
from safetensors.torch import load_file, save_file

from sdlora.adapters.live import base_weight
from sdlora.config import BaseSection
from sdlora.errors import ModelError, OutputError
from sdlora.families.base_copy import write_changed
from sdlora.families.stored_base import open_base
from sdlora.families.tiny import tiny_pipeline
from sdlora.headers import read_header

LAYOUTS = ("folder", "checkpoint")
Q = "text_encoder.text_model.encoder.layers.1.self_attn.k_proj"
"""In a checkpoint of SD 2.x the middle third of a larger matrix."""


@pytest.fixture
def section(tiny_folder, checkpoints, shape):
    """`section(layout)`: the tiny base of the family, as a folder or as one file."""

    def make(layout: str) -> BaseSection:
        if layout == "folder":
            return BaseSection(path=str(tiny_folder(shape)))
        return BaseSection(path=str(checkpoints(shape)), config=str(tiny_folder(shape)))

    return make


def contents(path):
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return {(file.name if file != path else "", key): t for file in files for key, t in load_file(file).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layers_weight_is_the_loaded_bases(section, tiny_folder, layout, shape):
    base, live = open_base(section(layout)), load(tiny_folder(shape))
    expected = {"unet": 0, **dict.fromkeys(live.text_encoders, 0)}
    for path in base.layers:
        weight = base.read(f"{path}.weight")
        assert tuple(weight.shape) == base.shapes[f"{path}.weight"]
        assert torch.equal(weight, base_weight(live, path)), path
        expected[path.split(".")[0]] += 1
    for name, module in live.components():
        layers = [m for m in module.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
        assert name == "vae" or expected[name] == len(layers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_differs_in_the_changed_layers_alone(section, layout, shape, tmp_path):
    base = open_base(section(layout))
    paths = [Q, "unet.mid_block.attentions.0.proj_in"]
    if shape == "sdxl":
        paths.append("text_encoder_2.text_projection")
    target = tmp_path / ("copy" if layout == "folder" else "copy.safetensors")
    seen = []

    def change(path, weight, dtype):
        assert (weight.dtype, dtype) == (torch.float32, torch.float32)
        seen.append(path)
        return weight + torch.arange(weight.numel()).reshape(weight.shape)

    write_changed(base, target, paths, change, metadata={"modelspec.merged_from": "a 1"})
    assert sorted(seen) == sorted(paths)
    copy = open_base(section(layout).model_copy(update={"path": str(target)}))
    for name in base.places:
        before, after = base.read(name), copy.read(name)
        if name.removesuffix(".weight") in paths:
            before = before + torch.arange(before.numel()).reshape(before.shape)
        assert torch.equal(before, after), name
    original = contents(base.facts.path)
    changed = {key for key, tensor in contents(target).items() if not torch.equal(tensor, original[key])}
    assert len(changed) == len(paths)
    if layout == "checkpoint":
        assert read_header(target).metadata["modelspec.merged_from"] == "a 1"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_in_half_precision_is_rounded_once(section, layout, tmp_path, shape):
    base = open_base(section(layout))
    target = tmp_path / ("copy" if layout == "folder" else "copy.safetensors")
    write_changed(base, target, [Q], lambda path, weight, dtype: weight * 3, precision="fp16")
    copy = open_base(section(layout).model_copy(update={"path": str(target)}))
    assert {precision for _, precision in copy.facts.components.values()} == {"fp16"}
    assert torch.equal(copy.read(f"{Q}.weight"), (base.read(f"{Q}.weight") * 3).half())
    assert torch.equal(copy.read("unet.conv_in.weight"), base.read("unet.conv_in.weight").half())


def test_numbers_that_the_type_cannot_hold_leave_nothing_behind(section, tmp_path):
    for layout, name in (("folder", "copy"), ("checkpoint", "copy.safetensors")):
        with pytest.raises(ModelError, match="too large for float16; take --precision bf16 or fp32"):
            write_changed(
                open_base(section(layout)),
                tmp_path / name,
                [Q],
                lambda path, weight, dtype: weight * 1e9,
                precision="fp16",
            )
    assert list(tmp_path.iterdir()) == []


def test_a_copied_folder_has_what_belongs_to_the_base_and_nothing_else(tiny_folder, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder("sd1"), folder)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, part in zip(names, halves, strict=True):
        save_file(part, unet.with_name(name))
    index = {"weight_map": {key: name for name, part in zip(names, halves, strict=True) for key in part}}
    unet.with_name(f"{unet.name}.index.json").write_text(json.dumps(index))
    unet.unlink()
    (folder / "vae" / "other.safetensors.index.json").write_text('{"weight_map": {"a": "elsewhere.safetensors"}}')
    fp16 = index | {"weight_map": {"a": "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"}}
    unet.with_name(f"{unet.name}.index.fp16.json").write_text(json.dumps(fp16))
    (folder / "unet" / "pickle.bin").write_bytes(b"x")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret.json").write_text("{}")
    write_changed(open_base(BaseSection(path=str(folder))), tmp_path / "copy", [], lambda *given: given[1])
    copied = {
        file.relative_to(tmp_path / "copy").as_posix() for file in (tmp_path / "copy").rglob("*") if file.is_file()
    }
    assert copied >= {"model_index.json", "unet/config.json", f"unet/{unet.name}.index.json", f"unet/{names[1]}"}
    assert not {
        name
        for name in copied
        if "pickle" in name or "pruned" in name or "cache" in name or "other" in name or "fp16" in name
    }
    assert load(tmp_path / "copy").weights_sha256() == load(folder).weights_sha256()


def test_a_copy_follows_links_to_components(tiny_folder, tmp_path):
    whole, linked = tiny_folder("sd1"), tmp_path / "linked"
    linked.mkdir()
    for entry in whole.iterdir():
        (linked / entry.name).symlink_to(entry)
    (linked / "vae_loop").symlink_to(linked)
    write_changed(open_base(BaseSection(path=str(linked))), tmp_path / "copy", [], lambda *given: given[1])
    assert load(tmp_path / "copy").weights_sha256() == load(whole).weights_sha256()
    assert not (tmp_path / "copy" / "unet").is_symlink() and not (tmp_path / "copy" / "vae_loop").exists()


def test_a_copy_of_a_folder_with_a_safety_checker_loads_in_diffusers(tiny_folder, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder("sd1"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index | {"requires_safety_checker": True}))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"x")
    write_changed(open_base(BaseSection(path=str(folder))), tmp_path / "copy", [], lambda *given: given[1])
    assert DiffusionPipeline.from_pretrained(tmp_path / "copy").safety_checker is None
    save_file({"a": torch.ones(1)}, folder / "safety_checker" / "model.safetensors")
    write_changed(open_base(BaseSection(path=str(folder))), tmp_path / "whole", [], lambda *given: given[1])
    assert (tmp_path / "whole" / "safety_checker" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "whole" / "model_index.json").read_text())["requires_safety_checker"]


def test_averaged_weights_of_another_model_are_left_out(tiny_folder, tmp_path):
    file = tmp_path / "ema.safetensors"
    ldm_layout.write_checkpoint(tiny_pipeline("sd1"), file, ema=True)
    base = open_base(BaseSection(path=str(file), config=str(tiny_folder("sd1"))))
    write_changed(base, tmp_path / "same.safetensors", [], lambda *given: given[1])
    write_changed(base, tmp_path / "other.safetensors", [Q], lambda path, weight, dtype: weight + 1)
    assert any(key.startswith("model_ema.") for key in load_file(tmp_path / "same.safetensors"))
    assert not any(key.startswith("model_ema.") for key in load_file(tmp_path / "other.safetensors"))


def test_weights_of_eight_bits_get_the_wanted_precision(section, tiny_folder, tmp_path):
    tensors = load_file(open_base(section("checkpoint")).facts.path)
    eight = {key: t.to(torch.float8_e4m3fn) if t.dtype == torch.float32 else t for key, t in tensors.items()}
    save_file(eight, tmp_path / "eight.safetensors")
    base = open_base(section("checkpoint").model_copy(update={"path": str(tmp_path / "eight.safetensors")}))
    write_changed(base, tmp_path / "half.safetensors", [Q], lambda *given: given[1], precision="fp16")
    found = {tensor.dtype for tensor in load_file(tmp_path / "half.safetensors").values()}
    assert torch.float8_e4m3fn not in found and torch.float16 in found


def test_a_base_of_the_hub_keeps_its_name(tiny_folder, monkeypatch):
    monkeypatch.setattr("sdlora.families.stored_base.find_base", lambda section: tiny_folder("sd1"))
    assert open_base(BaseSection(path="owner/name")).name == "owner/name"
    assert open_base(BaseSection(path=str(tiny_folder("sd1")))).name == "sd1"


def test_a_damaged_weight_file_is_refused_in_a_sentence(checkpoints, tiny_folder, tmp_path):
    tensors = load_file(checkpoints("sd1"))
    del tensors["model.diffusion_model.input_blocks.1.1.proj_in.weight"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 weights, such as unet\.down_blocks\.0\.attentions\.0\.proj_in"):
        open_base(BaseSection(path=str(tmp_path / "a.safetensors"), config=str(tiny_folder("sd1"))))
    with pytest.raises(OutputError, match="cannot be written"):
        base = open_base(BaseSection(path=str(checkpoints("sd1")), config=str(tiny_folder("sd1"))))
        write_changed(base, tmp_path / "a.safetensors" / "b.safetensors", [], lambda *given: given[1])

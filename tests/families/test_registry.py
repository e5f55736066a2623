import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from families_help import load, refusal
from safetensors.torch import load_file, save_file

from sdlora.assets import TINY_SD
from sdlora.config import BaseSection
from sdlora.errors import ConfigError, ModelError
from sdlora.families import weights
from sdlora.families.detect import detect_base
from sdlora.families.registry import detect_family, find_base, load_base
from sdlora.families.sd import SD1, SD2
from sdlora.families.sdxl import SDXL

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def copy(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny SD 1.x folder that a test may damage."""
    return Path(shutil.copytree(tiny_folder("sd1"), tmp_path / "base"))


# --- folders -----------------------------------------------------------------------------------------


def test_tiny_is_the_base_that_ships():
    assert find_base(BaseSection(path="tiny")) == TINY_SD
    assert detect_family(TINY_SD) is SD1


@pytest.mark.parametrize(("shape", "family"), [("sd1", SD1), ("sd2", SD2), ("sdxl", SDXL)])
def test_the_family_of_a_folder_is_told_from_its_unet(tiny_folder, shape, family):
    assert detect_family(tiny_folder(shape)) is family


def test_a_folder_is_loaded_with_its_own_weights(tiny_folder):
    folder = tiny_folder("sd1")
    base = load(folder)
    assert base.source.name == str(folder)
    for component, file in (("unet", UNET), ("vae", VAE), ("text_encoder", TEXT)):
        stored = load_file(folder / file)
        live = {
            key.removeprefix("text_model."): value
            for key, value in dict(base.components())[component].state_dict().items()
        }
        assert all(torch.equal(live[key.removeprefix("text_model.")], value) for key, value in stored.items())


def test_the_bases_hash_follows_the_weights_that_are_loaded_and_nothing_else(copy):
    digest = load(copy).source.sha256
    (copy / "safety_checker").mkdir()
    save_file({"w": torch.ones(1)}, copy / "safety_checker" / "model.safetensors")
    save_file({"w": torch.ones(1)}, copy / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert load(copy).source.sha256 == digest
    weights = load_file(copy / UNET)
    weights["conv_in.bias"] += 1
    save_file(weights, copy / UNET, {"format": "pt"})
    assert load(copy).source.sha256 != digest


def test_a_variant_is_loaded_from_its_own_files(copy):
    for file in (UNET, VAE, TEXT):
        weights = {key: value * 2 if "conv_in" in key else value for key, value in load_file(copy / file).items()}
        stem, suffix = file.rsplit(".", 1)
        save_file(weights, copy / f"{stem}.fp16.{suffix}", {"format": "pt"})
    plain, variant = load(copy), load(copy, variant="fp16")
    assert torch.equal(variant.unet.conv_in.weight, plain.unet.conv_in.weight * 2)
    assert variant.source.sha256 != plain.source.sha256
    assert "holds no unet/*model.bf16.safetensors" in refusal(copy, variant="bf16")


def test_old_attention_names_of_the_vae_are_read(copy):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    expected = load(copy).vae.state_dict()
    weights = {}
    for key, value in load_file(copy / VAE).items():
        for new, old in names.items():
            key = key.replace(f"mid_block.attentions.0.{new}", f"mid_block.attentions.0.{old}")
        weights[key] = value
    assert any(".query." in key for key in weights)
    save_file(weights, copy / VAE, {"format": "pt"})
    live = load(copy).vae.state_dict()
    assert set(live) == set(expected)
    assert all(torch.equal(live[key], expected[key]) for key in expected)


def test_precision_is_that_of_the_section(tiny_folder):
    base = load_base(BaseSection(path=str(tiny_folder("sd1")), precision="bf16"), "cpu")
    assert base.dtype == base.unet.dtype == base.vae.dtype == base.text_encoders["text_encoder"].dtype == torch.bfloat16
    assert load_base(BaseSection(path=str(tiny_folder("sd1"))), "cpu").dtype == torch.float32


# --- what is no base ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("", "no base is named"),
        ("no/such/folder", "there is no such file or folder; --base takes tiny, a diffusers folder"),
        ("./missing", "there is no such file or folder"),
        ("~nobody-of-this-name/base", "there is no such file or folder"),
        ("C:\\models\\base", "there is no such file or folder"),
        ("models/base.safetensors", "there is no such file"),
        ("stabiltyai/sd-15", "is not in the Hugging Face cache, and HF_HUB_OFFLINE is set; go online once"),
        ("owner/na..me", "neither an existing file or folder nor a Hugging Face id"),
        ("owner/name.git", "neither an existing file or folder nor a Hugging Face id"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_without_network(path, sentence):
    assert sentence in refusal(path)


def test_an_empty_folder_and_one_with_other_things(tmp_path):
    assert "is not a diffusers model folder (it has no unet/config.json; it is empty)" in refusal(tmp_path)
    (tmp_path / "cat.png").write_bytes(b"")
    assert "it holds cat.png); name the folder that holds model_index.json" in refusal(tmp_path)


def drop_weight(path: Path) -> None:
    weights = load_file(path)
    del weights[sorted(weights)[len(weights) // 2]]
    save_file(weights, path, {"format": "pt"})


def halve(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_a_missing_weight_is_never_made_up(copy, file):
    drop_weight(copy / file)
    assert f"{copy}: its {Path(file).parent} lacks 1 weights, such as " in refusal(copy)


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_a_truncated_weight_file_is_named(copy, file):
    halve(copy / file)
    assert f"{copy / file}: is truncated or damaged" in refusal(copy)


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_pickles_are_not_opened(copy, file):
    pickled = "pytorch_model.bin" if file == TEXT else "diffusion_pytorch_model.bin"
    torch.save(load_file(copy / file), (copy / file).with_name(pickled))
    (copy / file).unlink()
    assert "sdlora reads only safetensors, since pickles could run code when opened" in refusal(copy)


def test_a_missing_tokenizer_scheduler_or_vae_is_named(copy):
    shutil.move(copy / "tokenizer", copy / "kept")
    assert "its folder 'tokenizer' is missing or incomplete" in refusal(copy)
    shutil.move(copy / "kept", copy / "tokenizer")
    shutil.move(copy / "scheduler", copy / "kept")
    assert "scheduler_config.json" in refusal(copy)
    shutil.move(copy / "kept", copy / "scheduler")
    shutil.rmtree(copy / "vae")
    assert "holds no vae/" in refusal(copy)


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_broken_unet_config_is_named(copy, text):
    (copy / "unet" / "config.json").write_text(text)
    assert str(copy / "unet" / "config.json") in refusal(copy)


def test_an_inpainting_base_is_known_by_its_channels(copy):
    config = json.loads((copy / "unet" / "config.json").read_text())
    weights = load_file(copy / UNET)
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"]] * 2 + [weights["conv_in.weight"][:, :1]], dim=1)
    save_file(weights, copy / UNET, {"format": "pt"})
    assert not detect_base(copy).inpaints
    (copy / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    assert detect_base(copy).inpaints and load(copy).inpaints


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["lora_unet_conv_in.lora_up.weight"], "is an adapter (LoRA), not a base; give it as --adapter"),
        (["unet.conv_in.lora_A.weight"], "is an adapter (LoRA), not a base"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "holds no text encoder; use the full checkpoint"),
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x"],
            "holds no VAE; use the full checkpoint",
        ),
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"],
            "holds no text encoder; use the full checkpoint",
        ),
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.model.ln_final.weight"],
            "is the refiner of Stable Diffusion XL, not its base",
        ),
        (["model.diffusion_model.joint_blocks.0.x"], "is a Stable Diffusion 3 checkpoint"),
        (["model.diffusion_model.double_blocks.0.x"], "is a Flux checkpoint"),
        (["control_model.input_blocks.0.0.weight"], "is a ControlNet, not a base"),
        (["down_blocks.0.resnets.0.conv1.weight"], "is a single component of a diffusers folder"),
        (["emb_params"], "holds no Stable Diffusion checkpoint (1 tensors, such as 'emb_params')"),
        ([], "holds no Stable Diffusion checkpoint (0 tensors, such as 'none')"),
    ],
)
def test_a_file_that_is_no_base_is_told_from_its_header(tmp_path, keys, sentence):
    path = tmp_path / "a.safetensors"
    save_file({key: torch.ones(1) for key in keys}, path)
    assert sentence in refusal(path)


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.bin", "a.pth"])
def test_a_pickle_checkpoint_is_refused_by_name(tmp_path, name):
    torch.save({}, tmp_path / name)
    assert "is a pickle checkpoint, which could run code when opened" in refusal(tmp_path / name)


def test_a_pickle_under_another_name_is_refused(tmp_path):
    torch.save({}, tmp_path / "a.safetensors")
    assert "is a pickle or zip archive" in refusal(tmp_path / "a.safetensors")


# --- damage in a folder whose weights are in several files -------------------------------------------


@pytest.fixture
def sharded(copy) -> Path:
    """The tiny SD 1.x folder with its UNet in several files."""
    (copy / UNET).unlink()
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(copy / "unet"))
    unet.save_pretrained(copy / "unet", max_shard_size="300KB")
    assert len(list((copy / "unet").glob("*-of-*.safetensors"))) > 2
    return copy


def test_a_missing_shard_is_noticed(sharded):
    load(sharded)
    sorted((sharded / "unet").glob("*-of-*.safetensors"))[1].unlink()
    assert f"{sharded}: its unet lacks" in refusal(sharded)


def test_a_truncated_shard_is_named(sharded):
    shard = sorted((sharded / "unet").glob("*-of-*.safetensors"))[1]
    halve(shard)
    assert f"{shard}: is truncated or damaged" in refusal(sharded)


@pytest.mark.parametrize(
    ("pipeline", "name"), [("StableDiffusion3Pipeline", "Stable Diffusion 3"), ("FluxPipeline", "Flux")]
)
def test_folders_of_other_models_are_named(tmp_path, pipeline, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    assert f"is a {name} model ({pipeline}), which sdlora does not support" in refusal(tmp_path)


def test_an_unknown_prediction_type_is_refused(copy):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "sample"}))
    assert "prediction_type is 'sample'; sdlora knows epsilon and v_prediction" in refusal(copy)


def test_a_prediction_of_the_user_goes_before_the_folders(copy):
    assert load(copy).prediction == "epsilon"
    assert load(copy, prediction="v").prediction == "v"


def test_odd_things_in_a_folder_are_told(copy):
    (copy / "model_index.json").unlink()
    torch.save({}, copy / "unet" / "diffusion_pytorch_model.bin")
    odd = " | ".join(detect_base(copy).odd)
    assert "there is no model_index.json" in odd
    assert "pickle files lie in it and are never opened (unet/diffusion_pytorch_model.bin)" in odd
    assert load(copy).prediction == "epsilon"


def test_a_tokenizer_of_two_files_is_enough(copy):
    shutil.rmtree(copy / "tokenizer")
    (copy / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(TINY_SD / "tokenizer" / name, copy / "tokenizer")
    base = load(copy)
    assert base.family.encode_prompts(base, ["a red ball"]).states.shape == (1, 77, 32)


def test_settings_that_do_not_fit_the_weights_are_a_sentence_whenever_the_unet_comes(copy):
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cross_attention_dim": 64}))
    assert "size mismatch for down_blocks.0" in refusal(copy)
    base = load_base(BaseSection(path=str(copy)), "cpu", unet=False)
    with pytest.raises(ModelError, match="its weights and its settings must belong together"):
        base.fetch_unet()


def test_too_little_memory_is_a_sentence_whenever_the_unet_comes(copy, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    base = load_base(BaseSection(path=str(copy)), "cpu", unet=False)
    monkeypatch.setattr(weights, "_placed", no_room)
    with pytest.raises(
        ModelError, match=r"does not fit into the GPU's memory; set base\.precision .* base\.quantize to nf4"
    ):
        base.fetch_unet()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"class_embed_type": "projection"}, "its UNet is also told a class or a picture"),
        ({"num_class_embeds": 1000}, "its UNet is also told a class or a picture"),
        ({"addition_embed_type": "image"}, "has a UNet of an unknown kind"),
        ({"in_channels": 8}, "is an image-editing model (its UNet takes 8 channels instead of 4, or 9 for inpainting)"),
    ],
)
def test_folders_of_related_models_are_named(copy, changes, sentence):
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert sentence in refusal(copy)


@pytest.mark.parametrize("kind", ["EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_another_kind_of_noise_is_refused(copy, kind):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": kind}))
    assert f"was trained with another kind of noise ({kind})" in refusal(copy)


@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "MagicScheduler", "os"])
def test_a_sampler_that_is_none_is_named(copy, kind):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": kind}))
    base = load(copy)  # training does not need it
    with pytest.raises(ModelError, match=f"names the sampler {kind}, which diffusers does not have"):
        base.family.make_pipeline(base)


def test_a_folder_that_leaves_the_prediction_out_predicts_epsilon_as_the_format_says(copy):
    path = copy / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text())
    del settings["prediction_type"]
    path.write_text(json.dumps(settings))
    facts = detect_base(copy)
    assert facts.prediction == "epsilon"
    assert facts.declared_by == "scheduler/scheduler_config.json, by leaving it out"


def test_what_keeps_a_folder_from_loading_is_told_before(sharded):
    sorted((sharded / "unet").glob("*-of-*.safetensors"))[1].unlink()
    shutil.rmtree(sharded / "scheduler")
    (sharded / "vae" / "config.json").unlink()
    shutil.rmtree(sharded / "tokenizer")
    odd = " | ".join(detect_base(sharded).odd)
    assert "scheduler/scheduler_config.json is missing" in odd
    assert "vae/config.json is missing" in odd and "tokenizer is missing" in odd
    assert "its unet is in" in odd


def test_weights_of_a_folder_without_a_place_are_told(copy):
    assert load(copy).notes == ()
    weights = {**load_file(copy / UNET), "mystery.weight": torch.ones(1)}
    save_file(weights, copy / UNET, {"format": "pt"})
    (note,) = load(copy).notes
    assert "holds 1 tensors for which Stable Diffusion 1.x has no place, such as mystery.weight" in note


def test_settings_for_checkpoints_are_refused_for_folders(copy):
    for setting in ("config", "tokenizer"):
        with pytest.raises(ConfigError, match="is a folder, which describes itself"):
            load(copy, **{setting: str(copy)})


def test_what_is_neither_file_nor_folder_is_named():
    assert "cannot be read as a file or folder" in refusal("/dev/null")


@pytest.mark.parametrize("device", ["bogus", "cuda:99", "cuda" if not torch.cuda.is_available() else "mps"])
def test_a_device_that_is_not_there_is_named(copy, device):
    with pytest.raises(ConfigError, match=f"device is '{device}'"):
        load_base(BaseSection(path=str(copy)), device)

"""Single files in the original layout, written by tests/ldm_layout.py."""

import json
import re
import shutil
from pathlib import Path

import ldm_layout
import pytest
import torch
from families_help import load, refusal
from PIL import ImageChops
from safetensors.torch import load_file, save_file

from sdlora.assets import TINY_SD
from sdlora.config import BaseSection
from sdlora.families.detect import detect_base
from sdlora.families.inspect import inspect_base
from sdlora.families.registry import describe_base, load_base
from sdlora.families.tiny import tiny_pipeline
from sdlora.generation.engine import Engine
from sdlora.generation.request import make_request

SHAPES = ["sd1", "sd2", "sdxl"]
DECLARED = {"sd1": "epsilon", "sd2": "v", "sdxl": "epsilon"}


@pytest.fixture
def checkpoint(checkpoints, tmp_path) -> Path:
    """A copy of the tiny SD 1.x checkpoint that a test may damage."""
    return Path(shutil.copy(checkpoints("sd1"), tmp_path / "tiny.safetensors"))


EXPECTED_KEYS = {
    "sd1": {
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.2.0.op.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.output_blocks.1.1.conv.weight",
        "first_stage_model.encoder.down.0.downsample.conv.weight",
        "first_stage_model.decoder.up.3.block.0.conv1.weight",
        "first_stage_model.decoder.mid.attn_1.proj_out.weight",
        "first_stage_model.quant_conv.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
    },
    "sd2": {
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
        "cond_stage_model.model.transformer.resblocks.2.mlp.c_fc.bias",
        "cond_stage_model.model.positional_embedding",
        "cond_stage_model.model.ln_final.weight",
    },
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_q.weight",
        "model.diffusion_model.output_blocks.2.2.conv.weight",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc2.weight",
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias",
        "conditioner.embedders.1.model.text_projection",
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout_is_the_original_one(checkpoints, shape):
    assert set(load_file(checkpoints(shape))) >= EXPECTED_KEYS[shape]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_single_file_has_the_folders_weights_and_pictures(checkpoints, tiny_folder, shape):
    folder = tiny_folder(shape)
    single, whole = load(checkpoints(shape), config=str(folder)), load(folder)
    assert single.family is whole.family
    assert single.prediction == whole.prediction == DECLARED[shape]
    assert single.resolution == whole.resolution
    assert single.notes == ()
    assert single.weights_sha256() == whole.weights_sha256()
    request = make_request(prompt="a red ball", negative_prompt="blue", seed=5, steps=3)
    ((one, recipe),) = Engine(single).generate(request)
    ((other, reference),) = Engine(whole).generate(request)
    assert ImageChops.difference(one, other).getbbox() is None
    assert recipe.base == shape
    assert recipe.scheduler_config == reference.scheduler_config


@pytest.mark.parametrize("shape", SHAPES)
def test_a_half_precision_file_with_averaged_weights_loads_its_own(tiny_folder, tmp_path, shape):
    path = tmp_path / "half.safetensors"
    markers = ("v_pred",) if shape == "sd2" else ()
    ldm_layout.write_checkpoint(tiny_pipeline(shape), path, dtype=torch.float16, ema=True, markers=markers)
    facts = detect_base(path)
    assert {precision for _, precision in facts.components.values()} == {"fp16"}
    assert any("averaged (EMA) weights" in sentence for sentence in facts.odd)
    half, whole = load(path, config=str(tiny_folder(shape)), prediction=DECLARED[shape]), load(tiny_folder(shape))
    ours, theirs = half.unet.state_dict(), whole.unet.state_dict()
    assert all(torch.equal(ours[name], theirs[name].half().float()) for name in theirs)


@pytest.mark.parametrize(
    ("markers", "metadata", "prediction", "zero_snr", "said_by"),
    [
        ((), {}, None, False, ""),
        (("v_pred",), {}, "v", False, "its marker tensor v_pred"),
        (("v_pred", "ztsnr"), {}, "v", True, "its marker tensor v_pred"),
        (("ztsnr",), {}, "v", True, "its marker tensor ztsnr"),
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, "v", False, "its marker tensor v_pred"),
        ((), {"modelspec.prediction_type": "v_prediction"}, "v", False, "its metadata modelspec.prediction_type"),
        ((), {"modelspec.prediction_type": "epsilon"}, "epsilon", False, "its metadata modelspec.prediction_type"),
        ((), {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v", False, "its metadata modelspec.arch"),
        ((), {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", False, "its metadata modelspec.arch"),
        ((), {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, None, False, ""),
    ],
)
def test_what_a_checkpoint_declares_to_predict(tmp_path, markers, metadata, prediction, zero_snr, said_by):
    path = tmp_path / "named-v-pred-or-epsilon.safetensors"
    ldm_layout.write_checkpoint(tiny_pipeline("sdxl"), path, markers=markers, metadata=metadata)
    facts = detect_base(path)
    assert (facts.prediction, facts.zero_terminal_snr) == (prediction, zero_snr)
    assert facts.declared_by.startswith(said_by) and bool(facts.declared_by) == bool(said_by)
    assert any("does not say whether it predicts" in sentence for sentence in facts.odd) == (prediction is None)


def test_zero_terminal_snr_reaches_schedule_and_sampler(tiny_folder, tmp_path):
    path = tmp_path / "a.safetensors"
    ldm_layout.write_checkpoint(tiny_pipeline("sdxl"), path, markers=("v_pred", "ztsnr"))
    base = load(path, config=str(tiny_folder("sdxl")))
    plain = load(tiny_folder("sdxl"))
    assert base.prediction == "v"
    # Lin et al. 2023, algorithm 1, by hand on the plain schedule.
    root = plain.alphas_cumprod.double().sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(base.alphas_cumprod.double(), expected, atol=1e-6, rtol=1e-4)
    assert base.alphas_cumprod[-1] == 0
    sampler = base.family.make_pipeline(base).scheduler
    assert type(sampler).__name__ == "EulerDiscreteScheduler"
    sampler.set_timesteps(10)
    assert sampler.timesteps[0] == 999
    ((picture, _),) = Engine(base).generate(make_request(prompt="a ball", steps=3))
    assert picture.getextrema() != ((0, 0),) * 3
    assert "its noise ends at zero signal" in refusal(path, config=str(tiny_folder("sdxl")), prediction="epsilon")


@pytest.fixture(scope="module")
def trained_checkpoint(tmp_path_factory) -> Path:
    """The base that ships with sdlora, really trained to predict epsilon, as a file that does not say so."""
    from diffusers import StableDiffusionPipeline

    path = tmp_path_factory.mktemp("trained") / "tiny-v.safetensors"
    ldm_layout.write_checkpoint(StableDiffusionPipeline.from_pretrained(TINY_SD, safety_checker=None), path)
    return path


@pytest.fixture
def silent_config(tmp_path) -> str:
    """A folder that describes the base that ships with sdlora, but not what it predicts."""
    folder = tmp_path / "config"
    shutil.copytree(TINY_SD, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text())
    del settings["prediction_type"]
    path.write_text(json.dumps(settings))
    return str(folder)


def test_what_is_not_declared_is_measured(trained_checkpoint, silent_config):
    base = load(trained_checkpoint, config=silent_config)
    assert base.prediction == "epsilon"
    assert base.notes == ("the base does not say what it predicts; measured: epsilon",)


def test_it_is_measured_when_the_unet_comes_though_the_encoders_are_gone(trained_checkpoint, silent_config):
    section = BaseSection(path=str(trained_checkpoint), config=silent_config, precision="fp32")
    base = load_base(section, "cpu", unet=False)
    assert all(parameter.is_meta for parameter in base.unet.parameters())
    base.drop_encoders()
    base.fetch_unet()
    assert base.notes == ("the base does not say what it predicts; measured: epsilon",)


@pytest.mark.parametrize(
    ("metadata", "settings", "prediction", "side"),
    [
        ({"modelspec.prediction_type": "v"}, {}, "v", 768),
        ({"modelspec.prediction_type": "v"}, {"prediction": "epsilon"}, "epsilon", 512),
        ({}, {"prediction": "v"}, "v", 768),
        ({}, {}, None, 512),
    ],
)
def test_a_description_follows_what_the_user_says_of_the_prediction(tmp_path, metadata, settings, prediction, side):
    path = tmp_path / "a.safetensors"
    ldm_layout.write_checkpoint(tiny_pipeline("sd2"), path, metadata=metadata)
    described = describe_base(BaseSection(path=str(path), **settings))
    assert (described.prediction, described.side, described.sampler) == (prediction, side, "PNDMScheduler")


def test_where_the_size_of_pictures_hangs_on_it_it_is_measured_at_once(tmp_path, tiny_folder):
    """SD 2.x: 512 pixels where it predicts epsilon, 768 where it predicts v. An untrained UNet returns no noise."""
    path, config = tmp_path / "a.safetensors", tmp_path / "config"
    pipeline = tiny_pipeline("sd2")
    ldm_layout.write_checkpoint(pipeline, path)
    shutil.copytree(tiny_folder("sd2"), config, ignore=shutil.ignore_patterns("*.safetensors"))
    for part, key in (("unet", "sample_size"), ("scheduler", "prediction_type")):
        (file,) = (config / part).glob("*config.json")
        settings = json.loads(file.read_text())
        settings.pop(key)
        file.write_text(json.dumps({**settings, **({"sample_size": None} if part == "unet" else {})}))
    base = load_base(BaseSection(path=str(path), config=str(config), precision="fp32"), "cpu", unet=False)
    assert (base.prediction, base.resolution) == ("v", 768)
    assert not any(parameter.is_meta for parameter in base.unet.parameters())


def test_a_declaration_of_the_user_is_followed(trained_checkpoint, silent_config):
    base = load(trained_checkpoint, config=silent_config, prediction="v")
    assert base.prediction == "v"
    assert base.notes == ()
    assert base.family.make_pipeline(base).scheduler.config.prediction_type == "v_prediction"


def test_a_configuration_that_the_user_names_declares_too(trained_checkpoint):
    assert load(trained_checkpoint, config=str(TINY_SD)).notes == ()


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("edm_mean", "is a Playground 2.5 checkpoint (EDM)"),
        ("edm_vpred.sigma_max", "is a CosXL checkpoint (EDM)"),
        ("noise_augmentor.scheduler.betas", "is an unCLIP model"),
        ("model.diffusion_model.middle_block.0.in_layers.2.scale_weight", "is stored in scaled fp8"),
    ],
)
def test_what_only_looks_like_a_family_is_named(checkpoints, tmp_path, extra, sentence):
    path = tmp_path / "a.safetensors"
    save_file({**load_file(checkpoints("sdxl")), extra: torch.ones(1)}, path)
    assert sentence in refusal(path)


def test_a_unet_that_is_told_a_class_is_named(checkpoints, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({**load_file(checkpoints("sd2")), "model.diffusion_model.label_emb.0.0.weight": torch.ones(1)}, path)
    assert "its UNet is also told a class or a picture" in refusal(path)


def test_weights_without_a_place_are_told(checkpoints, tiny_folder, tmp_path):
    path = tmp_path / "a.safetensors"
    extra = "model.diffusion_model.input_blocks.1.0.adapter.weight"
    weights = {**load_file(checkpoints("sd1")), extra: torch.ones(2)}
    save_file(weights, path, {"modelspec.prediction_type": "epsilon"})
    (note,) = load(path, config=str(tiny_folder("sd1"))).notes
    assert f"holds 1 tensors for which Stable Diffusion 1.x has no place, such as {extra}" in note


def test_stray_keys_of_another_family_do_not_mislead(checkpoints, tmp_path):
    path = tmp_path / "merge.safetensors"
    stray = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77.0)}
    save_file({**load_file(checkpoints("sdxl")), **stray}, path)
    facts = detect_base(path)
    assert facts.family.name == "sdxl"
    assert facts.components["text_encoder"][0] > 10_000


def test_a_checkpoint_for_inpainting_or_editing_is_known_by_its_channels(checkpoint):
    weights = load_file(checkpoint)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    plain = weights[key]
    save_file({**weights, key: torch.cat([plain, plain, plain[:, :1]], dim=1)}, checkpoint)
    assert detect_base(checkpoint).inpaints
    assert inspect_base(BaseSection(path=str(checkpoint))).to_json()["inpainting"] is True
    save_file({**weights, key: torch.cat([plain, plain], dim=1)}, checkpoint)
    assert "is an image-editing model (its UNet takes 8 channels instead of 4, or 9 for inpainting)" in refusal(
        checkpoint
    )


def test_odd_things_in_a_checkpoint_are_told(checkpoint):
    weights = load_file(checkpoint)
    start = "model.diffusion_model."
    weights = {key: value.half() if key.startswith(start + "out") else value for key, value in weights.items()}
    position = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    weights |= {position: weights[position].half(), "training.notes": torch.zeros(2)}
    save_file(weights, checkpoint)
    odd = " | ".join(detect_base(checkpoint).odd)
    assert "its unet mixes fp" in odd
    assert "position_ids are stored as fractions" in odd
    assert "it holds 1 tensors besides its components, such as training.notes" in odd


def test_a_tokenizer_beside_the_checkpoint_is_found(checkpoint, tiny_folder, tmp_path):
    config = tmp_path / "config"
    shutil.copytree(tiny_folder("sd1"), config, ignore=shutil.ignore_patterns("tokenizer", "*.safetensors"))
    assert "a checkpoint holds no tokenizer and none was found beside it" in refusal(checkpoint, config=str(config))
    shutil.copytree(TINY_SD / "tokenizer", checkpoint.parent / "tokenizer")
    base = load(checkpoint, config=str(config))
    assert (
        base.tokenizers["text_encoder"]("a red ball").input_ids
        == load("tiny").tokenizers["text_encoder"]("a red ball").input_ids
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_one_tokenizer_serves_every_encoder_with_its_own_filling(checkpoints, tiny_folder, shape):
    named = load(checkpoints(shape), config=str(tiny_folder(shape)), tokenizer=str(TINY_SD / "tokenizer"))
    own = load(tiny_folder(shape))
    for encoder, tokenizer in own.tokenizers.items():
        expected = tokenizer("a red ball", padding="max_length").input_ids
        assert named.tokenizers[encoder]("a red ball", padding="max_length").input_ids == expected


def test_a_tokenizer_named_by_the_user_is_used_or_refused(checkpoint, tiny_folder, tmp_path):
    folder = str(tiny_folder("sd1"))
    assert load(checkpoint, config=folder, tokenizer=str(TINY_SD / "tokenizer")).tokenizers
    assert "base.tokenizer:" in refusal(checkpoint, config=folder, tokenizer=str(tmp_path))
    assert "base.tokenizer:" in refusal(checkpoint, config=folder, tokenizer="./no/such/folder")
    assert "base.tokenizer:" in refusal(checkpoint, config=folder, tokenizer="owner/tokenizer")


@pytest.mark.parametrize("shape", SHAPES)
def test_another_architecture_than_the_config_says_is_refused(checkpoints, tmp_path, shape):
    tokenizer = str(TINY_SD / "tokenizer")
    assert "a checkpoint of another size needs base.config" in refusal(checkpoints(shape), tokenizer=tokenizer)
    assert "base.config must be a diffusers folder" in refusal(checkpoints(shape), config=str(tmp_path))


@pytest.mark.parametrize(
    ("shape", "key"),
    [
        ("sd1", "model.diffusion_model.middle_block.1.proj_in.weight"),
        ("sd1", "first_stage_model.decoder.mid.attn_1.q.weight"),
        ("sd1", "first_stage_model.decoder.up.3.block.0.conv1.bias"),
        ("sd1", "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"),
        ("sd2", "cond_stage_model.model.ln_final.bias"),
        ("sdxl", "conditioner.embedders.1.model.text_projection"),
        ("sdxl", "model.diffusion_model.label_emb.0.2.weight"),
    ],
)
def test_a_checkpoint_that_lacks_a_weight_is_refused(checkpoints, tiny_folder, tmp_path, shape, key):
    weights = load_file(checkpoints(shape))
    del weights[key]
    path = tmp_path / "lacking.safetensors"
    save_file(weights, path, {"modelspec.prediction_type": "v"})
    assert re.search("lacks (1 weights, such as|the weight) ", refusal(path, config=str(tiny_folder(shape))))


def test_a_truncated_checkpoint_is_named(checkpoint):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: len(data) // 2])
    assert "is truncated or damaged" in refusal(checkpoint)

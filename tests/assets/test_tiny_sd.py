"""The tiny base: loads in plain diffusers, offline; its tokenizer has tokens for any text."""

import json
import math
import socket

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from transformers import CLIPTokenizer

from sdlora.assets import TINY_SD, scenes


@pytest.fixture(scope="module")
def pipeline():
    loaded = StableDiffusionPipeline.from_pretrained(TINY_SD, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(TINY_SD / "tokenizer")


def test_the_folder_is_small_and_holds_a_model_card():
    assert sum(path.stat().st_size for path in TINY_SD.rglob("*") if path.is_file()) < 16 * 2**20
    card = (TINY_SD / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card


def test_every_weight_is_a_finite_float16():
    for path in TINY_SD.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                tensor = file.get_tensor(key)
                assert tensor.dtype == torch.float16 or not tensor.is_floating_point(), key
                assert tensor.isfinite().all(), key


def test_it_loads_without_a_network_and_in_one_data_type(monkeypatch, recwarn):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    loaded = StableDiffusionPipeline.from_pretrained(TINY_SD)
    kinds = {p.dtype for part in (loaded.unet, loaded.vae, loaded.text_encoder) for p in part.parameters()}
    assert kinds == {torch.float32}
    assert not [str(w.message) for w in recwarn if "weights" in str(w.message).lower()]


def test_stored_weights_are_exactly_the_models_keys(pipeline):
    for name in ("unet", "vae", "text_encoder"):
        (path,) = (TINY_SD / name).glob("*.safetensors")
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(getattr(pipeline, name).state_dict())


def test_it_is_a_stable_diffusion_pipeline_in_every_number_that_counts(pipeline):
    scheduler = pipeline.scheduler.config
    assert (scheduler.beta_start, scheduler.beta_end) == (0.00085, 0.012)
    assert (scheduler.beta_schedule, scheduler.steps_offset) == ("scaled_linear", 1)
    assert scheduler.prediction_type == "epsilon"
    assert pipeline.unet.config.sample_size == 16
    assert pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels == 4
    assert pipeline.vae_scale_factor == 8
    assert pipeline.tokenizer.model_max_length == 77
    assert pipeline.unet.config.cross_attention_dim == pipeline.text_encoder.config.hidden_size
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id
    attentions = [key for key in pipeline.unet.state_dict() if key.endswith("attn2.to_q.weight")]
    places = {key.split(".transformer_blocks")[0].rsplit(".attentions", 1)[0] for key in attentions}
    blocks = {f"{half}_blocks.{number}" for half in ("down", "up") for number in range(3)}
    assert places == blocks | {"mid_block"}


@pytest.mark.parametrize(
    "text",
    ["Ünïcode 東京 🦊", "a zorblin's \x00 \x7f 한국 ñandú", "q" * 60, "", "1234 !!! <html> \\n"],
)
def test_every_text_has_tokens_and_none_is_unknown(tokenizer, pipeline, text):
    plain = list(tokenizer.tokenize(text))
    assert tokenizer.unk_token not in plain
    ids = tokenizer(text).input_ids
    assert ids == pipeline.tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    kept = tokenizer.decode(ids[1:-1], skip_special_tokens=False).replace(" ", "")
    assert kept == "".join(text.lower().split())


def test_every_byte_has_a_token_alone_and_at_the_end_of_a_word(tokenizer):
    vocabulary = tokenizer.get_vocab()
    symbols = [token for token in vocabulary if len(token.removesuffix("</w>")) == 1]
    assert len(symbols) == 512
    assert vocabulary == json.loads((TINY_SD / "tokenizer" / "vocab.json").read_text("utf-8"))


def test_caption_words_are_single_tokens_and_texts_are_padded_with_the_end_mark(tokenizer):
    words = ["a", "red", "ball", "on", "a", "checkered", "floor"]
    assert tokenizer.tokenize(" ".join(words)) == [f"{word}</w>" for word in words]
    ids = tokenizer("a red ball", padding="max_length").input_ids
    assert len(ids) == 77
    assert set(ids[4:]) == {tokenizer.eos_token_id} == {tokenizer.pad_token_id}


def test_latents_of_scenes_have_about_unit_deviation_and_decode_to_the_scene(pipeline):
    drawn = [
        scenes.draw(scenes.Scene(kind, hue, place))
        for kind, hue, place in zip(scenes.OBJECTS, scenes.COLOURS, scenes.BACKGROUNDS, strict=False)
    ]
    pixels = pipeline.image_processor.preprocess(drawn)
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    assert math.isclose(latents.std().item(), 1.0, abs_tol=0.15)
    assert (decoded - pixels).abs().mean() < 0.1


def test_a_prompt_decides_the_picture(pipeline):
    def make(prompt: str) -> torch.Tensor:
        seeded = torch.Generator().manual_seed(0)
        given = {"num_inference_steps": 4, "generator": seeded, "output_type": "pt"}
        return pipeline(prompt, **given).images

    night, beach = make("a red ball in the night sky"), make("a red ball on a beach")
    assert night.shape == (1, 3, 128, 128)
    assert night[:, :, :12].mean() < 0.35 < beach[:, :, :12].mean()

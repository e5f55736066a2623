"""What SDXL has and the others have not: two encoders, a pooled embedding, picture sizes, a VAE that overflows."""

import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from families_help import load, refusal

from sdlora.assets import CONFIGS
from sdlora.config import BaseSection
from sdlora.families.base import PictureSize
from sdlora.families.registry import load_base
from sdlora.families.sdxl import SDXL

CPU = torch.device("cpu")


@pytest.fixture
def base(tiny_folder):
    return load(tiny_folder("sdxl"))


def test_prompts_are_encoded_as_the_pipeline_does(base, tiny_folder):
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder("sdxl"))
    prompts = ["a red ball", "", "ball " * 200]
    ours = base.family.encode_prompts(base, prompts)
    for row, prompt in enumerate(prompts):
        states, _, pooled, _ = pipeline.encode_prompt(prompt, device=CPU, do_classifier_free_guidance=False)
        torch.testing.assert_close(ours.states[row], states[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.pooled[row], pooled[0], atol=1e-5, rtol=1e-5)
    assert ours.states.shape == (3, 77, 64) and ours.pooled.shape == (3, 32)


@pytest.mark.parametrize("zero", [True, False])
def test_no_prompt_is_what_the_base_says(base, tiny_folder, zero):
    base.zero_without_prompt = zero
    nothing = base.family.encode_prompts(base, [None, "a red ball"])
    empty = base.family.encode_prompts(base, ["", "a red ball"])
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder("sdxl"), force_zeros_for_empty_prompt=zero)
    _, states, _, pooled = pipeline.encode_prompt("a red ball", device=CPU)
    torch.testing.assert_close(nothing.states[0], states[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(nothing.pooled[0], pooled[0], atol=1e-5, rtol=1e-5)
    assert bool((nothing.states[0] == 0).all()) == zero
    torch.testing.assert_close(nothing.states[1], empty.states[1])
    assert not (empty.states[0] == 0).any()


def test_the_folder_says_whether_no_prompt_is_zero(tiny_folder, tmp_path):
    assert load(tiny_folder("sdxl")).zero_without_prompt is True
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder("sdxl"), force_zeros_for_empty_prompt=False)
    pipeline.save_pretrained(tmp_path)
    assert load(tmp_path).zero_without_prompt is False


def test_the_unet_is_told_size_crop_and_target_of_each_picture(base):
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    conditioning = base.family.encode_prompts(base, ["a", "b"])
    sizes = [PictureSize((300, 200), (7, 0), (64, 64)), PictureSize((64, 64), (0, 0), (64, 64))]
    with torch.no_grad():
        ours = base.family.predict(base, latents, timesteps, conditioning, sizes)
        told = {
            "text_embeds": conditioning.pooled,
            "time_ids": torch.tensor([[300.0, 200, 7, 0, 64, 64], [64, 64, 0, 0, 64, 64]]),
        }
        theirs = base.unet(latents, timesteps, conditioning.states, added_cond_kwargs=told).sample
        other = base.family.predict(base, latents, timesteps, conditioning, sizes[::-1])
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, other, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "force_upcast", "precision", "expected"),
    [
        ("sdxl", True, "fp16", torch.float32),
        ("sdxl", False, "fp16", torch.float16),  # a VAE that was mended says so
        ("sdxl", True, "bf16", torch.bfloat16),
        ("sd1", True, "fp16", torch.float16),
    ],
)
def test_a_vae_that_overflows_in_fp16_is_kept_in_fp32(tiny_folder, tmp_path, shape, force_upcast, precision, expected):
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder(shape), folder)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    vae.register_to_config(force_upcast=force_upcast)
    vae.save_pretrained(folder / "vae")
    base = load_base(BaseSection(path=str(folder), precision=precision), "cpu")
    assert base.vae.dtype == expected
    assert base.unet.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def test_the_bundled_vae_settings_say_that_it_overflows():
    assert AutoencoderKL.load_config(CONFIGS / "sdxl" / "vae")["force_upcast"] is True


def test_decoding_stays_in_the_vaes_own_precision_under_autocast(base):
    latents = torch.randn(1, 4, 8, 8)
    alone = base.family.decode_latents(base, latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(base.family.decode_latents(base, latents), alone)


def test_a_refiner_is_refused_by_name(tiny_folder, tmp_path):
    folder = tmp_path / "refiner"
    shutil.copytree(tiny_folder("sdxl"), folder, ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    assert "is the refiner of Stable Diffusion XL, not its base" in refusal(folder)


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_a_missing_second_encoder_or_tokenizer_is_named(tiny_folder, tmp_path, part):
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder("sdxl"), folder, ignore=shutil.ignore_patterns(part))
    assert part in refusal(folder)


def test_the_entries_by_which_other_programs_tell_the_family():
    for prediction in ("epsilon", "v"):
        assert SDXL.metadata[prediction] == {
            "ss_v2": "False",
            "ss_base_model_version": "sdxl_base_v1-0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        }

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from sdlora.assets import CONFIGS
from sdlora.families.base import BaseParts, BaseSource
from sdlora.families.registry import FAMILIES
from sdlora.families.sd import SD1, SD2
from sdlora.families.tiny import tiny_pipeline


@pytest.mark.parametrize(("shape", "family", "prediction"), [("sd1", SD1, "epsilon"), ("sd2", SD2, "v")])
def test_a_loaded_base_is_frozen_and_knows_its_kind(tiny_base, shape, family, prediction):
    base = tiny_base(shape)
    assert base.family is family
    assert base.prediction == prediction
    assert base.resolution == 64
    for _, module in base.components():
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_the_noise_schedule_is_stable_diffusions(tiny_base):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(tiny_base().alphas_cumprod.double(), (1 - betas).cumprod(0), atol=1e-5, rtol=1e-4)


def test_latents_are_scaled_and_come_back(tiny_base):
    base = tiny_base()
    pixels = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = base.family.encode_images(base, pixels)
    with torch.no_grad():
        posterior = base.vae.encode(pixels).latent_dist
    assert mean.shape == std.shape == (2, 4, 8, 6)
    assert torch.equal(mean, posterior.mean * 0.18215)
    assert torch.equal(std, posterior.std * 0.18215)
    decoded = base.family.decode_latents(base, mean)
    with torch.no_grad():
        expected = (base.vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)
    assert decoded.shape == (2, 3, 64, 48)


def test_a_shift_factor_is_used_both_ways(tiny_base):
    base = tiny_base()
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, _ = base.family.encode_images(base, pixels)
    plain = base.family.decode_latents(base, mean)
    base.vae.register_to_config(shift_factor=0.5)
    shifted, _ = base.family.encode_images(base, pixels)
    torch.testing.assert_close(shifted, mean - 0.5 * 0.18215)
    torch.testing.assert_close(base.family.decode_latents(base, shifted), plain, atol=1e-5, rtol=1e-5)


def test_prompts_are_encoded_as_the_pipeline_does(tiny_base):
    base = tiny_base()
    prompts = ["a red ball", "", "ball " * 200]
    states = base.family.encode_prompts(base, prompts).states
    pipeline = base.family.make_pipeline(base)
    for row, prompt in enumerate(prompts):
        theirs, _ = pipeline.encode_prompt(prompt, torch.device("cpu"), 1, False)
        torch.testing.assert_close(states[row], theirs[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(states[0], states[1], atol=1e-3)


def test_predict_is_the_unets_output(tiny_base):
    base = tiny_base()
    latents = torch.randn(2, 4, 8, 6)
    conditioning = base.family.encode_prompts(base, ["a", "b"])
    with torch.no_grad():
        ours = base.family.predict(base, latents, torch.tensor([3, 900]), conditioning, [])
        theirs = base.unet(latents, torch.tensor([3, 900]), conditioning.states).sample
    assert torch.equal(ours, theirs)


def test_the_pipeline_uses_these_very_components_and_the_bases_own_sampler(tiny_base):
    base = tiny_base("sd2")
    pipeline = base.family.make_pipeline(base)
    assert pipeline.unet is base.unet
    assert pipeline.vae is base.vae
    assert pipeline.text_encoder is base.text_encoders["text_encoder"]
    assert type(pipeline.scheduler).__name__ == "PNDMScheduler"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.skip_prk_steps is True
    assert pipeline.scheduler.config.steps_offset == 1
    assert isinstance(base.scheduler, DDPMScheduler)


@pytest.mark.parametrize(
    ("family", "prediction", "entries"),
    [
        (SD1, "epsilon", ("False", "sd_v1", "stable-diffusion-v1/lora")),
        (SD1, "v", ("False", "sd_v1_v", "stable-diffusion-v1/lora")),
        (SD2, "epsilon", ("True", "sd_v2", "stable-diffusion-v2-512/lora")),
        (SD2, "v", ("True", "sd_v2_v", "stable-diffusion-v2-768-v/lora")),
    ],
)
def test_the_entries_by_which_other_programs_tell_the_family(family, prediction, entries):
    keys = ("ss_v2", "ss_base_model_version", "modelspec.architecture")
    assert family.metadata[prediction] == dict(zip(keys, entries, strict=True))


@pytest.mark.parametrize(
    ("shape", "prediction", "resolution"),
    [
        ("sd1", "epsilon", 512),
        ("sd2", "epsilon", 512),
        ("sd2", "v", 768),
        ("sdxl", "epsilon", 1024),
        ("sdxl", "v", 1024),
    ],
)
def test_a_base_that_does_not_say_its_size_has_its_kinds(shape, prediction, resolution):
    pipeline = tiny_pipeline(shape, prediction=prediction)
    pipeline.unet.register_to_config(sample_size=None)
    encoders = {name: getattr(pipeline, name) for name in FAMILIES[shape].text_encoders}
    parts = BaseParts(
        source=BaseSource("a", Path("a.safetensors"), ""),
        unet=pipeline.unet,
        fill_unet=lambda: None,
        vae=pipeline.vae,
        text_encoders=encoders,
        tokenizers={},
        scheduler_config=dict(pipeline.scheduler.config),
    )
    base = FAMILIES[shape].assemble(parts, torch.device("cpu"), torch.float32)
    assert (base.resolution, base.prediction) == (resolution, prediction)


@pytest.mark.parametrize("shape", ["sd1", "sd2", "sdxl"])
def test_the_bundled_settings_leave_the_size_to_the_family(shape):
    assert UNet2DConditionModel.load_config(CONFIGS / shape / "unet")["sample_size"] is None

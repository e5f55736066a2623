"""A schedule that ends in pure noise, against Lin et al. 2023 worked out in float64 and diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from sdlora.diffusion import signal_to_noise
from sdlora.errors import ConfigError
from sdlora.families.latent import sampler
from sdlora.families.schedule import ends_in_pure_noise, rescale_to_zero_snr, zero_snr_sampler

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2


@pytest.fixture
def base(tiny_base):
    """A base that predicts v, on the schedule of Stable Diffusion."""
    return tiny_base("sd2")


def test_the_training_schedule_is_the_formula_in_float64(base):
    rescale_to_zero_snr(base)
    root = (1 - BETAS).cumprod(0).sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(base.alphas_cumprod.double(), expected, atol=1e-6, rtol=1e-4)
    assert base.alphas_cumprod[-1] == 0
    assert base.alphas_cumprod[0].item() == pytest.approx(1 - 0.00085, abs=1e-6)
    assert signal_to_noise(torch.tensor([999]), base.alphas_cumprod).item() == 0


def test_the_training_schedule_is_diffusers_own(base):
    rescale_to_zero_snr(base)
    expected = (1 - rescale_zero_terminal_snr(BETAS.float())).cumprod(0)
    torch.testing.assert_close(base.alphas_cumprod, expected, atol=1e-6, rtol=1e-5)


def test_a_base_predicts_what_it_did(base):
    rescale_to_zero_snr(base)
    assert base.prediction == "v"


def test_its_pictures_begin_at_pure_noise_with_a_sampler_that_can(base):
    """PNDM, which the base names, divides by the signal."""
    assert base.sampler_config["_class_name"] == "PNDMScheduler"
    rescale_to_zero_snr(base)
    made = sampler(base)
    assert isinstance(made, EulerDiscreteScheduler)
    assert made.config.prediction_type == "v_prediction"
    made.set_timesteps(4)
    assert made.timesteps.tolist() == [999, 749, 499, 249]
    torch.testing.assert_close(made.alphas_cumprod, base.alphas_cumprod, atol=1e-7, rtol=0)
    assert made.sigmas[0] > 1000  # as close to pure noise as its formula goes; 14.6 before
    assert "PNDMScheduler cannot begin at pure noise; EulerDiscreteScheduler" in base.notes[-1]


def test_pictures_come_out_finite(base):
    rescale_to_zero_snr(base)
    pipeline = base.family.make_pipeline(base)
    generator = torch.Generator().manual_seed(0)
    picture = pipeline("a ball", num_inference_steps=2, height=64, width=64, output_type="latent", generator=generator)
    assert picture.images.isfinite().all()


def test_a_sampler_that_can_is_kept(base):
    base.sampler_config["_class_name"] = "DDIMScheduler"
    notes = base.notes
    rescale_to_zero_snr(base)
    made = sampler(base)
    assert isinstance(made, DDIMScheduler)
    made.set_timesteps(4)
    assert made.timesteps[0] == 999
    assert made.alphas_cumprod[-1] == 0
    assert base.notes == notes


def test_a_schedule_that_ends_in_pure_noise_is_left_as_it_is(base):
    rescale_to_zero_snr(base)
    scheduler, described, notes = base.scheduler, dict(base.sampler_config), base.notes
    rescale_to_zero_snr(base)
    assert base.scheduler is scheduler
    assert base.sampler_config == described
    assert base.notes == notes


def test_a_base_that_predicts_epsilon_is_refused_unchanged(tiny_base):
    base = tiny_base("sd1")
    table, described = base.alphas_cumprod, dict(base.sampler_config)
    with pytest.raises(
        ConfigError, match=r"objective.zero_terminal_snr: .*predicts epsilon.*use a base that predicts v"
    ):
        rescale_to_zero_snr(base)
    assert torch.equal(base.alphas_cumprod, table)
    assert base.sampler_config == described


def test_the_sampler_alone_can_be_had_and_leaves_the_base_as_it_is(base, tiny_base):
    table, described, notes = base.alphas_cumprod, dict(base.sampler_config), base.notes
    alone = zero_snr_sampler(base)
    assert torch.equal(base.alphas_cumprod, table)
    assert (base.sampler_config, base.notes) == (described, notes)
    rescaled = tiny_base("sd2")
    rescale_to_zero_snr(rescaled)
    assert type(alone) is type(sampler(rescaled))
    assert alone.config == sampler(rescaled).config


def test_a_schedule_tells_whether_it_ends_in_pure_noise(base):
    assert not ends_in_pure_noise(base)
    rescale_to_zero_snr(base)
    assert ends_in_pure_noise(base)

"""DPM fast and DPM adaptive against DPM-Solver's formulas (Lu et al. 2022), written out in float64.

The data are 1 and -1, equally often: what is denoised from x at sigma is tanh(x / sigma^2), which bends enough for
adaptive steps that are too long.
"""

import math

import numpy as np
import pytest
import torch
from dpm_solver_help import adaptive, fast

from sdlora.errors import ConfigError, GenerationError
from sdlora.families.samplers.evaluations import evaluations_of
from sdlora.families.samplers.make import make_sampler, schedule_of, settings_of
from sdlora.families.samplers.partway import last_steps
from sdlora.families.samplers.sigmas import sigmas_of
from sdlora.families.samplers.singlestep import fast_steps

SEED = 7


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def eps(x, sigma):
    """Return the noise in x."""
    return (x - torch.tanh(x / sigma**2)) / sigma


def drawing(like):
    """Return a draw of the noise of a step: float32 numbers of the picture's generator."""
    generator = seeded()
    return lambda: torch.randn(like.shape, generator=generator).double()


def begun(sampler, steps, run):
    sampler.set_timesteps(steps)
    sampler.set_begin_index(0)
    timesteps = last_steps(sampler, steps, run)
    return timesteps, evaluations_of(sampler, timesteps, steps, steps)


def sampled(sampler, steps, x, run=None):
    """Return what the sampler makes of x times its first level, how often it evaluated, and the levels there."""
    _, evaluations = begun(sampler, steps, steps if run is None else run)
    x, generator, levels = x * sampler.init_noise_sigma, seeded(), []
    training = np.log(sigmas_of(sampler.alphas_cumprod.numpy()))
    for evaluation in evaluations:
        timestep = evaluation.timestep
        inputs = sampler.scale_model_input(x, timestep)
        # The level that the UNet is told, by the timestep between two.
        sigma = math.exp(np.interp(timestep.item(), np.arange(1000), training))
        noisy = inputs * math.sqrt(1 + sigma**2)
        noise = eps(noisy, sigma)
        if sampler.config.prediction_type == "v_prediction":  # alpha eps - sigma x_0 of Salimans and Ho
            noise = (noise - sigma * torch.tanh(noisy / sigma**2)) / math.sqrt(1 + sigma**2)
        x = sampler.step(noise, timestep, x, generator=generator, return_dict=False)[0]
        levels.append(sigma)
    return x, levels


@pytest.fixture
def made(tiny_base):
    """`made(name, eta, shape)`: the sampler, on the tiny base of that shape; sd2 predicts v."""

    def make(name, eta=None, shape="sd1"):
        sampler = make_sampler(tiny_base(shape), name, "")
        if eta is not None:
            sampler.register_to_config(eta=eta)
        return sampler

    return make


def ends(sampler):
    training = sigmas_of(sampler.alphas_cumprod.numpy())
    return float(training[-1]), float(training[0])


def picture():
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", ["sd1", "sd2"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("evaluations", [1, 2, 3, 4, 5, 6, 20])
def test_fast_is_the_papers(made, evaluations, eta, shape):
    sampler = made("DPM fast", eta, shape)
    found, levels = sampled(sampler, evaluations, picture())
    high, low = ends(sampler)
    expected = fast(picture().double() * high, high, low, evaluations, eta, eps, drawing(picture()))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert len(levels) == evaluations
    assert levels[0] == pytest.approx(high, rel=1e-4) and min(levels) >= low


@pytest.mark.parametrize("shape", ["sd1", "sd2"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_adaptive_is_the_papers(made, eta, shape):
    """An attempt that failed has its first evaluation made already, so the next has two."""
    sampler = made("DPM adaptive", eta, shape)
    found, levels = sampled(sampler, 20, picture())
    high, low = ends(sampler)
    expected, tries, failed = adaptive(picture().double() * high, high, low, eta, eps, drawing(picture()))
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)
    assert failed >= 1
    assert len(levels) == 3 * tries - failed


def test_the_number_of_steps_does_not_change_what_adaptive_makes(made):
    sampler = made("DPM adaptive")
    once = sampled(sampler, 20, picture())
    for steps in (1, 100):
        again = sampled(sampler, steps, picture())
        assert torch.equal(again[0], once[0]) and again[1] == once[1]


def test_adaptive_ends_where_no_step_is_short_enough(made):
    sampler, generator = made("DPM adaptive"), seeded()
    _, evaluations = begun(sampler, 10, 10)
    x = picture() * sampler.init_noise_sigma
    with pytest.raises(GenerationError, match="finds no step short enough, since the UNet gives too large numbers"):
        for evaluation in evaluations:
            noise = 1e30 * torch.randn(x.shape, generator=generator)
            x = sampler.step(noise, evaluation.timestep, x, generator=generator, return_dict=False)[0]


@pytest.mark.parametrize("name", ["DPM fast", "DPM adaptive"])
@pytest.mark.parametrize("run", [12, 1])
def test_partway_it_is_the_same_from_the_level_of_uniform(made, name, run):
    """A timestep in 20 - run of 19 parts of the way from 999 to 0; at the last there is nothing left to do."""
    sampler, draw = made(name), drawing(picture())
    found, levels = sampled(sampler, 20, picture(), run)
    training, low = sigmas_of(sampler.alphas_cumprod.numpy()), ends(sampler)[1]
    place = 999 * (1 - (20 - run) / 19)
    high = math.exp(np.interp(place, np.arange(1000), np.log(training)))
    x = picture().double() * high
    is_fast = name == "DPM fast"
    expected = fast(x, high, low, run, 1.0, eps, draw) if is_fast else adaptive(x, high, low, 1.0, eps, draw)[0]
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)
    assert levels == [] or levels[0] == pytest.approx(high, rel=1e-4)


def test_fast_divides_its_evaluations_by_orders():
    orders = {count: [step.order for step in fast_steps(10.0, 0.1, count, 0.0)] for count in range(1, 9)}
    assert orders == {1: [1], 2: [2], 3: [2, 1], 4: [3, 1], 5: [3, 2], 6: [3, 2, 1], 7: [3, 3, 1], 8: [3, 3, 2]}
    steps = list(fast_steps(10.0, 0.1, 6, 1.0))
    # Of three steps from 10 to 0.1 each goes down by 100^(1/3); with t = s / 100^(1/3), down is t^2 / s.
    third_of_it = 100 ** (1 / 3)
    assert [step.end for step in steps] == pytest.approx([10 / third_of_it, 10 / third_of_it**2, 0.1])
    assert [step.down for step in steps] == pytest.approx([10 / third_of_it**2, 0.1, 0.1])


def test_what_a_recipe_and_a_schedule_are_told(made):
    for name, scheduler in (("DPM fast", "DPMFastScheduler"), ("DPM adaptive", "DPMAdaptiveScheduler")):
        sampler = made(name)
        assert schedule_of(sampler) == "Automatic"
        assert settings_of(sampler)["eta"] == 1.0
        assert type(sampler).__name__ == scheduler


def test_neither_can_begin_at_pure_noise(tiny_base):
    for name in ("DPM fast", "DPM adaptive"):
        with pytest.raises(ConfigError, match=f"ends in pure noise, where the sampler {name} cannot begin; use Euler"):
            make_sampler(tiny_base("sd2"), name, "", zero_snr=True)


def test_a_sampler_begins_anew_wherever_it_was_left(made):
    for name in ("DPM fast", "DPM adaptive"):
        sampler = made(name)
        expected, _ = sampled(sampler, 10, picture())
        _, evaluations = begun(sampler, 10, 10)
        x = picture() * 14
        for _, evaluation in zip(range(5), evaluations, strict=False):
            x = sampler.step(eps(x, 14.0), evaluation.timestep, x, generator=seeded(), return_dict=False)[0]
        assert torch.equal(sampled(sampler, 10, picture())[0], expected)

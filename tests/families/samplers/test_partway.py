"""Samplers that begin in the middle of their steps: on data that they know, and with a part that is put back."""

import copy
import functools
import inspect
import itertools

import pytest
import torch

from sdlora.config import BaseSection
from sdlora.families.registry import load_base
from sdlora.families.samplers.evaluations import evaluations_of
from sdlora.families.samplers.make import make_sampler
from sdlora.families.samplers.names import SAMPLERS
from sdlora.families.samplers.partway import as_noisy, last_steps
from sdlora.families.samplers.sigmas import sigmas_of

TWICE_A_STEP = ("Heun", "DPM2", "DPM2 a", "DPM++ SDE", "DPM++ 2S a", "Restart")
NAMES = [name for name in SAMPLERS if name != "LCM"]
ENDING_ABOVE = ("DPM fast", "DPM adaptive")
"""These end at the level of the first timestep, where the last of Uniform's steps begins."""


@pytest.fixture(scope="module")
def make(tiny_folder):
    base = load_base(BaseSection(path=str(tiny_folder("sd1")), precision="fp32"), "cpu")
    return functools.cache(functools.partial(make_sampler, base))


def denoised(x, sigma):
    return x / (1 + 4 * sigma**2)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def level_of(sampler, timestep) -> float:
    """Return the noise beside a signal of 1 at a timestep, whole or between two."""
    training = torch.from_numpy(sigmas_of(sampler.alphas_cumprod.numpy())).log()
    low = int(timestep)
    return torch.lerp(training[low], training[min(low + 1, 999)], float(timestep) - low).exp().item()


def begin(sampler, steps: int, run: int, latents, noise):
    """Return the timesteps that run, and the latents with the noise of the first."""
    sampler.set_timesteps(steps)
    timesteps = last_steps(sampler, steps, run)
    return timesteps, sampler.add_noise(latents, noise, timesteps[:1])


def run_on(sampler, timesteps, x, behind=lambda x, following: x):
    """Return what becomes of x with a base that knows the data; `behind` is called behind each evaluation."""
    known = inspect.signature(sampler.step).parameters
    options = {"generator": seeded(3)} if "generator" in known else {}
    evaluations = evaluations_of(sampler, timesteps, len(timesteps), len(timesteps))
    for evaluation in evaluations:
        timestep = evaluation.timestep
        inputs, sigma = sampler.scale_model_input(x, timestep), level_of(sampler, timestep)
        noisy = inputs * (1 + sigma**2) ** 0.5
        predicted = (noisy - denoised(noisy, sigma)) / sigma
        x = sampler.step(predicted, timestep, x, **options, return_dict=False)[0]
        x = behind(x, evaluations.following)
    return x


@pytest.mark.parametrize("name", NAMES)
def test_a_sampler_that_begins_in_the_middle_finds_the_data(make, name):
    latents, noise = (torch.randn(1, 4, 50, 50, generator=seeded(seed)) for seed in (1, 2))
    sampler = make(name, "")
    timesteps, x = begin(sampler, 30, 15, latents / 2, noise)
    assert run_on(sampler, timesteps, x).std().item() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ENDING_ABOVE])
@pytest.mark.parametrize("steps", [2, 20])
def test_a_single_step_ends_in_what_is_denoised(make, name, steps):
    """Up to the noise of the first timestep, at which DDIM and its like end."""
    latents, noise = (torch.randn(1, 4, 8, 8, generator=seeded(seed)) for seed in (1, 2))
    sampler = make(name, "")
    timesteps, x = begin(sampler, steps, 1, latents / 2, noise)
    (timestep,) = timesteps
    sigma = level_of(sampler, timestep)
    expected = denoised(sampler_scale(sampler, timestep, x) * (1 + sigma**2) ** 0.5, sigma)
    torch.testing.assert_close(run_on(sampler, timesteps, x), expected, rtol=0.01, atol=0.06)


@pytest.mark.parametrize("name", ENDING_ABOVE)
def test_where_a_single_step_begins_at_the_end_nothing_changes(make, name):
    latents, noise = (torch.randn(1, 4, 8, 8, generator=seeded(seed)) for seed in (1, 2))
    sampler = make(name, "")
    timesteps, x = begin(sampler, 20, 1, latents, noise)
    assert timesteps.tolist() == [0]
    torch.testing.assert_close(x, latents + level_of(sampler, 0) * noise)
    torch.testing.assert_close(run_on(sampler, timesteps, x), x)


def sampler_scale(sampler, timestep, x):
    """Return the UNet's input without moving the sampler on."""
    return copy.copy(sampler).scale_model_input(x, timestep)


def slope(x, sigma):
    return (x - denoised(x, sigma)) / sigma


def test_plms_begins_with_its_first_step_wherever_that_is(make):
    """Liu et al. 2022: a step that is corrected by its own end, then by the slopes before; in x / alpha."""
    sampler, latents, noise = make("PLMS", ""), torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.3)
    timesteps, x = begin(sampler, 8, 3, latents, noise)
    assert timesteps.tolist() == [251, 126, 126, 1]
    a, b, c, end = levels = [level_of(sampler, timestep) for timestep in (251, 126, 1, 0)]
    y = latents + a * noise
    first = slope(y, a)
    y = y + (b - a) * (first + slope(y + (b - a) * first, b)) / 2
    second = slope(y, b)
    y = y + (c - b) * (3 * second - first) / 2
    third = slope(y, c)
    y = y + (end - c) * (23 * third - 16 * second + 5 * first) / 12
    signal = 1 / (1 + levels[-1] ** 2) ** 0.5
    torch.testing.assert_close(run_on(sampler, timesteps, x), y * signal, rtol=1e-4, atol=1e-4)


def test_lms_begins_with_one_slope_wherever_that_is(make):
    """The integral from b to 0 of the line through the slopes at a and b, worked out by hand."""
    sampler, latents, noise = make("LMS", ""), torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.3)
    timesteps, x = begin(sampler, 8, 2, latents, noise)
    a, b = (level_of(sampler, timestep) for timestep in timesteps)
    y = latents + a * noise
    first = slope(y, a)
    y = y + (b - a) * first
    expected = y + first * b**2 / (2 * (a - b)) + slope(y, b) * ((b - a) ** 2 - a**2) / (2 * (a - b))
    torch.testing.assert_close(run_on(sampler, timesteps, x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [(name, one) for name in TWICE_A_STEP for one in ("Karras", "Trailing") if one in SAMPLERS[name].schedules],
)
@pytest.mark.parametrize("run", [6, 4])
def test_what_is_put_back_has_the_noise_of_the_next_evaluation(make, name, schedule, run):
    """The level of an evaluation is what the sampler divides its input by: sqrt(1 + sigma^2)."""
    sampler = make(name, schedule)
    latents, noise = (torch.randn(1, 4, 2, 2, generator=seeded(seed)) for seed in (1, 2))
    timesteps, x = begin(sampler, 6, run, latents, noise)
    levels = []

    def put_back(x, following):
        if not len(following):
            return x
        kept = as_noisy(sampler, latents, noise, following[:1])
        sigma = (sampler.scale_model_input(torch.ones(1), following[0]) ** -2 - 1).sqrt()
        levels.append(sigma.item())
        torch.testing.assert_close(kept, latents + sigma * noise, rtol=1e-4, atol=1e-4)
        return kept

    run_on(sampler, timesteps, x, put_back)
    assert len(levels) == 2 * run - 2
    assert levels == pytest.approx(sorted(levels, reverse=True), rel=1e-5)


@pytest.mark.parametrize("name", ENDING_ABOVE)
@pytest.mark.parametrize("run", [20, 9])
def test_what_is_put_back_of_steps_by_the_picture_has_the_noise_of_the_next_evaluation(make, name, run):
    """The level is that of the evaluation's timestep; with new noise a step may begin above where it evaluated last."""
    sampler = make(name, "")
    latents, noise = (torch.randn(1, 4, 2, 2, generator=seeded(seed)) for seed in (1, 2))
    timesteps, x = begin(sampler, 20, run, latents, noise)
    torch.testing.assert_close(x, latents + uniform_level(sampler, 20, 20 - run) * noise, rtol=1e-4, atol=1e-4)
    put_back = []

    def behind(x, following):
        if not len(following):
            return x
        kept = as_noisy(sampler, latents, noise, following[:1])
        torch.testing.assert_close(kept, latents + level_of(sampler, following[0]) * noise, rtol=1e-3, atol=1e-3)
        put_back.append(following)
        return kept

    run_on(sampler, timesteps, x, behind)
    assert len(put_back) == run - 1 if name == "DPM fast" else len(put_back) > 10


def uniform_level(sampler, steps: int, place: int) -> float:
    """Uniform: timesteps in equal steps from the last to the first."""
    return level_of(sampler, torch.linspace(999, 0, steps)[place])


@pytest.mark.parametrize(("steps", "run", "begun"), [(40, 19, 1), (40, 20, 2), (40, 36, 3)])
def test_restarts_befit_the_steps_that_run(make, steps, run, begun):
    """Begun in the middle, the noisiest level is the strength's; 20 steps restart once, from 2, and 36 twice."""
    sampler = make("Restart", "")
    sampler.set_timesteps(steps)
    first = karras_level(sampler, steps, steps - run)
    timesteps = last_steps(sampler, steps, run)
    assert len(timesteps) == 2 * run - 1
    levels = [level_of(sampler, timestep) for timestep in timesteps]
    assert levels[0] == max(levels) == pytest.approx(first, rel=1e-3)
    assert 1 + sum(later > level * 1.001 for level, later in itertools.pairwise(levels)) == begun


def karras_level(sampler, steps: int, place: int) -> float:
    """Karras et al. 2022, eq. 5."""
    training = sigmas_of(sampler.alphas_cumprod.numpy())
    low, high = training[0] ** (1 / 7), training[-1] ** (1 / 7)
    return (high + place / (steps - 1) * (low - high)) ** 7

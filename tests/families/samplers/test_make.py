"""Samplers against their own formulas, on data whose denoiser and whose result can be worked out.

The data are normal numbers of standard deviation 1/2: what is denoised from x at sigma is x / (1 + 4 sigma^2), and the
flow without noise takes x at the highest sigma to x / 2 / sqrt(1/4 + sigma^2).
"""

import functools
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

from sdlora.errors import ConfigError
from sdlora.families.samplers.evaluations import evaluations_of
from sdlora.families.samplers.make import make_sampler, schedule_of, settings_of
from sdlora.families.samplers.names import AUTOMATIC, OF_SCHEDULERS, SAMPLERS
from sdlora.families.samplers.restart import restart_steps
from sdlora.families.samplers.sigmas import sigma_table, sigmas_of

PAIRS = [(name, schedule) for name, traits in SAMPLERS.items() for schedule in traits.schedules]
WITH_LEVELS = [pair for pair in PAIRS if pair[0] not in ("DDIM", "PLMS", "DDPM", "Restart")]
OF_NOISE_LEVELS = (
    "Euler", "Heun", "KDPM2", "DPMSolverSDE", "DPMPlusPlus2S", "Restart", "LMS", "DPMFast", "DPMAdaptive",
)  # fmt: skip
"""How the schedulers are called whose latents are the picture plus noise, not a share of each."""
TWICE_A_STEP = ("Heun", "KDPM2", "DPMSolverSDE", "DPMPlusPlus2S")
SKIPPING = ("DPM2", "DPM2 a", "DPM++ 3M SDE")
"""Of these the level before the last is left out."""


@pytest.fixture(scope="module")
def make(base):
    """`make_sampler` of the base; each is made once."""
    return functools.cache(functools.partial(make_sampler, base))


@pytest.fixture(scope="module")
def base(tiny_folder):
    from sdlora.config import BaseSection
    from sdlora.families.registry import load_base

    return load_base(BaseSection(path=str(tiny_folder("sd1")), precision="fp32"), "cpu")


def denoised(x, sigma):
    return x / (1 + 4 * sigma**2)


def sample(sampler, steps: int, x: torch.Tensor, generator=None) -> torch.Tensor:
    """Return what the sampler makes of the noise x with a base that knows the data."""
    sampler.set_timesteps(steps)
    if hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(0)
    generator = generator or torch.Generator().manual_seed(0)
    options = {"generator": generator} if "generator" in inspect.signature(sampler.step).parameters else {}
    levels = sigmas_of(sampler.alphas_cumprod.numpy())
    x = x * sampler.init_noise_sigma
    for evaluation in evaluations_of(sampler, sampler.timesteps, steps, len(sampler.timesteps)):
        timestep = evaluation.timestep
        inputs = sampler.scale_model_input(x, timestep)
        if type(sampler).__name__.startswith(OF_NOISE_LEVELS):
            sigma = ((x[0] / inputs[0]) ** 2 - 1).sqrt()
        elif getattr(sampler, "step_index", None) is not None or hasattr(sampler, "sigmas"):
            sigma = sampler.sigmas[sampler.step_index or 0]
        else:
            sigma = torch.tensor(levels[int(timestep)])
        noisy = inputs * (1 + sigma**2).sqrt()
        if sampler.config.prediction_type == "v_prediction":
            predicted = (noisy / (1 + sigma**2) - denoised(noisy, sigma)) * (1 + sigma**2).sqrt() / sigma
        else:
            predicted = (noisy - denoised(noisy, sigma)) / sigma
        x = sampler.step(predicted.float(), timestep, x, **options, return_dict=False)[0]
    return x


@pytest.mark.parametrize(("name", "schedule"), WITH_LEVELS)
def test_the_levels_are_the_formulas(make, name, schedule):
    sampler = make(name, schedule)
    for steps in (1, 2, 20):
        sampler.set_timesteps(steps)
        _check_levels(sampler, name, schedule, steps)


def _check_levels(sampler, name, schedule, steps):
    training = sigmas_of(sampler.alphas_cumprod.numpy())
    if name in SKIPPING and schedule != "Trailing":
        expected = sigma_table(schedule, steps + 1, training)[:-1]
    else:
        expected = sigma_table(schedule, steps, training)
    found = sampler.sigmas.numpy()
    if type(sampler).__name__.startswith(TWICE_A_STEP):
        found = np.concatenate([found[:1], found[1::2]])[: steps + 1]
    assert len(found) == steps + 1 and found[-1] == 0
    # Some samplers round to whole timesteps, so that is where they are compared.
    places = [np.interp(np.log(table), np.log(training), np.arange(1000)) for table in (found[:-1], expected)]
    np.testing.assert_allclose(*places, atol=0.51 if "Multistep" in type(sampler).__name__ else 0.01)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "LCM"])
def test_samplers_find_the_data(make, name):
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(1)).reshape(1, 4, 25, 40)
    found = sample(make(name, ""), 50, noise)
    assert found.std().item() == pytest.approx(0.5, abs=0.06)
    assert found.mean().item() == pytest.approx(0, abs=0.03)


def heun(x, levels):
    """Karras et al. 2022, algorithm 1 without new noise."""
    for sigma, following in itertools.pairwise(levels):
        slope = (x - denoised(x, sigma)) / sigma
        there = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (there - denoised(there, following)) / following) / 2
        x += (following - sigma) * slope
    return x


def dpm2(x, levels):
    """The second slope taken half way in the logarithm (Lu et al. 2022, DPM-Solver-2)."""
    for sigma, following in itertools.pairwise(levels):
        slope = (x - denoised(x, sigma)) / sigma
        if following > 0:
            middle = math.sqrt(sigma * following)
            there = x + (middle - sigma) * slope
            slope = (there - denoised(there, middle)) / middle
        x += (following - sigma) * slope
    return x


def dpm_plus_2m(x, levels):
    """Lu et al. 2022 b, algorithm 2, in x / alpha; the last step of first order."""
    before = None
    for number, (sigma, following) in enumerate(itertools.pairwise(levels)):
        now = target = denoised(x, sigma)
        if before is not None and following > 0:
            r = math.log(levels[number - 1] / sigma) / math.log(sigma / following)
            target = now + (now - before) / (2 * r)
        x = following / sigma * x + (1 - following / sigma) * target
        before = now
    return x


@pytest.mark.parametrize(
    ("name", "schedule", "formula"),
    [
        ("Heun", "Uniform", heun),
        ("Heun", "Beta", heun),
        ("DPM2", "Karras", dpm2),
        ("DPM2", "Simple", dpm2),
        ("DPM++ 2M", "Karras", dpm_plus_2m),
        ("DPM++ 2M", "KL Optimal", dpm_plus_2m),
        ("DPM++ 2M", "Align Your Steps", dpm_plus_2m),
    ],
)
def test_steps_are_the_papers(make, name, schedule, formula):
    sampler = make(name, schedule)
    found = sample(sampler, 10, torch.ones(1, 1, 1, 1, dtype=torch.float64)).item()
    training = sigmas_of(sampler.alphas_cumprod.numpy())
    count = 11 if name in SKIPPING else 10
    levels = [*sigma_table(schedule, count, training)[:10], 0.0]
    first = levels[0] if name != "DPM++ 2M" else math.sqrt(1 + levels[0] ** 2)  # the library starts at a variance of 1
    assert found == pytest.approx(formula(first, levels), rel=2e-3)


def dpm_plus_sde(x, levels, noise):
    """Lu et al. 2022 b, the SDE solver of second order with its one evaluation half way, as k-diffusion has it."""

    def step(x, sigma, following, target):
        up = min(following, math.sqrt(following**2 * (sigma**2 - following**2) / sigma**2))
        down = math.sqrt(following**2 - up**2)
        return down / sigma * x + (1 - down / sigma) * target + up * noise(torch.tensor(sigma), torch.tensor(following))

    for sigma, following in itertools.pairwise(levels):
        if following == 0:
            return denoised(x, sigma)
        middle = math.sqrt(sigma * following)
        there = step(x, sigma, middle, denoised(x, sigma))
        x = step(x, sigma, following, denoised(there, middle))
    return x


def multistep_sde(x, levels, noise, order=2, weight_of_slope=None):
    """Lu et al. 2022 b, algorithm 2 with noise (eq. 14), in x / alpha, by the integrals over a step of its decay times t^k.

    Targets are taken as a polynomial in the time of the step. `weight_of_slope` is what the midpoint rule takes for
    the integral at k = 1.
    """
    times, targets = [], []
    for sigma, following in itertools.pairwise(levels):
        times.append(-math.log(sigma))
        targets.append(denoised(x, sigma))
        if following == 0:
            return targets[-1]
        h = -math.log(following) - times[-1]
        u = 2 * h
        integrals = [1 - math.exp(-u), 1 - (1 - math.exp(-u)) / u]  # of 1 and of t / h
        integrals.append(1 - 2 / u + 2 * (1 - math.exp(-u)) / u**2)  # of (t / h)^2
        change = integrals[0] * targets[-1]
        if len(targets) > 1 and (order == 2 or len(targets) == 2):
            slope = (targets[-1] - targets[-2]) / (times[-1] - times[-2]) * h
            change = change + (weight_of_slope(u) if weight_of_slope else integrals[1]) * slope
        elif len(targets) > 2:
            # Through three points: f + s t + b t^2 at t / h, f at 0.
            ts = [(time - times[-1]) / h for time in times[-3:-1]]
            fs = [target - targets[-1] for target in targets[-3:-1]]
            bend = (fs[0] / ts[0] - fs[1] / ts[1]) / (ts[0] - ts[1])
            slope = fs[1] / ts[1] - bend * ts[1]
            change = change + integrals[1] * slope + integrals[2] / 2 * bend  # half of it, as in k-diffusion
        up = following * math.sqrt(1 - math.exp(-u))
        x = math.exp(-u) * x + change + up * noise(torch.tensor(sigma), torch.tensor(following))


WITH_TREES = {
    "DPM++ SDE": dpm_plus_sde,
    "DPM++ 2M SDE": functools.partial(multistep_sde, weight_of_slope=lambda u: (1 - math.exp(-u)) / 2),
    "DPM++ 2M SDE Heun": multistep_sde,
    "DPM++ 3M SDE": functools.partial(multistep_sde, order=3),
}


@pytest.mark.parametrize("name", WITH_TREES)
@pytest.mark.parametrize("schedule", ["Karras", "Simple"])
@pytest.mark.filterwarnings("ignore:Should have t")
def test_steps_with_noise_of_a_tree_are_the_papers(make, name, schedule):
    """The noise is what k-diffusion draws from a tree of the picture's seed between the levels of a step."""
    sampler, x = make(name, schedule), torch.ones(1, 4, 2, 2)
    found = sample(sampler, 6, x, torch.Generator().manual_seed(31))
    count = 7 if name in SKIPPING else 6
    levels = [*sigma_table(schedule, count, sigmas_of(sampler.alphas_cumprod.numpy()))[:6].tolist(), 0.0]
    noise = BrownianTreeNoiseSampler(x, levels[-2], levels[0], [31])
    first = levels[0] if name == "DPM++ SDE" else math.sqrt(1 + levels[0] ** 2)  # the library starts at a variance of 1
    torch.testing.assert_close(found, WITH_TREES[name](x * first, levels, noise), rtol=2e-3, atol=2e-3)
    assert settings_of(sampler)["noise"] == "Brownian tree"


def test_a_single_step_has_no_noise(make):
    x = torch.ones(1, 1, 1, 1)
    for name in WITH_TREES:
        sampler = make(name, "Karras")
        sigma = sigma_table("Karras", 1, sigmas_of(sampler.alphas_cumprod.numpy())).item()
        assert sample(sampler, 1, x).item() == pytest.approx(denoised(sigma, sigma), rel=5e-3)


def dpm_plus_2s_a(x, levels, noise):
    """Lu et al. 2022 b, algorithm 1 at r = 1/2 in x / alpha, down to the level from which the step's noise leads up."""
    for sigma, following in itertools.pairwise(levels):
        first = denoised(x, sigma)
        if following == 0:
            return first
        up = math.sqrt(following**2 * (sigma**2 - following**2) / sigma**2)
        down = math.sqrt(following**2 - up**2)
        h = math.log(sigma / down)
        middle = sigma * math.exp(-h / 2)
        there = middle / sigma * x - math.expm1(-h / 2) * first
        x = down / sigma * x - math.expm1(-h) * denoised(there, middle) + up * noise()


@pytest.mark.parametrize("schedule", ["Karras", "Simple"])
@pytest.mark.parametrize("shape", ["sd1", "sd2"])
def test_a_singlestep_solver_with_noise_is_the_papers(tiny_base, shape, schedule):
    """sd2 predicts v."""
    sampler, x = make_sampler(tiny_base(shape), "DPM++ 2S a", schedule), torch.ones(1, 4, 2, 2)
    found = sample(sampler, 6, x, torch.Generator().manual_seed(7))
    levels = [*sigma_table(schedule, 6, sigmas_of(sampler.alphas_cumprod.numpy())).tolist(), 0.0]
    drawn = torch.Generator().manual_seed(7)
    expected = dpm_plus_2s_a(x * levels[0], levels, lambda: torch.randn(x.shape, generator=drawn))
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    # The second evaluation is at the next level n: down from s to n^2 / s, whose middle is sqrt(s n^2 / s).
    evaluated = np.log(np.repeat(levels[:-1], 2)[1:])
    places = np.interp(evaluated, np.log(sigmas_of(sampler.alphas_cumprod.numpy())), np.arange(1000))
    np.testing.assert_allclose(sampler.timesteps.numpy(), places, atol=0.02)


def karras(count, high, low):
    """Karras et al. 2022, eq. 5."""
    ends = high ** (1 / 7), low ** (1 / 7)
    return [(ends[0] + n / (count - 1) * (ends[1] - ends[0])) ** 7 for n in range(count)]


def nearest(levels, level):
    return min(levels, key=lambda one: abs(one - level))


def restart(x, levels, times, steps, noise):
    """Xu et al. 2023, algorithm 1, with Heun's steps: from about 0.1 up to about 2, and down again in so many steps."""
    low, high = nearest(levels, 0.1), nearest(levels, 2.0)
    down = [level for level in levels if level >= low]
    x = heun(x, down)
    for _ in range(times):
        x = x + math.sqrt(high**2 - low**2) * noise()
        x = heun(x, karras(steps + 1, high, low))
    return heun(x, [*levels[len(down) - 1 :], 0.0])


@pytest.mark.parametrize(
    ("asked", "on_levels", "times", "steps"),
    [(19, 19, 0, 0), (20, 11, 1, 9), (35, 26, 1, 9), (36, 18, 2, 9), (50, 26, 2, 12)],
)
def test_restarts_are_the_papers(make, asked, on_levels, times, steps):
    """So many steps are asked for, and so many go down the levels of Karras' schedule, as AUTOMATIC1111 deals them out."""
    sampler, x = make("Restart", ""), torch.ones(1, 4, 2, 2)
    found = sample(sampler, asked, x, torch.Generator().manual_seed(7))
    training = sigmas_of(sampler.alphas_cumprod.numpy())
    levels, drawn = karras(on_levels, training[-1], training[0]), torch.Generator().manual_seed(7)
    expected = restart(x * levels[0], levels, times, steps, lambda: torch.randn(x.shape, generator=drawn))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert len(sampler.timesteps) == 2 * asked - 1


def test_no_restart_leads_above_where_the_levels_begin():
    levels = np.array(karras(20, 0.9, 0.03))
    steps = list(restart_steps(levels))
    assert len(steps) == 20 and max(start for start, _ in steps) == levels[0]
    assert [start for start, _ in steps].count(levels[0]) == 2  # at first, and in place of 2
    assert all(start > end for start, end in restart_steps(levels / 10))


@pytest.mark.parametrize("name", [*WITH_TREES, "DPM++ 2S a", "DPM fast", "DPM adaptive"])
def test_each_picture_of_a_batch_has_its_own_noise(make, name):
    sampler = make(name, "")

    def stepped(x, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        sampler.set_timesteps(4)
        sampler.set_begin_index(0)
        for timestep in sampler.timesteps[:3]:
            x = sampler.step(0.1 * x, timestep, x, generator=generators, return_dict=False)[0]
        return x

    x = torch.ones(2, 4, 2, 2)
    both = stepped(x, (5, 6))
    assert torch.equal(both[1:], stepped(x[1:], (6,)))
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize(("scheduler", "name"), OF_SCHEDULERS.items())
def test_schedulers_have_the_names_of_what_makes_them(make, scheduler, name):
    schedule = AUTOMATIC if name == "LCM" else SAMPLERS[name].automatic
    assert type(make(name, schedule)).__name__ == scheduler


def test_many_steps_that_share_timesteps_begin_at_the_first(base):
    for schedule in ("Beta", "Karras"):
        found = sample(make_sampler(base, "DPM++ 2M", schedule), 300, torch.ones(1, 1, 1, 1)).item()
        assert found == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("name", "schedule"), [("UniPC", "SGM Uniform"), ("UniPC", "Karras"), ("DPM++ 2M", "SGM Uniform")]
)
def test_as_many_steps_as_timesteps_find_the_data(make, name, schedule):
    assert sample(make(name, schedule), 1000, torch.ones(1, 1, 1, 1)).item() == pytest.approx(0.5, abs=0.05)


def test_a_name_means_the_same_whatever_the_base_ships(base):
    before = dict(base.sampler_config)
    try:
        plain = make_sampler(base, "DPM++ 2M", "")
        base.sampler_config.update(timestep_spacing="leading", thresholding=True, solver_order=3)
        assert dict(make_sampler(base, "DPM++ 2M", "").config) == dict(plain.config)
    finally:
        base.sampler_config.clear()
        base.sampler_config.update(before)


def test_the_schedule_is_told_and_a_table_is_not_called_karras(base):
    assert schedule_of(make_sampler(base, "DPM++ 2M", "")) == "Karras"
    assert schedule_of(make_sampler(base, "DPM++ 2M SDE", "")) == "Exponential"
    assert schedule_of(make_sampler(base, "Euler a", "")) == "Uniform"
    assert schedule_of(make_sampler(base, "", "")) == ""
    assert settings_of(make_sampler(base, "Heun", "Karras"))["use_karras_sigmas"] is True
    assert settings_of(make_sampler(base, "Heun", "Simple"))["use_karras_sigmas"] is False
    assert type(make_sampler(base, "Heun", "Simple")).__name__ == "HeunDiscreteScheduler"


@pytest.mark.parametrize("name", [name for name, traits in SAMPLERS.items() if traits.begins_at_pure_noise])
def test_a_schedule_that_ends_in_pure_noise_begins_there(tiny_base, name):
    sampler = make_sampler(tiny_base("sd2"), name, "", zero_snr=True)
    sampler.set_timesteps(4)
    assert sampler.alphas_cumprod[-1] < 1e-7
    assert sampler.timesteps[0] == 999
    assert schedule_of(sampler) == ("Trailing" if name != "LCM" else AUTOMATIC)


def test_what_cannot_begin_at_pure_noise_is_refused(tiny_base, base):
    v = tiny_base("sd2")
    with pytest.raises(ConfigError, match=r"ends in pure noise, where the sampler Heun cannot begin; use Euler"):
        make_sampler(v, "Heun", "", zero_snr=True)
    with pytest.raises(ConfigError, match=r"which the schedule DDIM is not made for; use Trailing"):
        make_sampler(v, "DDIM", "DDIM", zero_snr=True)
    with pytest.raises(ConfigError, match=r"predicts epsilon.*leave zero_snr at auto"):
        make_sampler(base, "", "", zero_snr=True)


def test_a_base_that_was_trained_so_needs_no_telling(tiny_base):
    from sdlora.families.schedule import rescale_to_zero_snr

    v = tiny_base("sd2")
    rescale_to_zero_snr(v)
    sampler = make_sampler(v, "DPM++ 2M", "")
    assert (schedule_of(sampler), sampler.config.rescale_betas_zero_snr) == ("Trailing", True)
    with pytest.raises(ConfigError, match="the sampler PLMS cannot begin"):
        make_sampler(v, "PLMS", "")

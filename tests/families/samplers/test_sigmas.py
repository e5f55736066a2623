"""Noise levels against the published formulas, worked out one by one in float64."""

import math

import numpy as np
import pytest

from sdlora.families.samplers.names import AUTOMATIC, SCHEDULES
from sdlora.families.samplers.sigmas import beta_quantiles, sigma_table, sigmas_of

SIGNAL = [1 - 0.00085]
for _i in range(1, 1000):
    SIGNAL.append(SIGNAL[-1] * (1 - (0.00085**0.5 + _i * (0.012**0.5 - 0.00085**0.5) / 999) ** 2))
LEVELS = [((1 - signal) / signal) ** 0.5 for signal in SIGNAL]
TRAINING = sigmas_of(np.array(SIGNAL))
LOWEST, HIGHEST = LEVELS[0], LEVELS[999]


def at(timestep: float) -> float:
    """The level between two whole timesteps, by its logarithm."""
    below = min(int(timestep), 998)
    share = timestep - below
    return math.exp((1 - share) * math.log(LEVELS[below]) + share * math.log(LEVELS[below + 1]))


def through(points: list[float], place: float) -> float:
    below = min(int(place), len(points) - 2)
    return points[below] ** (1 - place + below) * points[below + 1] ** (place - below)


def quantile(share: float) -> float:
    """Of Beta(0.6, 0.6), by adding up the density in 200,000 strips of the angle, x = sin(angle)^2."""
    strips = 200_000
    angles = (np.arange(strips) + 0.5) * (math.pi / 2 / strips)
    masses = (np.sin(angles) * np.cos(angles)) ** 0.2  # x^-0.4 (1-x)^-0.4 dx/2
    below = np.cumsum(masses) / masses.sum()
    return float(np.sin(np.interp(share, below, angles + math.pi / 4 / strips)) ** 2)


ALIGNED = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
ALIGNED_SDXL = [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029]

FORMULAS = {
    "Uniform": lambda i, n: at(999 * (1 - i / (n - 1))),
    "Normal": lambda i, n: at(999 * (1 - i / (n - 1))),
    "Karras": lambda i, n: (HIGHEST ** (1 / 7) + i / (n - 1) * (LOWEST ** (1 / 7) - HIGHEST ** (1 / 7))) ** 7,
    "Exponential": lambda i, n: HIGHEST * (LOWEST / HIGHEST) ** (i / (n - 1)),
    "Polyexponential": lambda i, n: HIGHEST * (LOWEST / HIGHEST) ** (i / (n - 1)),
    "SGM Uniform": lambda i, n: at(999 * (1 - i / n)),
    "KL Optimal": lambda i, n: math.tan(i / n * math.atan(LOWEST) + (1 - i / n) * math.atan(HIGHEST)),
    "Align Your Steps": lambda i, n: through(ALIGNED, 10 * i / (n - 1)),
    "Simple": lambda i, n: LEVELS[999 - int(i * 1000 / n)],
    "DDIM": lambda i, n: LEVELS[1 + (n - 1 - i) * (1000 // n)],
    "Beta": lambda i, n: LOWEST + quantile(1 - i / (n - 1)) * (HIGHEST - LOWEST),
    "Trailing": lambda i, n: LEVELS[round(1000 - i * 1000 / n) - 1],
}


@pytest.mark.parametrize("schedule", FORMULAS)
@pytest.mark.parametrize("steps", [2, 7, 11, 20, 30])
def test_a_table_is_the_formula(schedule, steps):
    expected = [FORMULAS[schedule](i, steps) for i in range(steps)]
    np.testing.assert_allclose(sigma_table(schedule, steps, TRAINING), expected, rtol=1e-6)


def test_every_schedule_has_its_formula():
    assert {*FORMULAS, AUTOMATIC} == set(SCHEDULES)


def test_the_levels_of_stable_diffusion():
    """As published for its noise schedule."""
    assert TRAINING[0] == pytest.approx(0.0292, abs=5e-5)
    assert TRAINING[-1] == pytest.approx(14.6146, abs=5e-5)


@pytest.mark.parametrize("schedule", FORMULAS)
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 999, 1000])
def test_any_number_of_steps_falls_from_step_to_step_within_what_the_base_knows(schedule, steps):
    table = sigma_table(schedule, steps, TRAINING)
    assert table.shape == (steps,)
    assert np.isfinite(table).all() and (np.diff(table) <= 0).all()
    assert table[0] <= HIGHEST * 1.001 and table[-1] >= 0.99 * LOWEST


def test_measured_levels_are_met_where_they_were_measured():
    assert sigma_table("Align Your Steps", 11, TRAINING) == pytest.approx(ALIGNED)
    assert sigma_table("Align Your Steps", 11, TRAINING, is_sdxl=True) == pytest.approx(ALIGNED_SDXL)


def test_quantiles_of_a_distribution_that_can_be_worked_out():
    """Beta(1/2, 1/2) is the arc sine distribution, Beta(1, 1) is even."""
    shares = np.array([0.0, 1e-6, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0])
    np.testing.assert_allclose(beta_quantiles(shares, 0.5), np.sin(math.pi / 2 * shares) ** 2, atol=1e-12)
    np.testing.assert_allclose(beta_quantiles(shares, 1.0), shares, atol=1e-12)

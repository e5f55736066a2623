"""The noise levels of a sampler's steps, by the published formulas, in float64.

sigma = sqrt((1 - a) / a), a the product of 1 - beta: the noise beside a signal of 1. `training` is the [T] table
of the levels that the base was trained at, rising; a table for `steps` steps is [steps], falling, without the 0 that
a sampler ends in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Table = np.ndarray

_RHO = 7.0
"""What Karras et al. found best."""
_BETA_SHAPE = 0.6
"""Both shape parameters that Lee et al. propose."""
_ALIGNED = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
_ALIGNED_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
"""Measured by Sabour et al. (2024) for ten steps of Stable Diffusion 1.5 and of XL."""


def sigma_table(schedule: str, steps: int, training: Table, is_sdxl: bool = False) -> Table:
    """Return the levels of a schedule named as in `sampler_names.SCHEDULES`, but Automatic."""
    if schedule == "Align Your Steps":
        return _through(_ALIGNED_SDXL if is_sdxl else _ALIGNED, steps)
    return _TABLES[schedule](steps, training)


def sigmas_of(alphas_cumprod: Table) -> Table:
    """Return the level of each timestep."""
    signal = alphas_cumprod.astype(np.float64)
    return np.sqrt((1 - signal) / signal)


def _at_timesteps(timesteps: Table, training: Table) -> Table:
    """Return the levels at timesteps that need not be whole: between two, by their logarithms."""
    return np.exp(np.interp(timesteps, np.arange(len(training)), np.log(training)))


def timesteps_at(levels: Sequence[float] | Table, training: Table) -> Table:
    """Return the timesteps at levels above 0, float32: between two whole ones by the logarithms of theirs."""
    return np.interp(np.log(levels), np.log(training), np.arange(len(training))).astype(np.float32)


def _uniform(steps: int, training: Table) -> Table:
    return _at_timesteps(np.linspace(len(training) - 1, 0, steps), training)


def _sgm_uniform(steps: int, training: Table) -> Table:
    return _at_timesteps(np.linspace(len(training) - 1, 0, steps + 1)[:-1], training)


def _karras(steps: int, training: Table) -> Table:
    """Karras et al. 2022, eq. 5."""
    low, high = training[0] ** (1 / _RHO), training[-1] ** (1 / _RHO)
    return (high + np.linspace(0, 1, steps) * (low - high)) ** _RHO


def _exponential(steps: int, training: Table) -> Table:
    return np.exp(np.linspace(math.log(training[-1]), math.log(training[0]), steps))


def _kl_optimal(steps: int, training: Table) -> Table:
    """tan(i/n arctan(lowest) + (1 - i/n) arctan(highest)), i < n (Sabour et al. 2024); at i = n the sampler has its 0."""
    share = np.arange(steps) / steps
    return np.tan(share * math.atan(training[0]) + (1 - share) * math.atan(training[-1]))


def _simple(steps: int, training: Table) -> Table:
    places = (np.arange(steps) * (len(training) / steps)).astype(int)
    return training[::-1][places]


def _ddim(steps: int, training: Table) -> Table:
    """Song et al. 2020, counted from 1 as Stable Diffusion's first code has it."""
    places = 1 + np.arange(steps) * max(len(training) // steps, 1)
    return training[np.minimum(places, len(training) - 1)][::-1]


def _beta(steps: int, training: Table) -> Table:
    """Lee et al. 2024: quantiles of Beta(0.6, 0.6), taken as shares of the range of levels."""
    shares = beta_quantiles(1 - np.linspace(0, 1, steps), _BETA_SHAPE)
    return training[0] + shares * (training[-1] - training[0])


def _trailing(steps: int, training: Table) -> Table:
    """Lin et al. 2023, table 2."""
    places = np.round(len(training) - np.arange(steps) * (len(training) / steps)).astype(int) - 1
    return training[places]


def _through(levels: Sequence[float], steps: int) -> Table:
    """Return so many levels on the curve through `levels`, straight in their logarithms."""
    places = np.linspace(0, len(levels) - 1, steps)
    return np.exp(np.interp(places, np.arange(len(levels)), np.log(levels)))


def beta_quantiles(shares: Table, shape: float) -> Table:
    """Return the quantiles of the distribution Beta(shape, shape), to 1e-12.

    The share below x is x^s / (s B(s, s)) * sum over k of (1 - s)_k s / (k! (s + k)) x^k, which converges fast up to
    1/2, where the other half is its mirror image.
    """
    inverse_of_whole = math.gamma(2 * shape) / (shape * math.gamma(shape) ** 2)
    count = np.arange(60)
    factors = np.cumprod(np.concatenate(([1.0], (count[1:] - shape) / count[1:]))) * shape / (shape + count)

    def share_below(x: Table) -> Table:
        return inverse_of_whole * x**shape * (x[:, None] ** count @ factors)

    wanted = np.minimum(shares, 1 - shares)
    low, high = np.zeros_like(wanted), np.full_like(wanted, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        above = share_below(middle) > wanted
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    nearer = np.where(wanted == 0, 0.0, (low + high) / 2)
    return np.where(shares > 0.5, 1 - nearer, nearer)


_TABLES: Mapping[str, Callable[[int, Table], Table]] = {
    "Uniform": _uniform,
    "Normal": _uniform,
    "Karras": _karras,
    "Exponential": _exponential,
    "Polyexponential": _exponential,
    "SGM Uniform": _sgm_uniform,
    "KL Optimal": _kl_optimal,
    "Simple": _simple,
    "DDIM": _ddim,
    "Beta": _beta,
    "Trailing": _trailing,
}

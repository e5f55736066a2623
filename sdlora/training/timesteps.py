"""What the objective makes of each timestep: how often it is drawn and how its errors count."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdlora.config import ObjectiveSection
from sdlora.diffusion import (
    Prediction,
    debiased_weights,
    logit_normal_density,
    min_snr_weights,
    p2_weights,
    signal_to_noise,
    snr_huber_c,
)
from sdlora.errors import ConfigError

ZERO_SNR_FLOOR = 0.1
"""The least that v's weights take the error of x_0 for, on a schedule that ends in pure noise."""


@dataclass(frozen=True)
class TimestepTables:
    """Of each timestep, all [T]: how likely it is (in proportion), its loss's weight, and where Huber's loss turns."""

    density: torch.Tensor
    weights: torch.Tensor
    huber_c: torch.Tensor


def timestep_tables(
    alphas_cumprod: torch.Tensor, prediction: Prediction, objective: ObjectiveSection
) -> TimestepTables:
    """Return the tables of an objective on a schedule. Raises ConfigError where it trains no timestep at all."""
    length = len(alphas_cumprod)
    first, last = _trained_range(objective, length)
    snr = signal_to_noise(torch.arange(length), alphas_cumprod)
    weights = _weights(snr, prediction, objective)
    if not 0 < float(weights[first:last].sum()) < torch.inf:
        raise ConfigError(
            f'objective.weighting = "{objective.weighting}" has no finite weight above 0 for timesteps {first} to '
            f"{last - 1} of this base, which predicts {prediction}; choose another weighting or other timesteps"
        )
    density = torch.zeros(length, dtype=torch.float64)
    if objective.timesteps == "logit-normal":
        density[first:last] = logit_normal_density(last - first, objective.logit_mean, objective.logit_std)
    elif objective.timesteps == "snr":
        density[first:last] = weights[first:last].double()
        weights = torch.ones(length)
    else:
        density[first:last] = 1.0
    constant = objective.huber_schedule == "constant"
    turns = torch.full((length,), objective.huber_c) if constant else snr_huber_c(snr, objective.huber_c)
    return TimestepTables(density, weights, turns)


def _trained_range(objective: ObjectiveSection, length: int) -> tuple[int, int]:
    """Return the first timestep that is trained and the one after the last."""
    first, last = objective.min_timestep, objective.max_timestep or length
    if last > length:
        raise ConfigError(f"objective.max_timestep is {last}, but this base has {length} timesteps; use 0 for all")
    if first >= last:
        raise ConfigError(
            f"objective.min_timestep is {first}, which leaves no timestep below {last}; "
            "make it smaller or objective.max_timestep larger"
        )
    return first, last


def _weights(snr: torch.Tensor, prediction: Prediction, objective: ObjectiveSection) -> torch.Tensor:
    floor = ZERO_SNR_FLOOR if float(snr[-1]) == 0 else 0.0
    if objective.weighting == "min-snr":
        return min_snr_weights(snr, objective.min_snr_gamma, prediction, floor)
    if objective.weighting == "debiased":
        return debiased_weights(snr, prediction, floor)
    if objective.weighting == "p2":
        return p2_weights(snr, objective.p2_gamma, prediction)
    return torch.ones_like(snr)

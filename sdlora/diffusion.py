"""The arithmetic of diffusion training, in pure functions of tensors.

`alphas_cumprod` is the [T] float32 table of the noise schedule (the product of 1 - beta up to each
timestep), `timesteps` a [B] int64 tensor of indices into it, latents and noise are [B,C,H,W].
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch

Prediction = Literal["epsilon", "v"]


def _at(table: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    return table.to(timesteps.device)[timesteps].float().view(-1, 1, 1, 1)


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """Return the noisy latents x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, eq. 4)."""
    alpha = _at(alphas_cumprod, timesteps)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def training_target(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction: Prediction,
) -> torch.Tensor:
    """Return what the model should predict, [B,C,H,W] float32.

    epsilon: the noise. v: sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans & Ho 2022, app. D).
    """
    if prediction == "epsilon":
        return noise.float()
    alpha = _at(alphas_cumprod, timesteps)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents


def signal_to_noise(timesteps: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Return SNR_t = a_t / (1 - a_t), [B] float32."""
    alpha = alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alpha / (1 - alpha)


def min_snr_weights(snr: torch.Tensor, gamma: float, prediction: Prediction) -> torch.Tensor:
    """Return the per-example loss weights of min-SNR-gamma, [B] (Hang et al. 2023, eq. 5 and app. A).

    For epsilon min(snr, gamma) / snr, for v min(snr, gamma) / (snr + 1).
    """
    clipped = snr.clamp(max=gamma)
    return clipped / snr if prediction == "epsilon" else clipped / (snr + 1)


def seed_from(*parts: int | str) -> int:
    """Return a 63-bit seed that is a fixed function of `parts` and differs for every other choice."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def step_generator(seed: int, rank: int, examples_seen: int) -> torch.Generator:
    """Return the CPU generator for one batch; it depends on nothing but the arguments.

    Because nothing is carried from step to step, a resumed run draws what the uninterrupted one draws.
    """
    return torch.Generator().manual_seed(seed_from(seed, rank, examples_seen))


def draw_timesteps(count: int, schedule_length: int, generator: torch.Generator) -> torch.Tensor:
    """Return `count` timesteps, [count] int64, uniform over the schedule, stratified within the batch.

    The range is cut into `count` equal parts and one is drawn from each (in random order), which keeps
    every timestep equally likely and lowers the variance of the batch loss.
    """
    strata = torch.randperm(count, generator=generator)
    offsets = torch.rand(count, generator=generator, dtype=torch.float64)
    drawn = ((strata + offsets) * (schedule_length / count)).long()
    return drawn.clamp(max=schedule_length - 1)


def latents_from_posterior(mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return a fresh draw from the VAE's posterior, mean + std * noise, all [B,C,H,W]."""
    return mean + std * noise

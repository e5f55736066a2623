"""The arithmetic of diffusion training, in pure functions of tensors.

`alphas_cumprod` is the [T] float32 table of the noise schedule (the product of 1 - beta up to each
timestep), `timesteps` a [B] int64 tensor of indices into it, latents and noise are [B,C,H,W], `snr` is
a signal-to-noise ratio of any shape. docs/math.md has all formulas in one table.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch.nn.functional import interpolate

Prediction = Literal["epsilon", "v"]

_DEBIASED_CAP = 1000.0


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


def min_snr_weights(snr: torch.Tensor, gamma: float, prediction: Prediction, floor: float = 0.0) -> torch.Tensor:
    """Return the loss weights of min-SNR-gamma (Hang et al. 2023, eq. 5 and app. A).

    For epsilon min(snr, gamma) / snr, for v max(min(snr, gamma), floor) / (snr + 1): without a floor, a
    timestep of pure noise would teach v nothing.
    """
    clipped = snr.clamp(max=gamma)
    if prediction == "epsilon":
        return torch.where(snr < gamma, 1.0, clipped / snr)  # 1 where both are 0, too
    return clipped.clamp(min=floor) / (snr + 1)


def debiased_weights(snr: torch.Tensor, prediction: Prediction, floor: float = 0.0) -> torch.Tensor:
    """Return the loss weights of debiased estimation (Yu et al. 2023), snr taken as at most 1000.

    For epsilon 1 / sqrt(snr), which is infinite at pure noise; for v the same in terms of its error,
    max(sqrt(snr), floor) / (snr + 1).
    """
    snr = snr.clamp(max=_DEBIASED_CAP)
    return snr.rsqrt() if prediction == "epsilon" else snr.sqrt().clamp(min=floor) / (snr + 1)


def p2_weights(snr: torch.Tensor, gamma: float, prediction: Prediction) -> torch.Tensor:
    """Return the loss weights of P2 with k = 1 (Choi et al. 2022): (1 + snr)^-gamma, for v (2 + snr)^-gamma."""
    return (snr + (1 if prediction == "epsilon" else 2)).pow(-gamma)


def huber_loss(difference: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return the pseudo-Huber loss of each element, 2c (sqrt(d^2 + c^2) - c) (Khrapov et al. 2024).

    About d^2 for differences below `c` and 2c |d| far beyond it.
    """
    squared = difference.square()
    return 2 * c * squared / ((squared + c.square()).sqrt() + c)  # the same, without its cancellation


def snr_huber_c(snr: torch.Tensor, c: float) -> torch.Tensor:
    """Return where the Huber loss turns: 1 without noise, `c` at pure noise.

    (1 - c) / (1 + sigma)^2 + c with sigma = 1 / sqrt(snr) (Khrapov et al. 2024, as kohya's trainer has it).
    """
    return (1 - c) / (1 + snr.rsqrt()).square() + c


def offset_noise(noise: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Return `noise` plus noise that is equal over each channel of a picture, times `strength` (Guttenberg 2023)."""
    return noise + strength * torch.randn((*noise.shape[:2], 1, 1), generator=generator)


def pyramid_noise(noise: torch.Tensor, discount: float, generator: torch.Generator) -> torch.Tensor:
    """Return `noise` plus noise of half, a quarter, ... of its resolution, each picture at a variance of 1.

    Level i counts discount^i, down to the level whose shorter side is 1 (Whitaker 2023; here each level has
    half the side of the one before).
    """
    height, width = size = noise.shape[-2:]
    summed, strength = noise, 1.0
    while min(height, width) > 1:
        height, width, strength = (height + 1) // 2, (width + 1) // 2, strength * discount
        coarse = torch.randn((*noise.shape[:2], height, width), generator=generator)
        summed = summed + strength * interpolate(coarse, size, mode="bilinear")
    return summed / summed.std(dim=(1, 2, 3), keepdim=True)


def opposite_pairs(noise: torch.Tensor) -> torch.Tensor:
    """Return `noise` with rows 1, 3, 5, ... replaced by minus the row before each; every row's law is unchanged."""
    paired = noise.clone()
    paired[1::2] = -noise[: len(noise) - len(noise) % 2 : 2]
    return paired


def seed_from(*parts: int | str) -> int:
    """Return a 63-bit seed that is a fixed function of `parts` and differs for every other choice."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def step_generator(seed: int, rank: int, examples_seen: int) -> torch.Generator:
    """Return the CPU generator for one batch; it depends on nothing but the arguments.

    Because nothing is carried from step to step, a resumed run draws what the uninterrupted one draws.
    """
    return torch.Generator().manual_seed(seed_from(seed, rank, examples_seen))


def draw_timesteps(count: int, density: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return `count` timesteps, [count] int64, in proportion to `density` [T], stratified within the batch.

    The sum of `density`, which must not be zero, is cut into `count` equal parts and one place is drawn from
    each (in random order), which keeps every timestep as likely as it is and lowers the variance of the loss.
    """
    strata = torch.randperm(count, generator=generator)
    offsets = torch.rand(count, generator=generator, dtype=torch.float64)
    # Not scaled to 1, because whole numbers add up without rounding: the uniform draw is exact.
    cumulative = density.double().cumsum(0)
    drawn = torch.searchsorted(cumulative, (strata + offsets) * (cumulative[-1] / count), right=True)
    return drawn.clamp(max=int(density.nonzero().max()))


def logit_normal_density(length: int, mean: float, std: float) -> torch.Tensor:
    """Return how likely each of `length` timesteps is, [length] float64 with sum 1, under a logit-normal law.

    Of sigmoid(x), x normal, it is the share between t / length and (t + 1) / length (Esser et al. 2024).
    """
    edges = torch.arange(length + 1, dtype=torch.float64) / length
    return torch.special.ndtr((edges.logit() - mean) / std).diff()


def latents_from_posterior(mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return a fresh draw from the VAE's posterior, mean + std * noise, all [B,C,H,W]."""
    return mean + std * noise

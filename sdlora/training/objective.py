"""The loss of one batch, and the validation loss that can be compared between steps and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sdlora.adapters.inject import adapters_off
from sdlora.config import TrainConfig
from sdlora.data.cache import CachedExample
from sdlora.diffusion import (
    add_noise,
    draw_timesteps,
    latents_from_posterior,
    min_snr_weights,
    seed_from,
    signal_to_noise,
    step_generator,
    training_target,
)
from sdlora.families.base import Conditioning, LoadedBase, PictureSize, autocast

CaptionRows = Mapping[str | None, Conditioning]
"""Encoded captions by their text, None standing for no prompt; empty when the text encoder is trained and captions are encoded live."""


def batch_loss(
    base: LoadedBase,
    examples: Sequence[CachedExample],
    captions: CaptionRows,
    config: TrainConfig,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the weighted loss of a batch, summed over the examples and divided by the full batch size.

    So each example has the same say in an epoch, also in a bucket's short last batch. The target of prior
    samples is what the base predicts without the adapter; it pulls on nothing but what the adapter changed.
    """
    count = len(examples)
    shape = examples[0].mean.shape[1:]
    posterior_noise = torch.randn((count, *shape), generator=generator)
    noise = torch.randn((count, *shape), generator=generator)
    timesteps = draw_timesteps(count, len(base.alphas_cumprod), generator)
    variants = torch.rand(count, generator=generator)
    dropped = torch.rand(count, generator=generator) < config.data.caption_dropout

    chosen = [int(share * len(example.mean)) for share, example in zip(variants.tolist(), examples, strict=True)]
    mean = torch.stack([example.mean[v] for v, example in zip(chosen, examples, strict=True)])
    std = torch.stack([example.std[v] for v, example in zip(chosen, examples, strict=True)])
    latents = latents_from_posterior(mean, std, posterior_noise)
    texts = [None if drop else e.sample.caption for drop, e in zip(dropped.tolist(), examples, strict=True)]

    errors = _squared_errors(base, latents, noise, timesteps, texts, captions, examples)
    if config.training.min_snr_gamma:
        snr = signal_to_noise(timesteps, base.alphas_cumprod)
        errors = errors * min_snr_weights(snr, config.training.min_snr_gamma, base.prediction).to(errors.device)
    if prior := _prior_rows(examples):
        weights = torch.ones(count)
        weights[prior] = config.training.prior_weight
        errors = errors * weights.to(errors.device)
    return errors.sum() / config.training.batch_size


def training_generator(config: TrainConfig, rank: int, examples_seen: int) -> torch.Generator:
    """Return the generator of one batch; LoRA dropout, which can only use the global one, is seeded too."""
    if config.adapter.dropout:
        torch.manual_seed(seed_from(config.training.seed, rank, examples_seen, "dropout"))
    return step_generator(config.training.seed, rank, examples_seen)


@torch.no_grad()
def validation_loss(
    base: LoadedBase, examples: Sequence[CachedExample], captions: CaptionRows, timesteps_each: int
) -> float:
    """Return the mean squared error over held-out pictures with noise and timesteps that never change.

    Each picture is seen at `timesteps_each` levels, evenly spread; its latents are the posterior's mean.
    """
    length = len(base.alphas_cumprod)
    levels = torch.tensor([int((i + 0.5) * length / timesteps_each) for i in range(timesteps_each)])
    total = 0.0
    for number, example in enumerate(examples):
        generator = torch.Generator().manual_seed(seed_from("validation", number))
        latents = example.mean[:1].expand(timesteps_each, -1, -1, -1)
        noise = torch.randn(latents.shape, generator=generator)
        texts = [example.sample.caption] * timesteps_each
        errors = _squared_errors(base, latents, noise, levels, texts, captions, [example] * timesteps_each)
        total += float(errors.mean())
    return total / len(examples)


def _squared_errors(
    base: LoadedBase,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    texts: Sequence[str | None],
    captions: CaptionRows,
    examples: Sequence[CachedExample],
) -> torch.Tensor:
    """Return the mean squared error of each example, [B] float32, of prior samples against the bare base."""
    table = base.alphas_cumprod
    noisy = add_noise(latents, noise, timesteps, table).to(base.device, base.dtype)
    target = training_target(latents, noise, timesteps, table, base.prediction).to(base.device)

    sizes = [example.size for example in examples]
    if prior := _prior_rows(examples):
        rows = ([texts[row] for row in prior], captions, [sizes[row] for row in prior])
        with torch.no_grad(), adapters_off(base):
            target[prior] = _predict(base, noisy[prior], timesteps[prior], *rows)
    prediction = _predict(base, noisy, timesteps, texts, captions, sizes)
    return (prediction - target).square().mean(dim=(1, 2, 3))


def _prior_rows(examples: Sequence[CachedExample]) -> list[int]:
    return [row for row, example in enumerate(examples) if example.sample.prior]


def _predict(
    base: LoadedBase,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    texts: Sequence[str | None],
    captions: CaptionRows,
    sizes: Sequence[PictureSize],
) -> torch.Tensor:
    """Return what the model, as it is now, predicts for noisy latents, [B,4,h,w] float32."""
    with autocast(base):
        if captions:
            conditioning = Conditioning.concatenate([captions[text] for text in texts]).to(base.device, base.dtype)
        else:
            conditioning = base.family.encode_prompts(base, texts)
        return base.family.predict(base, noisy, timesteps.to(base.device), conditioning, sizes).float()

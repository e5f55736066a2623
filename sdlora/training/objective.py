"""The loss of one batch, and the validation loss that can be compared between steps and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sdlora.adapters.inject import adapters_off
from sdlora.config import TrainConfig
from sdlora.data.examples import CachedExample
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

EncodedTexts = Mapping[str | None, Conditioning]
"""Encoded texts, None standing for no prompt; empty when the text encoder is trained and texts are encoded live."""


@dataclass(frozen=True)
class Turn:
    """One example in one batch, with the text it has this time; None: no prompt."""

    example: CachedExample
    text: str | None


@dataclass(frozen=True)
class _Rows:
    """What the model is asked about: noisy latents [B,4,h,w], timesteps [B], texts and sizes."""

    noisy: torch.Tensor
    timesteps: torch.Tensor
    texts: Sequence[str | None]
    sizes: Sequence[PictureSize]

    def chosen(self, index: Sequence[int], texts: Sequence[str | None] | None = None) -> _Rows:
        """Return some of the rows, perhaps under other texts."""
        rows = list(index)
        texts = [self.texts[row] for row in rows] if texts is None else texts
        return _Rows(self.noisy[rows], self.timesteps[rows], texts, [self.sizes[row] for row in rows])

    def followed_by(self, other: _Rows) -> _Rows:
        """Return both, one after the other."""
        return _Rows(
            torch.cat([self.noisy, other.noisy]),
            torch.cat([self.timesteps, other.timesteps]),
            [*self.texts, *other.texts],
            [*self.sizes, *other.sizes],
        )


def batch_loss(
    base: LoadedBase,
    turns: Sequence[Turn],
    batch_size: int,
    texts: EncodedTexts,
    config: TrainConfig,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the weighted loss of a batch, summed over the examples and divided by the full `batch_size`.

    So each example has the same say in an epoch, also in a bucket's short last batch. docs/math.md says what
    an example's loss consists of.
    """
    count = len(turns)
    examples = [turn.example for turn in turns]
    width, height = examples[0].bucket
    shape = (4, height // 8, width // 8)
    posterior_noise = torch.randn((count, *shape), generator=generator)
    noise = torch.randn((count, *shape), generator=generator)
    timesteps = draw_timesteps(count, len(base.alphas_cumprod), generator)
    shares = torch.rand(count, generator=generator).tolist()

    chosen = [int(share * len(example.variants)) for share, example in zip(shares, examples, strict=True)]
    drawn = [example.posterior(variant) for variant, example in zip(chosen, examples, strict=True)]
    latents = latents_from_posterior(
        torch.stack([posterior.mean for posterior in drawn]),
        torch.stack([posterior.std for posterior in drawn]),
        posterior_noise,
    )
    rows = _Rows(
        add_noise(latents, noise, timesteps, base.alphas_cumprod).to(base.device, base.dtype),
        timesteps,
        [turn.text for turn in turns],
        [example.variants[variant].size for variant, example in zip(chosen, examples, strict=True)],
    )
    target = training_target(latents, noise, timesteps, base.alphas_cumprod, base.prediction).to(base.device)
    masks = [posterior.mask for posterior in drawn]
    weights = torch.ones(count)
    if config.training.min_snr_gamma:
        snr = signal_to_noise(timesteps, base.alphas_cumprod)
        weights = min_snr_weights(snr, config.training.min_snr_gamma, base.prediction)
    errors = _example_errors(base, examples, rows, target, masks, weights.to(base.device), texts, config)
    return errors.sum() / batch_size


def training_generator(config: TrainConfig, rank: int, examples_seen: int) -> torch.Generator:
    """Return the generator of one batch; LoRA dropout, which can only use the global one, is seeded too."""
    if config.adapter.dropout:
        torch.manual_seed(seed_from(config.training.seed, rank, examples_seen, "dropout"))
    return step_generator(config.training.seed, rank, examples_seen)


@torch.no_grad()
def validation_loss(
    base: LoadedBase, examples: Sequence[CachedExample], texts: EncodedTexts, timesteps_each: int
) -> float:
    """Return the mean squared error over held-out pictures with noise and timesteps that never change.

    Each picture is seen at `timesteps_each` levels, evenly spread; its latents are the posterior's mean, its
    caption has nothing left to chance, its mask counts as in training.
    """
    length = len(base.alphas_cumprod)
    levels = torch.tensor([int((i + 0.5) * length / timesteps_each) for i in range(timesteps_each)])
    total = 0.0
    for number, example in enumerate(examples):
        generator = torch.Generator().manual_seed(seed_from("validation", number))
        posterior = example.posterior()
        latents = posterior.mean.expand(timesteps_each, -1, -1, -1)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = add_noise(latents, noise, levels, base.alphas_cumprod).to(base.device, base.dtype)
        target = training_target(latents, noise, levels, base.alphas_cumprod, base.prediction).to(base.device)
        rows = _Rows(noisy, levels, [example.sample.caption] * timesteps_each, [example.size] * timesteps_each)
        squared = (_predict(base, rows, texts) - target).square()
        total += float((squared * _mask_weights([example], [posterior.mask], squared)).mean())
    return total / len(examples)


def _example_errors(
    base: LoadedBase,
    examples: Sequence[CachedExample],
    rows: _Rows,
    target: torch.Tensor,
    masks: Sequence[torch.Tensor | None],
    weights: torch.Tensor,
    texts: EncodedTexts,
    config: TrainConfig,
) -> torch.Tensor:
    """Return the loss of each example, [B] float32; `weights` [B] are those of their noise levels.

    What the base alone predicts is the target of prior samples, of the black parts of masks that are held,
    and of a second look at each example under its class prompt, as far as the configuration asks for these.
    """
    prior = config.data.prior
    settings = [example.sample.concept.settings for example in examples]
    others = [row for row, example in enumerate(examples) if example.sample.prior and prior.target == "base"]
    held = [row for row, mask in enumerate(masks) if mask is not None and settings[row].masks.hold_weight]
    classed = []
    if prior.source == "training":
        classed = [row for row, example in enumerate(examples) if not example.sample.prior]
    as_class = rows.chosen(classed, [settings[row].class_prompt for row in classed])

    own, asked = sorted({*others, *held}), rows
    if classed:
        asked = rows.followed_by(as_class)
    if own or classed:
        with torch.no_grad(), adapters_off(base):
            known = _predict(base, rows.chosen(own).followed_by(as_class), texts)
        by_row = dict(zip(own, known, strict=False))
        if others:
            target[others] = torch.stack([by_row[row] for row in others])
    prediction = _predict(base, asked, texts)

    squared = (prediction[: len(examples)] - target).square()
    factors = [
        (prior.weight if example.sample.prior else 1.0) * own_settings.weight
        for example, own_settings in zip(examples, settings, strict=True)
    ]
    errors = (squared * _mask_weights(examples, masks, squared)).mean(dim=(1, 2, 3))
    errors = errors * weights * torch.tensor(factors, device=errors.device)
    drifts = torch.zeros_like(errors)
    for row in held:
        black = 1 - masks[row].to(errors.device)  # type: ignore[union-attr]  # held rows have masks
        drifts[row] = settings[row].masks.hold_weight * ((prediction[row] - by_row[row]).square() * black).mean()
    if classed:
        drift = (prediction[len(examples) :] - known[len(own) :]).square().mean(dim=(1, 2, 3))
        drifts = drifts.index_add(0, torch.tensor(classed, device=drifts.device), prior.weight * drift)
    return errors + weights * drifts


def _mask_weights(
    examples: Sequence[CachedExample], masks: Sequence[torch.Tensor | None], like: torch.Tensor
) -> torch.Tensor:
    """Return the weight of each latent position: 1 where a mask is white or there is none, unmasked_weight where black.

    [B,1,h,w], or [1] where no example has a mask.
    """
    if not any(mask is not None for mask in masks):
        return torch.ones(1, device=like.device)
    weights = []
    for example, mask in zip(examples, masks, strict=True):
        least = example.sample.concept.settings.masks.unmasked_weight
        weights.append(torch.ones_like(like[:1, :1].cpu())[0] if mask is None else least + (1 - least) * mask)
    return torch.stack(weights).to(like.device)


def _predict(base: LoadedBase, rows: _Rows, texts: EncodedTexts) -> torch.Tensor:
    """Return what the model, as it is now, predicts for noisy latents, [B,4,h,w] float32."""
    with autocast(base):
        if texts:
            conditioning = Conditioning.concatenate([texts[text] for text in rows.texts]).to(base.device, base.dtype)
        else:
            conditioning = base.family.encode_prompts(base, rows.texts)
        timesteps = rows.timesteps.to(base.device)
        return base.family.predict(base, rows.noisy, timesteps, conditioning, rows.sizes).float()

"""The loss of one batch, and the validation loss that can be compared between steps and runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from sdlora.adapters.inject import adapters_off
from sdlora.config import ObjectiveSection, TrainConfig
from sdlora.data.examples import LATENT_CHANNELS, CachedExample, Posterior
from sdlora.diffusion import (
    add_noise,
    draw_timesteps,
    huber_loss,
    latents_from_posterior,
    offset_noise,
    opposite_pairs,
    pyramid_noise,
    seed_from,
    step_generator,
    training_target,
)
from sdlora.families.base import Conditioning, LoadedBase, PictureSize, autocast
from sdlora.training.timesteps import timestep_tables

EncodedTexts = Mapping[str | None, Conditioning]
"""Encoded texts, None standing for no prompt; empty when what encodes them is trained and texts are encoded live."""


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


@dataclass(frozen=True)
class DrawnBatch:
    """A batch with everything drawn that chance decides, on the CPU; computing its loss draws nothing but dropout.

    `target` [B,4,h,w] is what the model should predict, `masks` [1,h,w] each or None, `weights` and `huber_c`
    [B] are those of the timesteps. `batch_size` is that of the full batch, also in a part of it.
    """

    examples: Sequence[CachedExample]
    rows: _Rows
    target: torch.Tensor
    masks: Sequence[torch.Tensor | None]
    weights: torch.Tensor
    huber_c: torch.Tensor
    batch_size: int

    def __len__(self) -> int:
        return len(self.examples)

    def parts(self, size: int) -> Iterator[DrawnBatch]:
        """Yield the batch in parts of at most `size` examples; the sum of their losses is the loss of the batch."""
        for start in range(0, len(self), size):
            rows = list(range(len(self)))[start : start + size]
            yield DrawnBatch(
                self.examples[start : start + size],
                self.rows.chosen(rows),
                self.target[rows],
                self.masks[start : start + size],
                self.weights[rows],
                self.huber_c[rows],
                self.batch_size,
            )


def prepare_batch(
    base: LoadedBase, turns: Sequence[Turn], batch_size: int, config: TrainConfig, generator: torch.Generator
) -> DrawnBatch:
    """Return the batch of `turns`, one of full size having `batch_size` of them, with all that `generator` decides.

    Raises ConfigError where the objective does not fit the base's schedule.
    """
    objective, count = config.objective, len(turns)
    examples = [turn.example for turn in turns]
    width, height = examples[0].bucket
    shape = (count, LATENT_CHANNELS, height // 8, width // 8)
    tables = timestep_tables(base.alphas_cumprod, base.prediction, objective)
    posterior_noise = torch.randn(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    timesteps = draw_timesteps(count, tables.density, generator)
    shares = torch.rand(count, generator=generator).tolist()
    # What only some objectives draw comes last, so that they share the rest with all others.
    noise, input_noise = _shaped_noise(noise, objective, generator)

    chosen = [int(share * len(example.variants)) for share, example in zip(shares, examples, strict=True)]
    drawn = [example.posterior(variant) for variant, example in zip(chosen, examples, strict=True)]
    latents = latents_from_posterior(*_stacked(drawn), posterior_noise)
    rows = _Rows(
        add_noise(latents, input_noise, timesteps, base.alphas_cumprod).to(base.dtype),
        timesteps,
        [turn.text for turn in turns],
        [example.variants[variant].size for variant, example in zip(chosen, examples, strict=True)],
    )
    return DrawnBatch(
        examples,
        rows,
        training_target(latents, noise, timesteps, base.alphas_cumprod, base.prediction),
        [posterior.mask for posterior in drawn],
        tables.weights[timesteps],
        tables.huber_c[timesteps],
        batch_size,
    )


def batch_loss(base: LoadedBase, drawn: DrawnBatch, texts: EncodedTexts, config: TrainConfig) -> torch.Tensor:
    """Return the weighted loss of a batch or a part of it: the sum over its examples by the full batch size.

    So each example has the same say in an epoch, also in a bucket's short last batch. docs/math.md says what
    an example's loss consists of.
    """
    return _example_errors(base, drawn, texts, config).sum() / drawn.batch_size


def training_generator(config: TrainConfig, rank: int, examples_seen: int) -> torch.Generator:
    """Return the generator of one batch; an adapter's dropout, which can only use the global one, is seeded too."""
    adapter = config.adapter
    if adapter.dropout or adapter.rank_dropout or adapter.module_dropout:
        torch.manual_seed(seed_from(config.training.seed, rank, examples_seen, "dropout"))
    return step_generator(config.training.seed, rank, examples_seen)


@torch.no_grad()
def validation_loss(
    base: LoadedBase, examples: Sequence[CachedExample], texts: EncodedTexts, timesteps_each: int
) -> float:
    """Return the mean squared error over held-out pictures with noise and timesteps that never change.

    It is that whatever the run's objective, so that runs with different ones can be compared. Each picture is
    seen at `timesteps_each` levels, evenly spread; its latents are the posterior's mean, its caption has nothing
    left to chance, its mask counts as in training.
    """
    length = len(base.alphas_cumprod)
    levels = torch.tensor([int((i + 0.5) * length / timesteps_each) for i in range(timesteps_each)])
    total = 0.0
    for number, example in enumerate(examples):
        generator = torch.Generator().manual_seed(seed_from("validation", number))
        posterior = example.posterior()
        latents = posterior.mean.expand(timesteps_each, -1, -1, -1)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = add_noise(latents, noise, levels, base.alphas_cumprod).to(base.dtype)
        target = training_target(latents, noise, levels, base.alphas_cumprod, base.prediction).to(base.device)
        rows = _Rows(noisy, levels, [example.sample.caption] * timesteps_each, [example.size] * timesteps_each)
        squared = (_predict(base, rows, texts) - target).square()
        total += float((squared * _mask_weights([example], [posterior.mask], squared)).mean())
    return total / len(examples)


def _stacked(drawn: Sequence[Posterior]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([one.mean for one in drawn]), torch.stack([one.std for one in drawn])


def _shaped_noise(
    noise: torch.Tensor, objective: ObjectiveSection, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the noise that the model should find and that in its input, made of white noise [B,4,h,w]."""
    if objective.pyramid_discount:
        noise = pyramid_noise(noise, objective.pyramid_discount, generator)
    if objective.noise_offset:
        noise = offset_noise(noise, objective.noise_offset, generator)
    seen = noise
    if objective.input_perturbation:
        seen = noise + objective.input_perturbation * torch.randn(noise.shape, generator=generator)
    return (opposite_pairs(noise), opposite_pairs(seen)) if objective.antithetic else (noise, seen)


def _example_errors(base: LoadedBase, drawn: DrawnBatch, texts: EncodedTexts, config: TrainConfig) -> torch.Tensor:
    """Return the loss of each example, [B] float32.

    What the base alone predicts is the target of prior samples, of the black parts of masks that are held,
    and of a second look at each example under its class prompt, as far as the configuration asks for these.
    """
    prior, kind = config.data.prior, config.objective.loss
    examples, rows, masks = drawn.examples, drawn.rows, drawn.masks
    target, weights, huber_c = (part.to(base.device) for part in (drawn.target, drawn.weights, drawn.huber_c))
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
            target = target.clone()
            target[others] = torch.stack([by_row[row] for row in others])
    prediction = _predict(base, asked, texts)

    factors = [
        (prior.weight if example.sample.prior else 1.0) * own_settings.weight
        for example, own_settings in zip(examples, settings, strict=True)
    ]
    lost = _losses(prediction[: len(examples)] - target, kind, huber_c)
    errors = (lost * _mask_weights(examples, masks, lost)).mean(dim=(1, 2, 3))
    errors = errors * weights * torch.tensor(factors, device=errors.device)
    drifts = torch.zeros_like(errors)
    for row in held:
        black = 1 - masks[row].to(errors.device)  # type: ignore[union-attr]  # held rows have masks
        drift = _losses((prediction[row] - by_row[row])[None], kind, huber_c[[row]])[0]
        drifts[row] = settings[row].masks.hold_weight * (drift * black).mean()
    if classed:
        drift = _losses(prediction[len(examples) :] - known[len(own) :], kind, huber_c[classed]).mean(dim=(1, 2, 3))
        drifts = drifts.index_add(0, torch.tensor(classed, device=drifts.device), prior.weight * drift)
    return errors + weights * drifts


def _losses(difference: torch.Tensor, kind: str, huber_c: torch.Tensor) -> torch.Tensor:
    """Return how each element of `difference` [B,4,h,w] counts; `huber_c` [B] is where Huber's loss turns."""
    if kind == "l1":
        return difference.abs()
    if kind == "huber":
        return huber_loss(difference, huber_c.view(-1, 1, 1, 1))
    return difference.square()


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
        noisy, timesteps = rows.noisy.to(base.device), rows.timesteps.to(base.device)
        return base.family.predict(base, noisy, timesteps, conditioning, rows.sizes).float()

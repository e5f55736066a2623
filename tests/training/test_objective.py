"""The loss, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoded import encode, encode_texts
from PIL import Image

from sdlora.adapters.inject import adapters_off, new_adapter
from sdlora.config import TrainConfig
from sdlora.data.sample import Concept
from sdlora.diffusion import add_noise, draw_timesteps, min_snr_weights, signal_to_noise, step_generator
from sdlora.training.objective import Turn, batch_loss, validation_loss

CLASS = "a picture of a thing"


@pytest.fixture
def prepare(configure: Any, tiny_base: Any) -> Any:
    """`prepare(...)`: configuration, base, two turns and texts, of a run with such settings."""

    def make(**values: Any) -> Any:
        config = configure(data__buckets={"enabled": False}, **values)
        base = tiny_base("sd1")
        turns = [Turn(example, example.sample.caption) for example in encode(base, config.data)[:2]]
        return config, base, turns, encode_texts(base, [CLASS, *(turn.text for turn in turns)])

    return make


def loss_of(config: TrainConfig, base: Any, turns: Any, texts: Any, seed: int = 3) -> float:
    size = config.training.batch_size
    with torch.no_grad():
        return float(batch_loss(base, turns, size, texts, config, step_generator(seed, 0, 0)))


def drawn(base: Any, turns: Any, seed: int = 3) -> Any:
    """Latents, noise, timesteps and noisy latents of two 64-pixel turns, as the loss draws them."""
    generator = step_generator(seed, 0, 0)
    posterior_noise, noise = (torch.randn((2, 4, 8, 8), generator=generator) for _ in range(2))
    timesteps = draw_timesteps(2, 1000, generator)
    posteriors = [turn.example.posterior() for turn in turns]
    latents = torch.stack([p.mean + p.std * n for p, n in zip(posteriors, posterior_noise, strict=True)])
    return noise, timesteps, add_noise(latents, noise, timesteps, base.alphas_cumprod)


def predict(base: Any, noisy: Any, timesteps: Any, texts: Any, words: Any) -> torch.Tensor:
    states = torch.cat([texts[word].states for word in words])
    with torch.no_grad():
        return base.unet(noisy, timesteps, encoder_hidden_states=states).sample


def marked(turns: Any, **settings: Any) -> Any:
    """The turns with other settings of their concept; `prior` marks them as pictures of other things."""
    prior = settings.pop("prior", False)
    own = turns[0].example.sample.concept.settings
    concept = Concept("x", own.model_copy(update=settings), prior)
    return [
        replace(turn, example=replace(turn.example, sample=replace(turn.example.sample, concept=concept)))
        for turn in turns
    ]


def live_adapter(config: TrainConfig, base: Any) -> Any:
    parameters = new_adapter(base, "live", config.adapter, seed=1)["unet"]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    return parameters


def with_data(config: TrainConfig, **prior: Any) -> TrainConfig:
    data = config.data.model_copy(update={"prior": config.data.prior.model_copy(update=prior)})
    return config.model_copy(update={"data": data})


def test_batch_loss_is_the_formula(prepare: Any) -> None:
    """The whole way from the cached posterior to the number, done again by hand from the same draws."""
    config, base, turns, texts = prepare()
    noise, timesteps, noisy = drawn(base, turns)
    predicted = predict(base, noisy, timesteps, texts, [turn.text for turn in turns])
    weights = min_snr_weights(signal_to_noise(timesteps, base.alphas_cumprod), 5.0, "epsilon")
    expected = float((weights * (predicted - noise).square().mean(dim=(1, 2, 3))).sum()) / 2
    assert loss_of(config, base, turns, texts) == pytest.approx(expected, rel=1e-5)


def test_a_short_batch_counts_its_examples_not_itself(prepare: Any) -> None:
    config, base, turns, texts = prepare()
    one = config.model_copy(update={"training": config.training.model_copy(update={"batch_size": 1})})
    alone, full = loss_of(config, base, turns[:1], texts), loss_of(one, base, turns[:1], texts)
    assert alone == pytest.approx(full / 2, rel=1e-6)


def test_validation_loss_is_the_same_every_time(prepare: Any) -> None:
    _, base, turns, texts = prepare()
    assert len({validation_loss(base, [turn.example for turn in turns], texts, 4) for _ in range(3)}) == 1


def test_a_turn_without_text_trains_what_no_prompt_gives(prepare: Any) -> None:
    config, base, turns, texts = prepare()
    dropped = [replace(turn, text=None) for turn in turns]
    empty = dict.fromkeys([turn.text for turn in turns], texts[None])
    assert loss_of(config, base, dropped, texts) == loss_of(config, base, turns, empty)
    assert loss_of(config, base, dropped, texts) != loss_of(config, base, turns, texts)


def test_a_concepts_weight_scales_its_examples(prepare: Any) -> None:
    config, base, turns, texts = prepare()
    half = marked(turns, weight=0.5)
    assert loss_of(config, base, half, texts) == pytest.approx(loss_of(config, base, turns, texts) / 2)


# --- prior preservation ------------------------------------------------------------------------------


def test_prior_samples_are_held_to_what_the_base_predicts(prepare: Any) -> None:
    """Nothing to learn from them while the adapter does nothing; then the formula, the bare output as the target."""
    config, base, turns, texts = prepare(training__min_snr_gamma=0)
    turns = marked(turns, prior=True)
    parameters = new_adapter(base, "live", config.adapter, seed=1)["unet"]
    assert loss_of(config, base, turns, texts) == 0.0
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    loss = batch_loss(base, turns, 2, texts, config, step_generator(3, 0, 0))
    loss.backward()
    assert all(parameter.grad is not None for parameter in parameters)

    _, timesteps, noisy = drawn(base, turns)
    words = [turn.text for turn in turns]
    adapted = predict(base, noisy, timesteps, texts, words)
    with adapters_off(base):
        bare = predict(base, noisy, timesteps, texts, words)
    assert float(loss.detach()) == pytest.approx(float((adapted - bare).square().mean()), rel=1e-5)
    halved = loss_of(with_data(config, weight=0.5), base, turns, texts)
    assert halved == pytest.approx(float(loss.detach()) / 2)


def test_prior_samples_can_be_learnt_as_pictures(prepare: Any) -> None:
    config, base, turns, texts = prepare(training__min_snr_gamma=0)
    live_adapter(config, base)
    as_pictures = loss_of(with_data(config, target="picture", weight=0.25), base, marked(turns, prior=True), texts)
    assert as_pictures == pytest.approx(loss_of(config, base, turns, texts) / 4)


def test_the_class_prompt_is_held_to_the_base_without_any_picture(prepare: Any) -> None:
    config, base, turns, texts = prepare(training__min_snr_gamma=0)
    live_adapter(config, base)
    turns = marked(turns, class_prompt=CLASS)
    both = loss_of(with_data(config, source="training", weight=2.0), base, turns, texts)
    _, timesteps, noisy = drawn(base, turns)
    adapted = predict(base, noisy, timesteps, texts, [CLASS] * 2)
    with adapters_off(base):
        bare = predict(base, noisy, timesteps, texts, [CLASS] * 2)
    expected = loss_of(config, base, turns, texts) + 2 * float((adapted - bare).square().mean())
    assert both == pytest.approx(expected, rel=1e-5)


# --- masks -------------------------------------------------------------------------------------------


@pytest.fixture
def masked(prepare: Any, settings: Any) -> Any:
    """As `prepare`, the first picture's left half white in its mask, the second without a mask."""
    folder = Path(settings["data"]["folder"])
    grey = np.zeros((64, 64), np.uint8)
    grey[:, :32] = 255
    Image.fromarray(grey).save(folder / "0-masklabel.png")
    return prepare


def test_black_parts_of_a_mask_count_little(masked: Any) -> None:
    config, base, turns, texts = masked(training__min_snr_gamma=0, data__masks={"unmasked_weight": 0.25})
    assert [turn.example.posterior().mask is not None for turn in turns] == [True, False]
    noise, timesteps, noisy = drawn(base, turns)
    errors = (predict(base, noisy, timesteps, texts, [turn.text for turn in turns]) - noise).square()
    left, right = errors[0, :, :, :4].mean(), errors[0, :, :, 4:].mean()
    expected = float((left + 0.25 * right) / 2 + errors[1].mean()) / 2
    assert loss_of(config, base, turns, texts) == pytest.approx(expected, rel=1e-5)


def test_black_parts_can_be_held_to_the_base(masked: Any) -> None:
    masks = {"unmasked_weight": 0.0, "hold_weight": 3.0}
    config, base, turns, texts = masked(training__min_snr_gamma=0, data__masks=masks)
    live_adapter(config, base)
    noise, timesteps, noisy = drawn(base, turns)
    words = [turn.text for turn in turns]
    adapted = predict(base, noisy, timesteps, texts, words)
    with adapters_off(base):
        bare = predict(base, noisy, timesteps, texts, words)
    errors = (adapted - noise).square()
    drift = (adapted - bare).square()[0, :, :, 4:].mean()
    expected = float(errors[0, :, :, :4].mean() / 2 + 3 * drift / 2 + errors[1].mean()) / 2
    assert loss_of(config, base, turns, texts) == pytest.approx(expected, rel=1e-5)


def test_validation_counts_masks_as_training_does(masked: Any) -> None:
    _, base, turns, texts = masked(data__masks={"unmasked_weight": 0.0})
    with_mask = validation_loss(base, [turns[0].example], texts, 2)
    black = turns[0].example.sample.concept.settings.masks.model_copy(update={"unmasked_weight": 1.0})
    without = validation_loss(base, [turn.example for turn in marked(turns[:1], masks=black)], texts, 2)
    assert 0 < with_mask < without


def test_the_gradient_of_a_masked_loss_reaches_the_adapter(masked: Any) -> None:
    config, base, turns, texts = masked(data__masks={"hold_weight": 1.0})
    parameters = live_adapter(config, base)
    batch_loss(base, turns, 2, texts, config, step_generator(3, 0, 0)).backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in parameters)

"""The loss, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from objective_help import (
    CLASS,
    batch_of,
    drawn,
    idle_adapter,
    live_adapter,
    loss_of,
    marked,
    masked,
    predict,
    prepare,
    with_data,
)

from sdlora.adapters.inject import adapters_off
from sdlora.diffusion import min_snr_weights, seed_from, signal_to_noise
from sdlora.families.schedule import rescale_to_zero_snr
from sdlora.training.objective import batch_loss, validation_loss

__all__ = ["masked", "prepare"]


@pytest.fixture
def shape() -> str:
    """Computed by hand for one family; what differs between them is asked of all where it says so."""
    return "sd1"


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


def test_losses_of_the_default_objective_are_these_ones(prepare: Any) -> None:
    """Recorded when the objective had no settings but min-SNR: runs of then can be repeated."""
    config, base, turns, texts = prepare()
    assert [loss_of(config, base, turns, texts, seed) for seed in (3, 4)] == pytest.approx([1.1990974, 1.1267374])
    three = [*turns, turns[0]]
    assert [loss_of(config, base, three, texts, seed) for seed in (3, 4)] == pytest.approx([1.7433240, 1.2351674])
    assert validation_loss(base, [turn.example for turn in turns], texts, 4) == pytest.approx(1.1351679)


# --- how errors count --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["l1", "huber"])
def test_the_other_losses_are_their_formulas_in_every_term(masked: Any, kind: str) -> None:
    masks = {"unmasked_weight": 0.0, "hold_weight": 3.0}
    config, base, turns, texts = masked(
        data__masks=masks, objective={"loss": kind, "weighting": "debiased", "huber_c": 0.2}
    )
    config = with_data(config, source="training", weight=2.0)
    live_adapter(config, base)
    turns = marked(turns, class_prompt=CLASS)
    noise, timesteps, noisy = drawn(base, turns)
    words = [turn.text for turn in turns]
    adapted, as_class = (predict(base, noisy, timesteps, texts, w).double() for w in (words, [CLASS] * 2))
    with adapters_off(base):
        bare, bare_class = (predict(base, noisy, timesteps, texts, w).double() for w in (words, [CLASS] * 2))
    alpha = base.alphas_cumprod[timesteps].double()
    c = (0.8 / (1 + ((1 - alpha) / alpha).sqrt()) ** 2 + 0.2).view(2, 1, 1, 1)

    def lost(d: torch.Tensor) -> torch.Tensor:
        return d.abs() if kind == "l1" else 2 * c[: len(d)] * ((d**2 + c[: len(d)] ** 2).sqrt() - c[: len(d)])

    errors = lost(adapted - noise)
    examples = torch.stack([errors[0, :, :, :4].mean() / 2, errors[1].mean()])
    examples[0] += 3 * lost(adapted - bare)[0, :, :, 4:].mean() / 2
    examples += 2 * lost(as_class - bare_class).mean(dim=(1, 2, 3))
    weights = (alpha / (1 - alpha)).clamp(max=1000).rsqrt()
    assert loss_of(config, base, turns, texts) == pytest.approx(float((weights * examples).sum()) / 2, rel=1e-5)


@pytest.mark.parametrize("shape", ["sd2"])
def test_validation_is_the_mean_squared_error_on_the_runs_own_schedule(prepare: Any) -> None:
    _, base, turns, texts = prepare()
    rescale_to_zero_snr(base)
    example = turns[0].example
    latents = example.posterior().mean[None]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed_from("validation", 0)))
    root = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).sqrt()
    signal = ((root - root[-1]) * root[0] / (root[0] - root[-1]))[500]
    noisy = (signal * latents + (1 - signal**2).sqrt() * noise).float()
    predicted = predict(base, noisy, torch.tensor([500]), texts, [example.sample.caption])
    expected = (predicted - (signal * noise - (1 - signal**2).sqrt() * latents)).square().mean()
    assert validation_loss(base, [example], texts, 1) == pytest.approx(float(expected), rel=1e-5)


def test_an_example_that_weighs_nothing_changes_nothing(prepare: Any) -> None:
    config, base, turns, texts = prepare()
    parameters = live_adapter(config, base)
    loss = batch_loss(base, batch_of(config, base, marked(turns, weight=0.0)), texts, config)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(float(parameter.grad.abs().max()) == 0.0 for parameter in parameters)


# --- prior preservation ------------------------------------------------------------------------------


def test_prior_samples_are_held_to_what_the_base_predicts(prepare: Any) -> None:
    """Nothing to learn from them while the adapter does nothing; then the formula, the bare output as the target."""
    config, base, turns, texts = prepare(objective__weighting="none")
    turns = marked(turns, prior=True)
    parameters = idle_adapter(config, base)
    assert loss_of(config, base, turns, texts) == 0.0
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    loss = batch_loss(base, batch_of(config, base, turns), texts, config)
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
    config, base, turns, texts = prepare(objective__weighting="none")
    live_adapter(config, base)
    as_pictures = loss_of(with_data(config, target="picture", weight=0.25), base, marked(turns, prior=True), texts)
    assert as_pictures == pytest.approx(loss_of(config, base, turns, texts) / 4)


def test_the_class_prompt_is_held_to_the_base_without_any_picture(prepare: Any) -> None:
    config, base, turns, texts = prepare(objective__weighting="none")
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


def test_black_parts_of_a_mask_count_little(masked: Any) -> None:
    config, base, turns, texts = masked(objective__weighting="none", data__masks={"unmasked_weight": 0.25})
    assert [turn.example.posterior().mask is not None for turn in turns] == [True, False]
    noise, timesteps, noisy = drawn(base, turns)
    errors = (predict(base, noisy, timesteps, texts, [turn.text for turn in turns]) - noise).square()
    left, right = errors[0, :, :, :4].mean(), errors[0, :, :, 4:].mean()
    expected = float((left + 0.25 * right) / 2 + errors[1].mean()) / 2
    assert loss_of(config, base, turns, texts) == pytest.approx(expected, rel=1e-5)


def test_black_parts_can_be_held_to_the_base(masked: Any) -> None:
    masks = {"unmasked_weight": 0.0, "hold_weight": 3.0}
    config, base, turns, texts = masked(objective__weighting="none", data__masks=masks)
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
    batch_loss(base, batch_of(config, base, turns), texts, config).backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in parameters)

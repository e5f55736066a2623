"""What chance decides in a batch, and the batch computed in parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from every_family import SHAPES
from objective_help import (
    CLASS,
    batch_of,
    changed_objective,
    live_adapter,
    loss_of,
    marked,
    masked,
    noise_share,
    prepare,
    with_data,
)

from sdlora.adapters.trainable import new_adapter
from sdlora.config import TrainConfig
from sdlora.diffusion import draw_timesteps, min_snr_weights, signal_to_noise, step_generator
from sdlora.errors import ConfigError
from sdlora.training.objective import batch_loss, training_generator

__all__ = ["masked", "prepare"]


@pytest.fixture
def shape() -> str:
    """Computed by hand for one family; what differs between them is asked of all where it says so."""
    return "sd1"


def draw_twice(density: torch.Tensor) -> torch.Tensor:
    """The timesteps of two 64-pixel turns, under that density."""
    generator = step_generator(3, 0, 0)
    for _ in range(2):
        torch.randn((2, 4, 8, 8), generator=generator)
    return draw_timesteps(2, density, generator)


def test_drawing_a_batch_and_drawing_it_again_is_the_same_and_touches_no_other_randomness(prepare: Any) -> None:
    config, base, turns, _ = prepare(objective__noise_offset=0.1, objective__antithetic=True)
    before = torch.get_rng_state()
    one, other = (batch_of(config, base, turns) for _ in range(2))
    assert torch.equal(one.rows.noisy, other.rows.noisy)
    assert torch.equal(one.target, other.target)
    assert torch.equal(torch.get_rng_state(), before)


# --- parts of a batch --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_parts_of_a_batch_have_the_loss_and_the_gradient_of_the_whole(masked: Any) -> None:
    """With all that looks at several rows at once: masks that are held, prior samples, class prompts."""
    config, base, turns, texts = masked(
        data__masks={"hold_weight": 1.0},
        objective={"loss": "huber", "noise_offset": 0.1, "pyramid_discount": 0.3, "input_perturbation": 0.1},
    )
    config = with_data(config, source="training", weight=2.0)
    parameters = live_adapter(config, base)
    first, second = turns
    turns = [first, *marked([second], prior=True), second, *marked([first], weight=0.5), first]
    whole = batch_of(config, base, marked(turns[:1], class_prompt=CLASS) + turns[1:])
    texts = dict(texts.items()) | {"": texts[None]}

    def computed(parts: Any) -> Any:
        for parameter in parameters:
            parameter.grad = None
        losses = [batch_loss(base, part, texts, config) for part in parts]
        for loss in losses:
            loss.backward()
        return sum(float(loss.detach()) for loss in losses), torch.cat(
            [parameter.grad.flatten() for parameter in parameters]
        )

    expected, slope = computed([whole])
    for size, counts in ((1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (8, [5])):
        parts = list(whole.parts(size))
        assert [len(part) for part in parts] == counts
        loss, gradient = computed(parts)
        assert loss == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(gradient, slope, atol=1e-5 * float(slope.abs().max()), rtol=1e-3)


# --- noise and timesteps -----------------------------------------------------------------------------


def test_noise_offset_shifts_each_channel_of_what_is_added_and_of_what_is_to_be_found(prepare: Any) -> None:
    config, base, turns, _ = prepare()
    plain, shifted = (batch_of(changed_objective(config, noise_offset=c), base, turns) for c in (0.0, 0.5))
    difference = shifted.target - plain.target
    torch.testing.assert_close(difference, difference[..., :1, :1].expand_as(difference), atol=1e-6, rtol=0)
    assert 0.1 < difference[..., 0, 0].std() < 1.0
    torch.testing.assert_close(shifted.rows.noisy - plain.rows.noisy, noise_share(base, plain) * difference)
    assert torch.equal(shifted.rows.timesteps, plain.rows.timesteps)


def test_pyramid_noise_is_what_is_to_be_found(prepare: Any) -> None:
    config, base, turns, _ = prepare()
    plain, coarse = (batch_of(changed_objective(config, pyramid_discount=d), base, turns) for d in (0.0, 0.8))
    torch.testing.assert_close(coarse.target.flatten(1).std(dim=1), torch.ones(2))
    difference = coarse.target - plain.target
    torch.testing.assert_close(coarse.rows.noisy - plain.rows.noisy, noise_share(base, plain) * difference)
    neighbours = [(batch.target[..., 1:] * batch.target[..., :-1]).mean() for batch in (plain, coarse)]
    assert neighbours[1] > neighbours[0] + 0.2


@pytest.mark.parametrize("shape", ["sd1", "sd2"])
def test_input_perturbation_changes_what_the_model_sees_and_not_what_it_should_find(prepare: Any) -> None:
    config, base, turns, _ = prepare()
    plain, perturbed = (batch_of(changed_objective(config, input_perturbation=g), base, turns) for g in (0.0, 0.2))
    assert torch.equal(perturbed.target, plain.target)
    added = (perturbed.rows.noisy - plain.rows.noisy) / noise_share(base, plain)
    assert added.std().item() == pytest.approx(0.2, rel=0.15)


def test_antithetic_pairs_have_opposite_noise_of_every_kind_and_timesteps_as_ever(prepare: Any) -> None:
    config, base, turns, _ = prepare()
    shaped = changed_objective(config, noise_offset=0.2, pyramid_discount=0.3, input_perturbation=0.1)
    five = [*turns, turns[0], turns[0], turns[1]]
    plain, batch = (batch_of(changed_objective(shaped, antithetic=on), base, five) for on in (False, True))
    assert torch.equal(batch.rows.timesteps, plain.rows.timesteps)
    assert torch.equal(batch.target[[0, 2, 4]], plain.target[[0, 2, 4]])
    assert torch.equal(batch.target[1], -batch.target[0])
    assert torch.equal(batch.target[3], -batch.target[2])
    seen = [(batch.rows.noisy - plain.rows.noisy)[row] / noise_share(base, plain)[row] for row in range(5)]
    assert not seen[0].any() and not seen[2].any() and not seen[4].any()
    for row in (1, 3):  # minus the noise of the row before, perturbed, instead of its own
        perturbation = seen[row] + plain.target[row] + plain.target[row - 1]
        assert perturbation.std().item() == pytest.approx(0.1 * 2**0.5, rel=0.15)


def test_the_law_of_each_example_is_the_same_with_antithetic_pairs(prepare: Any) -> None:
    config, base, turns, _ = prepare()
    paired = changed_objective(config, antithetic=True)
    three = [*turns, turns[0]]
    batches = [batch_of(paired, base, three, seed) for seed in range(300)]
    for place in range(3):
        noise = torch.stack([batch.target[place] for batch in batches])
        assert abs(float(noise.mean())) < 0.02  # 76,800 numbers: the standard error is 0.0036
        assert float(noise.std()) == pytest.approx(1.0, abs=0.02)
        tenths = torch.bincount(torch.stack([batch.rows.timesteps[place] for batch in batches]) // 100, minlength=10)
        chi_squared = ((tenths.double() - 30) ** 2 / 30).sum()
        assert chi_squared < 34  # 9 degrees of freedom: the 99.99 % point is 33.7


def test_timesteps_come_from_the_range_and_the_law_that_are_asked_for(prepare: Any) -> None:
    config, base, turns, _ = prepare()
    drawn = batch_of(changed_objective(config, min_timestep=300, max_timestep=302), base, turns)
    assert sorted(drawn.rows.timesteps.tolist()) == [300, 301]
    many = changed_objective(config, timesteps="logit-normal", logit_mean=3.0, logit_std=0.1)
    assert batch_of(many, base, turns * 20).rows.timesteps.min() > 900  # sigmoid(3) is 0.95
    with pytest.raises(ConfigError, match=r"objective.max_timestep is 2000, but this base has 1000 timesteps"):
        batch_of(changed_objective(config, max_timestep=2000), base, turns)


def test_timesteps_drawn_by_their_weight_are_not_weighed_again(prepare: Any) -> None:
    config, base, turns, texts = prepare(objective__timesteps="snr")
    drawn_by_weight = batch_of(config, base, turns)
    assert drawn_by_weight.weights.tolist() == [1.0, 1.0]
    table = signal_to_noise(torch.arange(1000), base.alphas_cumprod)
    expected = draw_twice(min_snr_weights(table, 5.0, "epsilon"))
    assert torch.equal(drawn_by_weight.rows.timesteps, expected)
    unweighed = replace(batch_of(config, base, turns), weights=torch.ones(2))
    with torch.no_grad():
        assert loss_of(config, base, turns, texts) == float(batch_loss(base, unweighed, texts, config))


# --- texts that are encoded live ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_encoded_live_give_the_same_loss_and_train_their_encoder(prepare: Any) -> None:
    config, base, turns, texts = prepare(adapter__text_encoder=True)
    config = with_data(config, source="training")
    turns = [*marked(turns, class_prompt=CLASS), replace(turns[0], text=None)]
    turns[2:] = marked(turns[2:], prior=True)
    adapter = new_adapter(base, "live", config.adapter, seed=1)
    cached = loss_of(config, base, turns, texts)  # the adapter does nothing yet
    loss = batch_loss(base, batch_of(config, base, turns), {}, config)
    assert float(loss.detach()) == pytest.approx(cached, rel=1e-5)
    loss.backward()
    encoders = [weight for weight in adapter.weights if weight.component != "unet" and weight.role == "up"]
    assert {weight.component for weight in encoders} == set(base.text_encoders)
    slopes = [float(weight.parameter.grad.abs().max()) for weight in encoders if weight.parameter.grad is not None]
    assert max(slopes) > 0


# --- dropout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["dropout", "rank_dropout", "module_dropout"])
def test_each_dropout_is_drawn_from_the_batch_alone(configure: Any, setting: str) -> None:
    def draw(config: TrainConfig, examples_seen: int) -> list[float]:
        training_generator(config, 0, examples_seen)
        return torch.rand(3).tolist()

    dropping = configure(**{f"adapter__{setting}": 0.1})
    first = draw(dropping, 8)
    assert draw(dropping, 8) == first
    assert draw(dropping, 10) != first
    plain = configure()
    torch.manual_seed(0)
    assert draw(plain, 8) != draw(plain, 8)  # without dropout nothing is seeded

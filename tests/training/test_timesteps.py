"""What the objective makes of each timestep."""

from __future__ import annotations

import pytest
import torch

from sdlora.config import ObjectiveSection
from sdlora.errors import ConfigError
from sdlora.training.timesteps import timestep_tables

SCHEDULE = torch.tensor([0.9, 0.8, 0.5, 0.2])  # signal-to-noise ratios 9, 4, 1, 0.25
ENDS_IN_NOISE = torch.tensor([0.9, 0.8, 0.5, 0.0])


def tables(schedule=SCHEDULE, prediction="epsilon", **settings):
    return timestep_tables(schedule, prediction, ObjectiveSection(**settings))


def test_by_default_all_timesteps_are_as_likely_and_weighed_by_min_snr():
    found = tables()
    assert found.density.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(found.weights, torch.tensor([5 / 9, 1, 1, 1]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weighting": "none"}, [1, 1, 1, 1]),
        ({"min_snr_gamma": 2.0}, [2 / 9, 0.5, 1, 1]),
        ({"weighting": "debiased"}, [1 / 3, 1 / 2, 1, 2]),
        ({"weighting": "p2"}, [0.1, 0.2, 0.5, 0.8]),
        ({"weighting": "p2", "p2_gamma": 2.0}, [0.01, 0.04, 0.25, 0.64]),
    ],
)
def test_the_weights_of_epsilon(settings, expected):
    torch.testing.assert_close(tables(**settings).weights, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weighting": "none"}, [1, 1, 1, 1]),
        ({"min_snr_gamma": 2.0}, [2 / 10, 2 / 5, 1 / 2, 0.25 / 1.25]),
        ({"weighting": "debiased"}, [3 / 10, 2 / 5, 1 / 2, 0.5 / 1.25]),
        ({"weighting": "p2"}, [1 / 11, 1 / 6, 1 / 3, 1 / 2.25]),
    ],
)
def test_the_weights_of_v(settings, expected):
    found = tables(prediction="v", **settings).weights
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("weighting", ["min-snr", "debiased"])
def test_the_last_timestep_is_learnt_where_it_is_pure_noise(weighting):
    assert tables(ENDS_IN_NOISE, "v", weighting=weighting).weights[-1].item() == pytest.approx(0.1)


def test_what_lies_above_pure_noise_on_a_rescaled_schedule_keeps_its_weight():
    found, plain = tables(ENDS_IN_NOISE, "v").weights, tables(prediction="v").weights
    assert torch.equal(found[:3], plain[:3])


def test_a_range_of_timesteps():
    assert tables(min_timestep=1, max_timestep=3).density.tolist() == [0, 1, 1, 0]
    assert tables(min_timestep=2).density.tolist() == [0, 0, 1, 1]


def test_logit_normal_spreads_over_the_range():
    """Half of its median of 1/2 lies on each side; with a high mean nearly all of it is in the last timestep."""
    torch.testing.assert_close(
        tables(timesteps="logit-normal", min_timestep=1, max_timestep=3).density,
        torch.tensor([0, 0.5, 0.5, 0], dtype=torch.float64),
    )
    assert tables(timesteps="logit-normal", logit_mean=4.0, logit_std=0.5).density[-1] > 0.99


def test_drawing_by_snr_has_the_expected_gradient_of_weighing_up_to_its_length():
    """Sum of density x weight x what each timestep gives, for any of that, is in proportion to the weighed sum."""
    weighed, drawn = tables(weighting="debiased"), tables(weighting="debiased", timesteps="snr")
    assert drawn.weights.tolist() == [1, 1, 1, 1]
    gives = torch.tensor([[3.0, -1.0], [0.5, 7.0], [-2.0, 2.0], [1.0, 0.0]], dtype=torch.float64)

    def expected(found):
        return ((found.density / found.density.sum() * found.weights)[:, None] * gives).sum(0)

    mean_weight = weighed.weights.double().mean()
    torch.testing.assert_close(expected(drawn) * mean_weight, expected(weighed))


def test_where_hubers_loss_turns():
    assert tables(huber_c=0.2, huber_schedule="constant").huber_c.tolist() == pytest.approx([0.2] * 4)
    # sigma is 1/3, 1/2, 1, 2
    expected = [0.8 * (3 / 4) ** 2 + 0.2, 0.8 * (2 / 3) ** 2 + 0.2, 0.4, 0.8 / 9 + 0.2]
    assert tables(huber_c=0.2).huber_c.tolist() == pytest.approx(expected)
    assert tables(ENDS_IN_NOISE, "v", huber_c=0.2).huber_c[-1].item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_timestep": 5}, "objective.max_timestep is 5, but this base has 4 timesteps; use 0 for all"),
        ({"min_timestep": 4}, "objective.min_timestep is 4, which leaves no timestep below 4"),
        ({"min_timestep": 3, "max_timestep": 3}, "objective.min_timestep is 3, which leaves no timestep below 3"),
        (
            {"weighting": "p2", "p2_gamma": 1e4, "max_timestep": 2},
            'objective.weighting = "p2" has no finite weight above 0 for timesteps 0 to 1',
        ),
    ],
)
def test_an_objective_that_trains_no_timestep_is_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        tables(**settings)


def test_debiased_epsilon_at_pure_noise_is_refused_as_infinite():
    with pytest.raises(ConfigError, match="no finite weight above 0 for timesteps 0 to 3"):
        tables(ENDS_IN_NOISE, "epsilon", weighting="debiased")
    assert tables(ENDS_IN_NOISE, "epsilon", weighting="debiased", max_timestep=3).weights[0].item() == pytest.approx(
        1 / 3
    )

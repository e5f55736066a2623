"""The tiny base's pretraining can be stopped at any step and goes on as if it had not been."""

import pytest
import torch
from tiny_loop import StagePlan, learning_rate_share, train_stage
from torch import nn

PLAN = StagePlan("toy", steps=12, learning_rate=1e-2, warmup_steps=3, checkpoint_seconds=0.0, log_every=5)
CPU = torch.device("cpu")


def fresh():
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def loss_that_stops(at=None):
    steps = []

    def loss_of_step(model, random):
        if len(steps) == at:
            raise KeyboardInterrupt
        steps.append(random.numpy.random())
        inputs = torch.randn(8, 4, generator=random.torch)
        return model(inputs).square().mean(), {"first": steps[-1]}

    return loss_of_step


def test_a_stopped_stage_goes_on_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    expected = train_stage(PLAN, fresh(), loss_that_stops(), whole, 0, CPU)
    with pytest.raises(KeyboardInterrupt):
        train_stage(PLAN, fresh(), loss_that_stops(at=7), parts, 0, CPU)
    resumed = train_stage(PLAN, fresh(), loss_that_stops(), parts, 0, CPU)
    assert all(a.equal(b) for a, b in zip(expected.parameters(), resumed.parameters(), strict=True))
    states = [torch.load(folder / "toy.pt", weights_only=True)["model"] for folder in (whole, parts)]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])


def test_a_finished_stage_is_not_run_again(tmp_path):
    first = train_stage(PLAN, fresh(), loss_that_stops(), tmp_path, 0, CPU)
    again = train_stage(PLAN, fresh(), loss_that_stops(at=0), tmp_path, 0, CPU)
    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_the_learning_rate_rises_stays_and_falls():
    shares = [learning_rate_share(PLAN, step) for step in range(PLAN.steps)]
    assert shares[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert shares[3:8] == [1.0] * 5
    assert shares[-1] < shares[-2] < 1

"""The pieces of the loop, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sdlora.config import OptimizerSection
from sdlora.training import optim
from sdlora.training.optim import clip_gradients, make_optimizer, rate_factor, set_rate


def test_rate_rises_then_follows_the_schedule() -> None:
    section = OptimizerSection(warmup_steps=3, schedule="linear")
    factors = [rate_factor(section, step, 7) for step in range(7)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25])
    cosine = OptimizerSection(warmup_steps=0, schedule="cosine")
    assert rate_factor(cosine, 5, 10) == pytest.approx(0.5)
    assert rate_factor(cosine, 9, 10) == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))
    assert rate_factor(OptimizerSection(warmup_steps=0, schedule="constant"), 99, 100) == 1.0


def test_each_group_keeps_its_own_full_rate() -> None:
    section = OptimizerSection(kind="adamw", learning_rate=1e-3, text_encoder_learning_rate=1e-4)
    optimizer, note = make_optimizer(section, {"unet": [nn.Parameter(torch.zeros(2))], "text_encoder": [
        nn.Parameter(torch.zeros(2))]})  # fmt: skip
    set_rate(optimizer, 0.5)
    assert note == "" and [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-5]


def test_default_optimizer_keeps_its_state_in_8_bits() -> None:
    parameter = nn.Parameter(torch.ones(64, 128))
    optimizer, note = make_optimizer(OptimizerSection(), {"unet": [parameter]})
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert note == ""
    assert optimizer.state[parameter]["state1"].dtype == torch.uint8


def test_8bit_falls_back_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "why_no_8bit", lambda device: "no library for this device")
    optimizer, note = make_optimizer(OptimizerSection(), {"unet": [nn.Parameter(torch.zeros(2))]})
    assert type(optimizer) is torch.optim.AdamW
    assert "no library for this device" in note and "\n" not in note


def test_clip_returns_the_norm_before_and_zero_means_no_bound() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], 1.0) == pytest.approx(5.0)
    assert parameter.grad.norm() == pytest.approx(1.0, rel=1e-4)
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], 0.0) == pytest.approx(5.0)
    assert parameter.grad.tolist() == [3.0, 4.0]

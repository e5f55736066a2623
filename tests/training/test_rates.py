"""Spans, rates and schedules, against numbers worked out by hand and against diffusers' schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from sdlora.adapters.weights import TrainedWeight
from sdlora.config import OptimizerSection, TokensSection
from sdlora.errors import ConfigError
from sdlora.training.rates import full_rates, path_rates, rate_factor, spans


def weights(*names: str) -> list[TrainedWeight]:
    return [TrainedWeight(*name.split(":"), nn.Parameter(torch.zeros(2))) for name in names]


@pytest.mark.parametrize(
    ("train", "handover", "expected"),
    [
        ("none", 0.5, {"adapter": (0, 9)}),
        ("alone", 0.5, {"tokens": (0, 9)}),
        ("first", 0.3, {"tokens": (0, 3), "adapter": (3, 9)}),
        ("first", 0.0, {"adapter": (0, 9)}),
        ("first", 1.0, {"tokens": (0, 9)}),
        ("together", 0.3, {"tokens": (0, 3), "adapter": (0, 9)}),
        ("together", 0.0, {"adapter": (0, 9)}),
        ("together", 1.0, {"tokens": (0, 9), "adapter": (0, 9)}),
    ],
)
def test_words_and_adapter_train_in_their_spans(train, handover, expected):
    assert spans(TokensSection(train=train, handover=handover), 9) == expected


def test_each_component_has_its_rate():
    section = OptimizerSection(learning_rate=1e-3, text_encoder_learning_rate=1e-4)
    tokens = TokensSection(learning_rate=5e-3)
    all_four = weights("unet.a:up", "text_encoder.a:up", "text_encoder_2.a:up", "tokens.text_encoder.zorb:vectors")
    assert full_rates(section, tokens, all_four) == [1e-3, 1e-4, 1e-4, 5e-3]
    section = section.model_copy(update={"text_encoder_2_learning_rate": 2e-4})
    assert full_rates(section, tokens, all_four) == [1e-3, 1e-4, 2e-4, 5e-3]


def test_rates_are_known_before_there_are_weights():
    section = OptimizerSection(learning_rate=1e-3, lora_plus_ratio=4, learning_rates={"mid_block.*": 0.0})
    paths = ["unet.mid_block.to_q", "unet.up.to_q", "text_encoder.fc1", "tokens"]
    assert path_rates(section, TokensSection(learning_rate=5e-3), paths) == [0.0, 1e-3, 5e-5, 5e-3]
    with pytest.raises(ConfigError, match=r"'mid_block\.\*' matches no layer that is trained"):
        path_rates(section, TokensSection(), paths[1:])


def test_the_last_pattern_that_matches_a_layer_counts_from_a_dot_on():
    layers = weights(
        "unet.down_blocks.0.attn1.to_q:down",
        "unet.down_blocks.1.attn2.to_q:down",
        "unet.up_blocks.0.attn2.to_q:down",
        "text_encoder.text_model.encoder.q_proj:down",
        "tokens.text_encoder.zorb:vectors",
    )
    patterns = {"unet.down_blocks.*": 1.0, "attn2.to_*": 2.0, "up_blocks.0.*": 0.0, "text_encoder.*": 3.0}
    rates = full_rates(OptimizerSection(learning_rates=patterns), TokensSection(learning_rate=4.0), layers)
    assert rates == [1.0, 2.0, 0.0, 3.0, 4.0]


@pytest.mark.parametrize("pattern", ["ttn2.to_q", "attn2", "tokens.*"])
def test_a_pattern_that_matches_no_layer_is_refused(pattern):
    section = OptimizerSection(learning_rates={pattern: 1e-4})
    given = weights("unet.a.attn2.to_q:down", "tokens.text_encoder.zorb:vectors")
    with pytest.raises(ConfigError, match=r"learning_rates: .*matches no layer"):
        full_rates(section, TokensSection(), given)


def test_lora_plus_speeds_up_the_up_matrix_alone():
    section = OptimizerSection(learning_rate=1e-4, lora_plus_ratio=16, learning_rates={"b": 1e-5})
    given = weights("unet.a:down", "unet.a:up", "unet.a:magnitude", "unet.b:up", "unet.c:hada_w1_a")
    assert full_rates(section, TokensSection(), given) == pytest.approx([1e-4, 16e-4, 1e-4, 16e-5, 1e-4])


def test_rate_rises_then_follows_the_schedule():
    section = OptimizerSection(warmup_steps=3, schedule="linear")
    factors = [rate_factor(section, step, 7) for step in range(7)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25])
    assert rate_factor(OptimizerSection(warmup_steps=0, schedule="constant", final_share=0.3), 99, 100) == 1.0


def test_the_default_course_is_the_cosine_to_the_bit():
    section = OptimizerSection()
    for step in range(10, 100):
        assert rate_factor(section, step, 100) == 0.5 * (1 + math.cos(math.pi * ((step - 10) / 90)))


@pytest.mark.parametrize(
    ("schedule", "theirs", "options"),
    [
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        ("restarts", "cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", "polynomial", {"power": 2.0}),
    ],
)
def test_courses_are_those_of_diffusers(schedule, theirs, options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_scheduler(theirs, optimizer, num_warmup_steps=0, num_training_steps=60, **options).lr_lambdas[0]
    section = OptimizerSection(warmup_steps=0, schedule=schedule, cycles=3, power=2.0)
    ours = [rate_factor(section, step, 60) for step in range(60)]
    assert ours == pytest.approx([reference(step) for step in range(60)], abs=1e-6)
    assert ours[0] == 1.0 and len({round(value, 6) for value in ours}) >= 20


def test_restarts_begin_at_the_full_rate_again():
    section = OptimizerSection(warmup_steps=2, schedule="restarts", cycles=7)
    full = [step for step in range(72) if rate_factor(section, step, 72) == 1.0]
    assert full == [2, 12, 22, 32, 42, 52, 62]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "restarts", "polynomial"])
def test_a_share_of_the_rate_is_left_at_the_end(schedule):
    section = OptimizerSection(warmup_steps=0, schedule=schedule, final_share=0.2, cycles=2)
    factors = [rate_factor(section, step, 1000) for step in range(1000)]
    assert factors[0] == 1.0
    assert min(factors) == factors[-1] == pytest.approx(0.2, abs=2e-3)

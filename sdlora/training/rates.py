"""What learns when and how fast: spans of steps, each weight's full learning rate, and its course over the steps."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Sequence

from sdlora.adapters.weights import TrainedWeight
from sdlora.config import OptimizerSection, TokensSection
from sdlora.errors import ConfigError

TOKENS = "tokens"
ADAPTER = "adapter"
_SCALED_BY_LORA_PLUS = "up"

Span = tuple[int, int]
"""The first optimizer step in which something trains, and the first in which it no longer does."""


def spans(tokens: TokensSection, steps: int) -> dict[str, Span]:
    """Return when the new words ("tokens") and the adapter ("adapter") train; what never does is left out."""
    handover = round(tokens.handover * steps)
    wanted = {
        "none": {ADAPTER: (0, steps)},
        "alone": {TOKENS: (0, steps)},
        "first": {TOKENS: (0, handover), ADAPTER: (handover, steps)},
        "together": {TOKENS: (0, handover), ADAPTER: (0, steps)},
    }[tokens.train]
    return {part: (first, last) for part, (first, last) in wanted.items() if first < last}


def full_rates(section: OptimizerSection, tokens: TokensSection, weights: Sequence[TrainedWeight]) -> list[float]:
    """Return the learning rate of each weight before its course is applied; 0 where it is not to be trained.

    That of its path, times lora_plus_ratio for LoRA's up matrix (LoRA+, Hayou et al. 2024). Raises ConfigError as
    `path_rates` does.
    """
    rates = path_rates(section, tokens, [weight.path for weight in weights])
    ratio = section.lora_plus_ratio
    return [
        rate * (ratio if weight.role == _SCALED_BY_LORA_PLUS else 1.0)
        for rate, weight in zip(rates, weights, strict=True)
    ]


def path_rates(section: OptimizerSection, tokens: TokensSection, paths: Sequence[str]) -> list[float]:
    """Return the learning rate at each path, such as "unet.mid_block...to_q" or, of new words, "tokens".

    The component's rate, or that of the last pattern which matches the layer. New words are no layers: no pattern
    matches them. Raises ConfigError for a pattern that matches no layer.
    """
    components = {
        "unet": section.learning_rate,
        "text_encoder": section.text_encoder_learning_rate,
        "text_encoder_2": section.text_encoder_2_learning_rate or section.text_encoder_learning_rate,
        TOKENS: tokens.learning_rate,
    }
    parts = [path.partition(".")[0] for path in paths]
    rates = [components[part] for part in parts]
    for pattern, rate in section.learning_rates.items():
        expression = re.compile(rf"(?:.*\.)?{fnmatch.translate(pattern)}")
        found = [n for n, path in enumerate(paths) if parts[n] != TOKENS and expression.match(path)]
        if not found:
            raise ConfigError(
                f"optimizer.learning_rates: {pattern!r} matches no layer that is trained; name one with a pattern "
                "such as 'unet.up_blocks.*' or 'attn2.to_k'"
            )
        for number in found:
            rates[number] = rate
    return rates


def rate_factor(section: OptimizerSection, step: int, steps: int) -> float:
    """Return what the learning rate of optimizer step `step` (from 0) of a span of `steps` is multiplied with, 0 to 1.

    A function of the step alone, so that a resumed run needs no scheduler state.
    """
    if step < section.warmup_steps:
        return (step + 1) / (section.warmup_steps + 1)
    if section.schedule == "constant":
        return 1.0
    course = _course(section, step - section.warmup_steps, max(1, steps - section.warmup_steps))
    return section.final_share + (1 - section.final_share) * course


def _course(section: OptimizerSection, done: int, length: int) -> float:
    """Return the schedule's value, falling from 1 at `done` = 0 to 0 at `done` = `length`; restarts do so repeatedly."""
    progress = done / length
    if section.schedule == "linear":
        return 1 - progress
    if section.schedule == "polynomial":
        return (1 - progress) ** section.power
    if section.schedule == "restarts":
        progress = section.cycles * done % length / length
    return 0.5 * (1 + math.cos(math.pi * progress))

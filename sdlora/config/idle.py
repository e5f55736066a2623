"""Settings that change nothing unless others are set: which, and what would make them act."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdlora.config.section import setting_at
from sdlora.config.sections import AdapterSection, TokensSection, TrainConfig

_WITHOUT_LARGE_KERNELS = ("cross-attention", "attention", "transformer")


@dataclass(frozen=True)
class Idle:
    """Settings that change nothing unless `acts`; `needs` says what would make them act."""

    keys: tuple[str, ...]
    needs: str
    acts: Callable[[TrainConfig], bool]


def trains_adapter(config: TrainConfig) -> bool:
    """Return whether an adapter is trained, with new words or without."""
    return config.tokens.train != "alone"


def trains_tokens(config: TrainConfig) -> bool:
    """Return whether new words are trained, with an adapter or without."""
    return config.tokens.train != "none"


def _trains_encoder(name: str) -> Callable[[TrainConfig], bool]:
    return lambda config: config.adapter.text_encoder and name in config.adapter.text_encoder_parts


def _is(key: str, *values: Any) -> Callable[[TrainConfig], bool]:
    return lambda config: setting_at(config, key) in values


def _is_not(key: str, *values: Any) -> Callable[[TrainConfig], bool]:
    return lambda config: setting_at(config, key) not in values


def _may_meet_large_kernels(config: TrainConfig) -> bool:
    return any(target not in _WITHOUT_LARGE_KERNELS for target in config.adapter.targets)


_ADAPTER = tuple(f"adapter.{name}" for name in AdapterSection.model_fields)
_TOKENS = tuple(f"tokens.{name}" for name in TokensSection.model_fields if name != "train")
_ADAPTERS_RATES = (
    "optimizer.learning_rate",
    "optimizer.text_encoder_learning_rate",
    "optimizer.text_encoder_2_learning_rate",
    "optimizer.learning_rates",
    "optimizer.lora_plus_ratio",
    "optimizer.weight_decay",
)
IDLE = (
    Idle(
        (*_ADAPTER, *_ADAPTERS_RATES),
        'an adapter, and so tokens.train = "together" or "first"',
        trains_adapter,
    ),
    Idle(
        ("data.prior.folder", "data.prior.source"),
        'an adapter to hold back, and so tokens.train = "together" or "first"',
        trains_adapter,
    ),
    Idle(_TOKENS, 'new words, and so tokens.train = "together", "first" or "alone"', trains_tokens),
    Idle(
        ("adapter.rank", "adapter.alpha", "adapter.conv_rank", "adapter.conv_alpha", "adapter.ranks"),
        'adapter.kind = "lora", "loha" or "lokr"',
        _is_not("adapter.kind", "full"),
    ),
    Idle(
        ("adapter.rank_stabilized", "adapter.dora", "adapter.start", "adapter.dropout", "optimizer.lora_plus_ratio"),
        'adapter.kind = "lora"',
        _is("adapter.kind", "lora"),
    ),
    Idle(
        ("adapter.rank_dropout", "adapter.module_dropout"),
        'adapter.kind = "lora", "loha" or "lokr"',
        _is_not("adapter.kind", "full"),
    ),
    Idle(
        ("optimizer.weight_decay",),
        'an update that starts at zero (adapter.start = "zero"), as none decays to where PiSSA and OLoRA start',
        lambda config: config.adapter.kind != "lora" or config.adapter.start == "zero",
    ),
    Idle(("adapter.lokr_factor",), 'adapter.kind = "lokr"', _is("adapter.kind", "lokr")),
    Idle(
        ("adapter.conv_rank", "adapter.conv_alpha"),
        'a convolution among adapter.targets, such as "resnet"',
        _may_meet_large_kernels,
    ),
    Idle(
        ("adapter.text_encoder_parts", "adapter.text_encoder_targets"),
        "adapter.text_encoder = true",
        _is("adapter.text_encoder", True),
    ),
    Idle(
        ("optimizer.text_encoder_learning_rate",),
        "a text encoder that is trained at it (adapter.text_encoder = true)",
        lambda config: (
            _trains_encoder("text_encoder")(config)
            or (_trains_encoder("text_encoder_2")(config) and not config.optimizer.text_encoder_2_learning_rate)
        ),
    ),
    Idle(
        ("optimizer.text_encoder_2_learning_rate",),
        'adapter.text_encoder = true and "text_encoder_2" in adapter.text_encoder_parts',
        _trains_encoder("text_encoder_2"),
    ),
    Idle(("tokens.words",), 'tokens.start = "words"', _is("tokens.start", "words")),
    Idle(("tokens.handover",), 'tokens.train = "together" or "first"', _is("tokens.train", "first", "together")),
    Idle(("output.formats",), 'an adapter, and so tokens.train = "together" or "first"', trains_adapter),
    Idle(("tokens.save",), 'an adapter file, and so tokens.train = "together" or "first"', trains_adapter),
    Idle(("objective.huber_c", "objective.huber_schedule"), 'objective.loss = "huber"', _is("objective.loss", "huber")),
    Idle(("objective.min_snr_gamma",), 'objective.weighting = "min-snr"', _is("objective.weighting", "min-snr")),
    Idle(("objective.p2_gamma",), 'objective.weighting = "p2"', _is("objective.weighting", "p2")),
    Idle(
        ("objective.logit_mean", "objective.logit_std"),
        'objective.timesteps = "logit-normal"',
        _is("objective.timesteps", "logit-normal"),
    ),
    Idle(
        ("optimizer.betas",),
        'an optimizer with moments, such as optimizer.kind = "adamw8bit"',
        _is_not("optimizer.kind", "adafactor"),
    ),
    Idle(
        ("optimizer.epsilon",),
        'an optimizer that divides by it, such as optimizer.kind = "adamw8bit"',
        _is_not("optimizer.kind", "lion", "lion8bit", "adafactor"),
    ),
    Idle(("optimizer.cycles",), 'optimizer.schedule = "restarts"', _is("optimizer.schedule", "restarts")),
    Idle(("optimizer.power",), 'optimizer.schedule = "polynomial"', _is("optimizer.schedule", "polynomial")),
    Idle(
        ("optimizer.final_share",),
        'a schedule that falls, such as optimizer.schedule = "cosine"',
        _is_not("optimizer.schedule", "constant"),
    ),
)
"""Every setting that may be idle; one may stand in several rows, and acts where all of them do."""

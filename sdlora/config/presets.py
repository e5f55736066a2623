"""Starting points: values of settings that are not given, by what is to be learnt and by the optimizer that learns it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdlora.config.combinations import PRODIGY, SCHEDULE_FREE, Clash, clashes, shortest_span
from sdlora.config.section import is_file_stem, setting_at
from sdlora.config.sections import TrainConfig
from sdlora.errors import ConfigError

FAMILIES = ("sd1", "sd2", "sdxl")
FEWEST_STEPS = 200
"""A run whose length follows from its pictures has at least so many steps: fewer, at these rates, teach next to nothing."""

_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "subject": {
        "adapter.rank": 16,
        "adapter.alpha": 16.0,
        "adapter.targets": ("transformer",),
        "adapter.text_encoder": True,
        "optimizer.learning_rate": 1e-4,
        "optimizer.text_encoder_learning_rate": 5e-5,
        "objective.weighting": "min-snr",
        "training.steps_per_picture": 100,
        "training.batch_size": 1,
    },
    "character": {
        "adapter.rank": 32,
        "adapter.alpha": 16.0,
        "adapter.targets": ("transformer",),
        "adapter.text_encoder": True,
        "optimizer.learning_rate": 2e-4,
        "optimizer.text_encoder_learning_rate": 5e-5,
        "objective.weighting": "min-snr",
        "training.steps_per_picture": 80,
        "training.batch_size": 2,
    },
    "style": {
        "adapter.rank": 32,
        "adapter.alpha": 16.0,
        "adapter.conv_rank": 8,
        "adapter.conv_alpha": 4.0,
        "adapter.targets": ("transformer", "resnet"),
        "optimizer.learning_rate": 2e-4,
        "objective.weighting": "min-snr",
        "objective.noise_offset": 0.05,
        "training.steps_per_picture": 40,
        "training.batch_size": 2,
    },
    "fast": {
        "adapter.rank": 8,
        "adapter.alpha": 8.0,
        "adapter.targets": ("attention",),
        "optimizer.learning_rate": 5e-4,
        "objective.weighting": "min-snr",
        "training.steps_per_picture": 30,
        "training.batch_size": 1,
    },
}
"""Preset -> setting -> value. docs/training.md says why."""

_SDXL = {"adapter.text_encoder": False, "training.batch_size": 1, "training.gradient_checkpointing": True}
_OF_FAMILY: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("subject", "sdxl"): _SDXL,
    ("character", "sdxl"): _SDXL | {"optimizer.learning_rate": 1e-4, "training.accumulate_batches": 2},
    ("style", "sdxl"): _SDXL | {"optimizer.learning_rate": 1e-4, "training.accumulate_batches": 2},
    ("fast", "sdxl"): _SDXL | {"optimizer.learning_rate": 3e-4},
}
"""What a family has otherwise: SDXL's UNet takes the memory that its text encoders would need."""

_OF_CONVOLUTIONS = ("adapter.conv_rank", "adapter.conv_alpha")
_RATES = ("optimizer.learning_rate", "optimizer.text_encoder_learning_rate")
_FULL_SHARE = 0.05
"""Whole weights learn at a twentieth of LoRA's rate: 1e-5, within the 1e-6 to 1e-5 that is usual."""
_LION_SHARE = 0.2
"""Lion's steps have the size of the rate itself: rates 3 to 10 times smaller, decay larger by as much (Chen et al. 2023)."""


def with_preset(config: TrainConfig, family: str) -> TrainConfig:
    """Return the configuration with the preset's values for `family`, and the optimizer's own, where none is given.

    What is given always wins: a preset's value that makes no sense beside it is left out. Values that are filled
    in count as given afterwards, so the result stays the same when it is written, read and settled again.
    Raises ConfigError where what was given makes no sense with this family's values.
    """
    settled, problems = _settled(config, family)
    if problems:
        raise ConfigError("configuration: " + "; ".join(problem.sentence for problem in problems))
    return settled


def lasting_clashes(config: TrainConfig) -> list[Clash]:
    """Return what makes no sense in `config` whichever family its base is of."""
    return min((_settled(config, family)[1] for family in FAMILIES), key=len)


def with_steps(config: TrainConfig, batches: int, processes: int) -> TrainConfig:
    """Return the configuration with as many optimizer steps as go through `batches`, where none are given.

    Each step takes training.accumulate_batches on every process; at least FEWEST_STEPS are made. Raises
    ConfigError where that number does not go with other settings, such as the warm-up.
    """
    training = config.training
    if training.steps:
        return config
    steps = max(FEWEST_STEPS, -(-batches // (training.accumulate_batches * processes)))
    counted = _filled(config, {"training.steps": steps})
    if problems := clashes(counted):
        raise ConfigError("configuration: " + "; ".join(problem.sentence for problem in problems))
    return counted


def _settled(config: TrainConfig, family: str) -> tuple[TrainConfig, list[Clash]]:
    """Return the configuration with all values that it leaves open, and what is at odds among those given."""
    values = _open(config, {**_PRESETS[config.preset], **_OF_FAMILY.get((config.preset, family), {})})
    if "adapter.targets" not in values and "resnet" not in config.adapter.targets:
        # Other targets than the preset's; whether they hold convolutions only the base shows.
        values = {key: value for key, value in values.items() if key not in _OF_CONVOLUTIONS}
    values |= _open(config, _following(_filled(config, values)))
    while True:
        settled = _filled(config, values)
        problems = clashes(settled)
        yielding = values.keys() & {problem.key for problem in problems}
        if not yielding:
            return settled, problems
        values = {key: value for key, value in values.items() if key not in yielding}


def _open(config: TrainConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those values whose settings are not given."""
    pairs = ((key, key.split("."), value) for key, value in values.items())
    return {key: value for key, (table, name), value in pairs if name not in getattr(config, table).model_fields_set}


def _filled(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration with these values."""
    tables: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        table, name = key.split(".")
        tables.setdefault(table, {})[name] = value
    parts = {table: getattr(config, table).model_copy(update=changes) for table, changes in tables.items()}
    return config.model_copy(update=parts)


def _following(config: TrainConfig) -> dict[str, Any]:
    """Return what other settings ask for.

    Of words alone that the first one's file is called so, as programs go by that; of tokens.words that the new words
    start from them; of a short run a short warm-up.
    """
    triggers = [concept.trigger for concept in config.data.concepts or (config.data,)]
    first = next(filter(None, triggers), "")
    alone = config.tokens.train == "alone" and is_file_stem(first)
    values = _of_kinds(config) | ({"output.name": first} if alone else {})
    if config.tokens.words:
        values["tokens.start"] = "words"
    if 0 < (span := shortest_span(config)) < config.optimizer.warmup_steps:
        values["optimizer.warmup_steps"] = span // 2
    return values


def _of_kinds(config: TrainConfig) -> dict[str, Any]:
    """Return what the kinds of adapter and of optimizer ask of other settings."""
    kind = config.optimizer.kind
    if kind == PRODIGY:
        return dict.fromkeys((*_RATES, "tokens.learning_rate"), 1.0)
    shares = dict.fromkeys(_RATES, _FULL_SHARE if config.adapter.kind == "full" else 1.0) | {
        "tokens.learning_rate": 1.0
    }
    if kind in ("lion", "lion8bit"):
        shares = {key: share * _LION_SHARE for key, share in shares.items()} | {
            "optimizer.weight_decay": 1 / _LION_SHARE
        }
    values: dict[str, Any] = {
        key: float(f"{setting_at(config, key) * share:.3g}") for key, share in shares.items() if share != 1
    }
    if kind == SCHEDULE_FREE:
        values["optimizer.schedule"] = "constant"
    return values

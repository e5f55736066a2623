"""Which settings of a run make sense together, and for those that do not: why, and what is nearest.

Only what the settings alone show is decided here. What depends on the base (whether a pattern of layers matches,
what it predicts, how long its schedule is) is refused when the base is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdlora.config.data import ConceptSection
from sdlora.config.idle import IDLE, trains_adapter, trains_tokens
from sdlora.config.section import setting_at
from sdlora.config.sections import TARGET_PRESETS, AdapterSection, Quantization, TrainConfig

_DEFAULTS = TrainConfig()
SCHEDULE_FREE, PRODIGY = "schedule-free", "prodigy"
_SMALLEST_PRODIGY_FACTOR = 0.1
_WITHOUT_KINDS: Mapping[str, tuple[str, ...]] = {"diffusers": ("loha", "lokr", "full"), "peft": ("lokr", "full")}
"""Format -> kinds of adapter that have no place in it (docs/formats.md)."""
_RESERVED_ARGUMENTS = {
    "params": "the trained weights are given anyway",
    "lr": "set optimizer.learning_rate",
}


@dataclass(frozen=True)
class Clash:
    """Settings that make no sense together: the one that should give way, and a sentence with the reason and a way out."""

    key: str
    sentence: str


def clashes(config: TrainConfig) -> list[Clash]:
    """Return every combination of settings that makes no sense, at most one for each setting that should give way.

    A setting that cannot act counts only where it is not at its default, so that a saved configuration, which
    names every setting, is as sound as the one it came from.
    """
    found: dict[str, Clash] = {}
    for rule in (_idle, _adapter, _tokens, _objective, _optimizer, _arguments, _training, _output):
        for clash in rule(config):
            found.setdefault(clash.key, clash)
    return list(found.values())


def _idle(config: TrainConfig) -> Iterator[Clash]:
    for rule in IDLE:
        if rule.acts(config):
            continue
        for key in rule.keys:
            if (value := setting_at(config, key)) != setting_at(_DEFAULTS, key):
                yield Clash(key, f"{key} is {_shown(value)}, which needs {rule.needs}; set that, or remove {key}")


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:60]


def _adapter(config: TrainConfig) -> Iterator[Clash]:
    adapter = config.adapter
    if not trains_adapter(config):
        return
    if not adapter.targets:
        known = ", ".join(TARGET_PRESETS)
        yield Clash("adapter.targets", f"adapter.targets is empty; set it to any of {known}, or to module patterns")
    for name in ("text_encoder_parts", "text_encoder_targets"):
        if adapter.text_encoder and not getattr(adapter, name):
            yield Clash(
                f"adapter.{name}",
                f"adapter.{name} is empty, and adapter.text_encoder is true; set adapter.text_encoder to false",
            )
    yield from adapter_clashes(adapter, config.base.quantize)
    if adapter.max_norm and config.optimizer.kind == SCHEDULE_FREE:
        yield Clash(
            "adapter.max_norm",
            f'adapter.max_norm is {adapter.max_norm}, and optimizer.kind is "{SCHEDULE_FREE}", which saves an average '
            'that no bound holds for; remove adapter.max_norm, or set optimizer.kind = "adamw8bit"',
        )


def adapter_clashes(adapter: AdapterSection, quantize: Quantization) -> Iterator[Clash]:
    """Yield what of an adapter does not go together, or not with base weights in that form."""
    if adapter.kind in ("loha", "lokr") and quantize == "nf4":
        yield Clash(
            "adapter.kind",
            f"adapter.kind is {_shown(adapter.kind)}, which cannot be added to the packed weights of base.quantize = "
            '"nf4"; set base.quantize = "int8", or adapter.kind = "lora"',
        )
    if adapter.dora:
        yield from _dora(adapter, quantize)
    if adapter.start != "zero" and adapter.kind == "lora":
        yield from _start(adapter, quantize)


def _dora(adapter: AdapterSection, quantize: Quantization) -> Iterator[Clash]:
    """Yield what does not go with rows that have a length of their own."""
    if quantize == "int8":
        yield Clash(
            "adapter.dora",
            'adapter.dora is true, and its rows\' lengths cannot be taken from base.quantize = "int8"; '
            'set base.quantize = "nf4", or adapter.dora to false',
        )
    for name in ("rank_dropout", "module_dropout"):
        if share := getattr(adapter, name):
            yield Clash(
                f"adapter.{name}",
                f"adapter.{name} is {share}, and adapter.dora, whose rows' lengths are of the whole update, "
                f"has none; remove adapter.{name}, or set adapter.dropout",
            )
    if adapter.max_norm:
        yield Clash(
            "adapter.max_norm",
            f"adapter.max_norm is {adapter.max_norm}, and adapter.dora keeps rows at lengths of its own; "
            "remove adapter.max_norm",
        )


def _start(adapter: AdapterSection, quantize: Quantization) -> Iterator[Clash]:
    """Yield what does not go with a LoRA that starts as a part of the weight."""
    start = f"adapter.start is {_shown(adapter.start)}"
    if adapter.dora:
        yield Clash("adapter.start", f'{start}, and adapter.dora starts from zero; set adapter.start = "zero"')
    if quantize != "none":
        yield Clash(
            "adapter.start",
            f"{start}, which is taken from the exact weights, and base.quantize rounds them; "
            'set base.quantize = "none", or adapter.start = "zero"',
        )
    if adapter.max_norm:
        yield Clash(
            "adapter.max_norm",
            f"adapter.max_norm is {adapter.max_norm}, and {start}: scaling the factors would not scale the change; "
            'remove adapter.max_norm, or set adapter.start = "zero"',
        )


def _concepts(config: TrainConfig) -> Mapping[str, ConceptSection]:
    """Return every concept by the name of its table."""
    several = {f"data.concepts.{number}": concept for number, concept in enumerate(config.data.concepts)}
    return several or {"data": config.data}


def _tokens(config: TrainConfig) -> Iterator[Clash]:
    tokens = config.tokens
    if not trains_tokens(config):
        return
    named = {where: concept for where, concept in _concepts(config).items() if concept.trigger.strip()}
    train = f"tokens.train is {_shown(tokens.train)}"
    if not named:
        yield Clash("tokens.train", f"{train}, and no trigger is given that becomes a new word; set data.trigger")
    for where, concept in named.items():
        for name in ("dropout", "dropout_every_epochs"):
            if getattr(concept.captions, name) == 1:
                key = f"{where}.captions.{name}"
                yield Clash(
                    key, f"{key} is 1, and {train}, whose new word pictures without captions never hold; remove {key}"
                )
        if tokens.start == "class" and not concept.class_prompt.strip():
            yield Clash(
                "tokens.start",
                f'tokens.start is "class", and {where}.class_prompt is not given; set it, or tokens.start = "trigger"',
            )
    if tokens.start == "words" and not tokens.words.strip():
        yield Clash(
            "tokens.start",
            'tokens.start is "words", and tokens.words is empty; set it to a text such as "small animal"',
        )
    yield from _handover(config)


def _handover(config: TrainConfig) -> Iterator[Clash]:
    """Yield what leaves the new words, or the adapter after them, without a step."""
    tokens, steps = config.tokens, config.training.steps
    if tokens.train not in ("first", "together"):
        return
    last = round(tokens.handover * steps) if steps else tokens.handover
    shown = f"tokens.handover is {tokens.handover}" + (f" of training.steps = {steps}" if steps else "")
    if not last:
        yield Clash(
            "tokens.handover",
            f'{shown}, which leaves the new words no step; raise it, or set tokens.train = "none"',
        )
    if tokens.train == "first" and last == (steps or 1):
        yield Clash(
            "tokens.handover",
            f'{shown}, which leaves the adapter no step; lower it, or set tokens.train = "alone"',
        )


def _objective(config: TrainConfig) -> Iterator[Clash]:
    objective = config.objective
    if objective.timesteps == "snr" and objective.weighting == "none":
        yield Clash(
            "objective.timesteps",
            'objective.timesteps is "snr", which draws in proportion to the weights, and objective.weighting is "none"; '
            'set objective.timesteps = "uniform", or objective.weighting = "min-snr"',
        )
    if objective.max_timestep and objective.min_timestep >= objective.max_timestep:
        yield Clash(
            "objective.min_timestep",
            f"objective.min_timestep is {objective.min_timestep}, and max_timestep = {objective.max_timestep} is the "
            "first that is no longer trained; lower objective.min_timestep",
        )
    if objective.antithetic and _largest_batch(config) == 1:
        yield Clash(
            "objective.antithetic",
            "objective.antithetic is true, and a batch of one picture has no pairs; set training.batch_size to 2 or more",
        )
    if objective.zero_terminal_snr and config.base.prediction == "epsilon":
        yield Clash(
            "objective.zero_terminal_snr",
            'objective.zero_terminal_snr is true, and base.prediction is "epsilon", which says nothing about pure noise; '
            "set objective.zero_terminal_snr to false, or take a base that predicts v",
        )


def _optimizer(config: TrainConfig) -> Iterator[Clash]:
    optimizer, steps = config.optimizer, config.training.steps
    kind = f'optimizer.kind is "{optimizer.kind}"'
    if optimizer.kind == SCHEDULE_FREE and optimizer.schedule != "constant":
        yield Clash(
            "optimizer.schedule",
            f"optimizer.schedule is {_shown(optimizer.schedule)}, and {kind}, which averages instead; "
            'set optimizer.schedule = "constant"',
        )
    if optimizer.kind == SCHEDULE_FREE and config.training.ema_decay:
        yield Clash(
            "training.ema_decay",
            f"training.ema_decay is {config.training.ema_decay}, and {kind}, which is an average already; "
            "set training.ema_decay to 0",
        )
    if optimizer.kind == PRODIGY:
        yield from _prodigy(config)
    shortest = shortest_span(config)
    if steps and optimizer.warmup_steps > shortest:
        spans = f"training.steps = {steps}"
        if shortest < steps:
            spans = f"the {shortest} steps that tokens.handover = {config.tokens.handover} leaves of {spans}"
        yield Clash(
            "optimizer.warmup_steps",
            f"optimizer.warmup_steps is {optimizer.warmup_steps}, more than {spans}; lower optimizer.warmup_steps",
        )


def shortest_span(config: TrainConfig) -> int:
    """Return for how many steps that trains which trains the shortest; 0 where the number of steps is open."""
    steps, last = config.training.steps, round(config.tokens.handover * config.training.steps)
    return {"first": min(last, steps - last), "together": last}.get(config.tokens.train, steps)


def _prodigy(config: TrainConfig) -> Iterator[Clash]:
    """Yield the rates of another optimizer: Prodigy finds the size of its steps, a rate is a factor of that, near 1."""
    optimizer = config.optimizer
    rates = {}
    if trains_adapter(config):
        rates["optimizer.learning_rate"] = optimizer.learning_rate
    if trains_adapter(config) and config.adapter.text_encoder:
        rates["optimizer.text_encoder_learning_rate"] = optimizer.text_encoder_learning_rate
        rates["optimizer.text_encoder_2_learning_rate"] = optimizer.text_encoder_2_learning_rate
    if trains_tokens(config):
        rates["tokens.learning_rate"] = config.tokens.learning_rate
    rates |= {f"optimizer.learning_rates.{pattern}": rate for pattern, rate in optimizer.learning_rates.items()}
    for key, rate in rates.items():
        if 0 < rate < _SMALLEST_PRODIGY_FACTOR:
            yield Clash(
                key,
                f'{key} is {rate}, and optimizer.kind is "prodigy", which finds the size of steps itself and takes '
                f"this as a factor; set {key} to 1",
            )
    if optimizer.lora_plus_ratio != 1:
        yield Clash(
            "optimizer.lora_plus_ratio",
            f'optimizer.lora_plus_ratio is {optimizer.lora_plus_ratio}, and optimizer.kind is "prodigy", which finds '
            'the size of up\'s steps itself; set it to 1, or optimizer.kind = "adamw8bit"',
        )


def _arguments(config: TrainConfig) -> Iterator[Clash]:
    for name, value in config.optimizer.arguments.items():
        key = f"optimizer.arguments.{name}"
        if name in _RESERVED_ARGUMENTS:
            yield Clash(key, f"{key} is set; remove it: {_RESERVED_ARGUMENTS[name]}")
        elif not _storable(value):
            yield Clash(
                key, f"{key} is {_shown(value)}, which a TOML file cannot hold; set it to text, a number, or remove it"
            )


def _storable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _storable(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(_storable(inner) for inner in value)
    return isinstance(value, bool | int | float | str)


def _largest_batch(config: TrainConfig) -> int:
    return max(concept.batch_size or config.training.batch_size for concept in _concepts(config).values())


def _training(config: TrainConfig) -> Iterator[Clash]:
    largest = _largest_batch(config)
    if config.training.micro_batch > largest:
        yield Clash(
            "training.micro_batch",
            f"training.micro_batch is {config.training.micro_batch}, and a batch has {largest}; "
            "lower it, or raise training.batch_size",
        )


def _output(config: TrainConfig) -> Iterator[Clash]:
    """Yield what would only be found out when the adapter is written."""
    formats, kind = config.output.formats, config.adapter.kind
    key = "output.formats"
    if not formats:
        yield Clash(key, f'{key} is empty; set it to any of "kohya", "diffusers", "peft"')
    if twice := [name for name in formats if formats.count(name) > 1]:
        yield Clash(key, f"{key} names {_shown(twice[0])} twice; remove one")
    for name in formats if trains_adapter(config) else ():
        if kind in _WITHOUT_KINDS.get(name, ()):
            yield Clash(
                key,
                f"{key} has {_shown(name)}, which does not hold adapter.kind = {_shown(kind)}; remove it, as "
                'kohya\'s format holds all, or set adapter.kind = "lora"',
            )
        if name != "kohya" and trains_tokens(config) and config.tokens.save == "bundled":
            yield Clash(
                key,
                f'{key} has {_shown(name)}, and tokens.save is "bundled", which kohya\'s format alone can be; '
                'remove it, or set tokens.save = "beside"',
            )
    if config.output.metadata == "none" and config.objective.zero_terminal_snr:
        yield Clash(
            "output.metadata",
            'output.metadata is "none", and objective.zero_terminal_snr is true, which pictures are made by where the '
            'file says so; set output.metadata = "minimal"',
        )

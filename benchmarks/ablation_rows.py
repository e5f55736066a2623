"""The rows of the ablation: the demo's settings with one thing changed, and candidates for defaults.

Everything that a row compares with is written out here, so that a new default or another example
changes no row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdlora import TrainConfig, load_config, parse_config
from sdlora.assets import EXAMPLE_CONCEPT
from sdlora.config import put_setting

Settings = Mapping[str, Any]
"""Values by dotted name; None: not given, so that the program's own default or the preset holds."""

RATE = "optimizer.learning_rate"
_TEXT_RATE, _TOKEN_RATE = "optimizer.text_encoder_learning_rate", "tokens.learning_rate"
_EXAMPLE = Path(__file__).parents[1] / "train" / "example.toml"
_FOLDERS = ("data.folder", "data.prior.folder", "validation.folder")

CONCEPT: Settings = {
    "base.path": "tiny",
    "data.folder": "train",
    "data.trigger": "zorblin",
    "validation.folder": "held-out",
}
FIRST_DEFAULTS: Settings = {
    **CONCEPT,
    "adapter.rank": 16,
    "adapter.alpha": 16.0,
    "adapter.targets": ("attention",),
    "optimizer.kind": "adamw8bit",
    RATE: 2e-4,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 10,
    "objective.weighting": "min-snr",
    "objective.min_snr_gamma": 5.0,
    "training.batch_size": 1,
}
"""What a run did in the first version where nothing was set."""
ALL_LAYERS = ("transformer", "conv1", "conv2")
DEMO: Settings = {
    **FIRST_DEFAULTS,
    "data.prior.folder": "others",
    "data.prior.weight": 5.0,
    "adapter.rank": 3,
    "adapter.alpha": 3.0,
    "adapter.targets": ALL_LAYERS,
    RATE: 4e-3,
    "training.batch_size": 8,
}
"""The settings of the first version's demo, steps aside."""
REFERENCE = "lora"


@dataclass(frozen=True)
class Sweep:
    """Values of one setting; the one with the lowest held-out loss is taken for all seeds."""

    key: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One line of a table. `settings` holds the differences from `start`."""

    name: str
    group: str
    settings: Settings = field(default_factory=dict)
    start: Settings = field(default_factory=lambda: DEMO)
    sweep: Sweep | None = None
    swept_as: str = ""
    """Name of the row whose swept value holds here too."""
    against: tuple[str, ...] = (REFERENCE,)
    """Names of the rows it is compared with."""


def _rates(*values: float) -> Sweep:
    return Sweep(RATE, values)


_USUAL = _rates(4e-3, 8e-3, 1.6e-2)

# What the settings of LoRA do not mean anything for.
_NO_ADAPTER: Settings = {"adapter.rank": None, "adapter.alpha": None}
_DESCRIPTION = "blue creature with orange horn and yellow belt and one eye"
"""The concept in words that the base knows; a zigzag it does not."""
_NO_PRIOR: Settings = {"data.prior.folder": None, "data.prior.weight": None}
_NO_UNET: Settings = {**_NO_ADAPTER, "adapter.targets": None, RATE: None}


def _grid() -> Iterator[Row]:
    """Yield rank x target layers x base precision; the rate is swept in fp32.

    Only linear layers of attention blocks are quantised, all of them whatever is trained.
    """
    group = "Rank, target layers and base precision"
    layers = {"cross-attention": ("cross-attention",), "attention": ("attention",), "all": ALL_LAYERS}
    ranks = (1, 4, 16)
    for name, targets in layers.items():
        for rank in ranks:
            own = {"adapter.rank": rank, "adapter.alpha": float(rank), "adapter.targets": targets}
            full = f"rank {rank}, {name}, fp32"
            smaller_rank = [f"rank {other}, {name}, fp32" for other in ranks if other * 4 == rank]
            fewer_layers = [f"rank {rank}, attention, fp32"] if name != "attention" else []
            yield Row(full, group, own, sweep=_USUAL, against=(*smaller_rank, *fewer_layers))
            for form in ("int8", "nf4") if name != "cross-attention" else ():
                quantized = {**own, "base.quantize": form}
                yield Row(f"rank {rank}, {name}, {form}", group, quantized, swept_as=full, against=(full,))


def _kinds() -> Iterator[Row]:
    group = "Kinds of adapter"
    yield Row(REFERENCE, group, sweep=_USUAL, against=())
    linear = {"adapter.targets": ("transformer",)}
    yield Row("lora, linear layers alone", group, linear, sweep=_USUAL)
    yield Row("locon, rank 1 on convolutions", group, {"adapter.conv_rank": 1}, sweep=_USUAL)
    yield Row("dora", group, {"adapter.dora": True}, sweep=_USUAL)
    yield Row("loha", group, {"adapter.kind": "loha"}, sweep=_rates(4e-3, 8e-3, 1.6e-2))
    yield Row("lokr", group, {"adapter.kind": "lokr"}, sweep=_rates(4e-3, 8e-3, 1.6e-2))
    yield Row("pissa", group, {"adapter.start": "pissa"}, sweep=_rates(5e-4, 1e-3, 2e-3))
    yield Row("olora", group, {"adapter.start": "olora"}, sweep=_rates(5e-4, 1e-3, 2e-3))
    yield Row("full fine-tune", group, {**_NO_ADAPTER, "adapter.kind": "full"}, sweep=_rates(1e-4, 3e-4, 1e-3))
    yield Row("dropout 0.1", group, {"adapter.dropout": 0.1}, swept_as=REFERENCE)


def _scales() -> Iterator[Row]:
    """Yield rsLoRA's own claim: alpha and the learning rate stay while the rank grows."""
    group = "rsLoRA: rank grows, alpha 4 and the learning rate stay"
    for rank in (2, 16):
        own = {"adapter.rank": rank, "adapter.alpha": 4.0}
        yield Row(f"lora, rank {rank}", group, own, against=("lora, rank 2",) if rank > 2 else ())
        stable = {**own, "adapter.rank_stabilized": True}
        yield Row(f"rslora, rank {rank}", group, stable, against=(f"lora, rank {rank}",))


def _objectives() -> Iterator[Row]:
    changes: dict[str, Settings] = {
        "min-snr off": {"objective.weighting": "none"},
        "min-snr, gamma 1": {"objective.min_snr_gamma": 1.0},
        "debiased": {"objective.weighting": "debiased"},
        "p2": {"objective.weighting": "p2"},
        "huber": {"objective.loss": "huber"},
        "huber, constant": {"objective.loss": "huber", "objective.huber_schedule": "constant"},
        "l1": {"objective.loss": "l1"},
        "noise offset 0.05": {"objective.noise_offset": 0.05},
        "pyramid noise 0.3": {"objective.pyramid_discount": 0.3},
        "input perturbation 0.1": {"objective.input_perturbation": 0.1},
        "logit-normal timesteps": {"objective.timesteps": "logit-normal"},
        "timesteps drawn by min-snr": {"objective.timesteps": "snr"},
        "antithetic noise": {"objective.antithetic": True},
    }
    for name, settings in changes.items():
        yield Row(name, "Objective", settings, swept_as=REFERENCE)


def _parts() -> Iterator[Row]:
    group = "What is trained"
    encoder = {"adapter.text_encoder": True}
    yield Row("text encoder too", group, encoder, sweep=Sweep(_TEXT_RATE, (1e-4, 1e-3, 4e-3)), swept_as=REFERENCE)
    words = Sweep(_TOKEN_RATE, (1e-3, 5e-3, 2e-2))
    alone = {**_NO_UNET, **_NO_PRIOR, "tokens.train": "alone"}
    yield Row("words alone", group, alone, sweep=Sweep(_TOKEN_RATE, (5e-3, 2e-2, 8e-2)))
    together = {"tokens.train": "together"}
    yield Row("pivotal, words and lora together", group, together, sweep=words, swept_as=REFERENCE)
    described = {"tokens.start": "words", "tokens.words": _DESCRIPTION}
    both = {**together, **described}
    yield Row("pivotal, from a description", group, both, sweep=words, swept_as=REFERENCE)
    yield Row("words alone, from a description", group, {**alone, **described}, sweep=words)
    always = {"tokens.train": "together", "tokens.handover": 1.0}
    yield Row("pivotal, together to the end", group, always, sweep=words, swept_as=REFERENCE)
    first = {"tokens.train": "first", "tokens.handover": 0.3}
    yield Row("pivotal, words first (0.3)", group, first, sweep=words, swept_as=REFERENCE)


def _priors() -> Iterator[Row]:
    group = "Prior preservation"
    yield Row("no prior", group, _NO_PRIOR, swept_as=REFERENCE)
    trained = {
        **_NO_PRIOR,
        "data.prior.source": "training",
        "data.class_prompt": "a creature",
        "data.prior.weight": 1.0,
    }
    yield Row("class prompt held to the base", group, trained, swept_as=REFERENCE)
    drawn = {"data.prior.target": "picture"}
    yield Row("prior pictures learnt, as in DreamBooth", group, drawn, swept_as=REFERENCE)


def _optimizers() -> Iterator[Row]:
    group = "Optimizers"

    def kind(name: str, sweep: Sweep, **more: object) -> Row:
        settings = {f"optimizer.{key}": value for key, value in more.items()}
        return Row(name, group, {"optimizer.kind": name, **settings}, sweep=sweep)

    yield kind("adamw", _USUAL)
    yield kind("paged-adamw8bit", _USUAL)
    yield kind("lion", _rates(2e-4, 5e-4, 1.5e-3))
    yield kind("adafactor", _USUAL)
    yield kind("prodigy", _rates(0.5, 1.0, 2.0))
    yield kind("schedule-free", _rates(4e-3, 8e-3, 1.6e-2), schedule="constant")
    for ratio in (4, 16):
        plus = {"optimizer.lora_plus_ratio": float(ratio)}
        yield Row(f"lora+, ratio {ratio}", group, plus, sweep=_rates(1e-3, 2e-3, 4e-3))
    constant = {"optimizer.schedule": "constant"}
    yield Row("constant rate", group, constant, sweep=_USUAL)
    averaged = {"training.ema_decay": 0.98}
    yield Row("ema 0.98", group, averaged, swept_as=REFERENCE)
    both = {**constant, **averaged}
    yield Row("ema 0.98, constant rate", group, both, swept_as="constant rate", against=(REFERENCE, "constant rate"))


ROWS = (*_kinds(), *_grid(), *_scales(), *_objectives(), *_parts(), *_priors(), *_optimizers())
"""The rows of docs/ablation.md."""


def _times() -> Iterator[Row]:
    """Yield the rows of time-to-concept; each brings its own number of steps."""
    group = "Time to concept"

    def row(name: str, settings: Settings, start: Settings = CONCEPT) -> Row:
        return Row(name, group, settings, start, against=(FIRST,))

    yield Row(FIRST, group, {"training.steps": 1000}, FIRST_DEFAULTS, against=())
    yield row("first demo", {"training.steps": 445}, DEMO)
    yield row("train/example.toml", {}, _example())
    yield row("today's defaults", {})
    for preset in ("subject", "character", "fast"):
        yield row(f"preset {preset}", {"preset": preset})
    everything = {**FIRST_DEFAULTS, "adapter.targets": ALL_LAYERS, "training.batch_size": 4, "training.steps": 300}
    for rate in (1e-3, 4e-3):
        yield row(f"all layers, batch 4, rate {rate:g}, no prior", {RATE: rate}, everything)
    shares = {"adapter.rank": 16, "adapter.alpha": 16.0, "training.batch_size": 6, "training.steps": 200}
    for ratio, weight in ((0.3, 3.0), (0.3, 5.0), (0.5, 3.0)):
        own = {**shares, "data.prior.ratio": ratio, "data.prior.weight": weight}
        yield row(f"rank 16, batch 6, prior ratio {ratio:g}, weight {weight:g}", own, DEMO)


def _example() -> Settings:
    """Return the settings of train/example.toml as they are now, folders aside."""

    def flat(table: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
        for key, value in table.items():
            if isinstance(value, dict):
                yield from flat(value, f"{before}{key}.")
            else:
                yield f"{before}{key}", value

    values = dict(flat(load_config(_EXAMPLE), ""))
    for key in _FOLDERS:
        if key in values:
            values[key] = Path(values[key]).name
    return {key: value for key, value in values.items() if not key.startswith(("samples.", "output."))}


FIRST = "first defaults"
TIME_ROWS = tuple(_times())


def settings_of(row: Row, more: Settings | None = None) -> dict[str, Any]:
    """Return all settings of a row that are given, and `more`."""
    given = {**row.start, **row.settings, **(more or {})}
    return {key: value for key, value in given.items() if value is not None}


def config_of(settings: Settings) -> TrainConfig:
    """Return the checked configuration of such settings; folders are those of the example concept. Raises ConfigError."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        put_setting(values, key, str(EXAMPLE_CONCEPT / value) if key in _FOLDERS else value)
    return parse_config(values, "row of the ablation")

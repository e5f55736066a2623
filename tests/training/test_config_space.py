"""Any combination of settings is refused before the run, with a sentence and a way out, or it trains."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from every_family import SHAPES
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as checked
from hypothesis import strategies as st
from PIL import Image

from sdlora import TrainConfig, parse_config, read_adapter, train
from sdlora.adapters.verify import difference
from sdlora.config import OPTIMIZERS, put_setting, require_complete, with_preset
from sdlora.config.presets import FAMILIES, lasting_clashes
from sdlora.errors import ConfigError, DataError

SECTIONS = ("adapter", "tokens", "objective", "optimizer", "training")
NOT_DRAWN = {
    "training.steps": "two suffice, and none means hundreds",
    "training.steps_per_picture": "acts where there are no steps",
    "training.resume": "needs an earlier run",
}
CHOSEN: dict[str, tuple[Any, ...]] = {
    "base.quantize": ("int8", "nf4"),
    "base.prediction": ("epsilon", "v"),
    "data.folder": ("named", "masked", "partly named", "unnamed"),
    "data.trigger": ("", "zorb", "zorb cat"),
    "data.class_prompt": ("", "a cat", "a [trigger] cat"),
    "data.batch_size": (1, 2),
    "data.repeats": (1, 3),
    "data.weight": (0, 0.5),
    "data.flip": (False, True),
    "data.crops": (1, 2),
    "data.held_out": (0, 0.3),
    "data.captions.insert_trigger": (False, True),
    "data.captions.dropout": (0, 0.5, 1),
    "data.captions.dropout_every_epochs": (0, 1, 2),
    "data.captions.shuffle": (False, True),
    "data.captions.tag_dropout": (0, 1),
    "data.captions.suffix": ("", "in a garden " * 30),
    "data.buckets.short_batches": ("keep", "fill", "drop"),
    "data.masks.source": ("auto", "none", "alpha"),
    "data.masks.unmasked_weight": (0, 0.1, 1),
    "data.masks.hold_weight": (0, 1),
    "data.prior.source": ("folder", "training", "generated"),
    "data.prior.folder": ("", "others"),
    "data.prior.target": ("base", "picture"),
    "data.prior.weight": (0, 1),
    "data.prior.ratio": (0, 0.5, 2),
    "adapter.rank": (1, 3, 200),
    "adapter.alpha": (0.01, 4, 64),
    "adapter.conv_rank": (0, 1, 5),
    "adapter.conv_alpha": (0, 0.5, 8),
    "adapter.ranks": ({}, {"attn*.to_q": 1}, {"to_*": 2, "attn2.to_k": 7}),
    "adapter.targets": (
        ["cross-attention"],
        ["transformer"],
        ["transformer", "resnet"],
        ["attn*.to_q", "attn2.to_k", "conv1"],
        ["to_*", "conv_in", "conv_out", "time_emb_proj"],
        [],
    ),
    "adapter.text_encoder_parts": (["text_encoder"], ["text_encoder", "text_encoder_2"], []),
    "adapter.text_encoder_targets": (["attention"], ["transformer"], ["q_proj"], []),
    "adapter.lokr_factor": (0, 1, 2, 7),
    "adapter.dropout": (0, 0.5, 0.99),
    "adapter.rank_dropout": (0, 0.5, 0.99),
    "adapter.module_dropout": (0, 0.5, 0.99),
    "adapter.max_norm": (0, 1e-3, 10),
    "tokens.vectors": (0, 1, 3, 75),
    "tokens.words": ("", "small animal", "  "),
    "tokens.learning_rate": (1e-4, 0.1, 1),
    "tokens.handover": (0, 0.25, 0.5, 1),
    "optimizer.kind": (*OPTIMIZERS, "torch.optim.RAdam", "torch.optim.SGD"),
    "optimizer.arguments": ({}, {"lr": 1}, {"nothing": None}),
    "optimizer.learning_rate": (1e-6, 1e-3, 0.1, 1),
    "optimizer.text_encoder_learning_rate": (1e-6, 1e-3, 1),
    "optimizer.text_encoder_2_learning_rate": (0, 1e-3, 1),
    "optimizer.learning_rates": ({}, {"attn*.to_q": 1e-2, "attn2.*": 0}),
    "optimizer.lora_plus_ratio": (1, 4, 1000),
    "optimizer.betas": ([0, 0], [0.9, 0.999]),
    "optimizer.weight_decay": (0, 0.1, 10),
    "optimizer.epsilon": (1e-12, 1),
    "optimizer.clip_norm": (0, 1e-3, 1),
    "optimizer.warmup_steps": (0, 1, 2, 3),
    "optimizer.cycles": (1, 2, 100),
    "optimizer.power": (0.1, 1, 5),
    "optimizer.final_share": (0, 0.5, 1),
    "objective.huber_c": (1e-3, 0.1, 1),
    "objective.min_snr_gamma": (1e-3, 1, 100),
    "objective.p2_gamma": (0.1, 5),
    "objective.noise_offset": (0, 0.1, 1),
    "objective.pyramid_discount": (0, 0.3, 0.99),
    "objective.input_perturbation": (0, 0.1, 1),
    "objective.logit_mean": (-10, 1, 10),
    "objective.logit_std": (0.01, 10),
    "objective.min_timestep": (0, 500, 999),
    "objective.max_timestep": (0, 1, 500, 1000),
    "training.batch_size": (1, 2, 3),
    "training.micro_batch": (0, 1, 2, 3),
    "training.accumulate_batches": (1, 2),
    "training.seed": (0, 2**40),
    "training.ema_decay": (0, 0.5, 0.999),
    "training.checkpoint_every_steps": (0, 1),
    "output.formats": (
        ["kohya"],
        ["kohya", "diffusers"],
        ["peft"],
        ["diffusers", "peft", "kohya"],
        ["peft", "peft"],
        [],
    ),
    "output.metadata": ("full", "minimal", "none"),
    "output.save_every_steps": (0, 1),
}
"""What is drawn where the type does not say: edges of numbers, and names that every base knows."""
DECIDED_LATER = (
    "adapter.conv_alpha",
    "adapter.conv_rank",
    "adapter.ranks",
    "data.captions.insert_trigger",
    "data.masks",
    "data.trigger",
    "objective.zero_terminal_snr",
    "optimizer.betas",
    "optimizer.epsilon",
    "optimizer.learning_rates",
    "optimizer.text_encoder_2_learning_rate",
    "optimizer.weight_decay",
)
"""What the base or the pictures may not fit although the settings alone make sense."""
FOLDERS = ("data.folder", "data.prior.folder")
WAY_OUT = r"\b(set|remove|lower|raise|take) "


def every_value() -> dict[str, tuple[Any, ...]]:
    values = dict(CHOSEN)
    for section in SECTIONS:
        for name, field in type(getattr(TrainConfig(), section)).model_fields.items():
            key = f"{section}.{name}"
            if key in values or key in NOT_DRAWN:
                continue
            values[key] = (False, True) if field.annotation is bool else get_args(field.annotation)
    values["preset"] = get_args(TrainConfig.model_fields["preset"].annotation)
    return values


VALUES = every_value()


@st.composite
def some_settings(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=4, max_size=24, unique=True))
    drawn = {key: draw(st.sampled_from(VALUES[key])) for key in keys}
    if drawn.get("data.prior.source") == "generated":
        drawn["data.prior.count"] = 3
    return drawn


def config_of(drawn: dict[str, Any], base: str = "tiny", pictures: Path = Path(), folder: str = "run") -> TrainConfig:
    values: dict[str, Any] = {}
    usual = {
        "base.path": base,
        "data.folder": "named",
        "data.trigger": "zorb",
        "data.class_prompt": "a cat",
        "output.folder": folder,
        "optimizer.warmup_steps": 0,
        "training.steps": 2,
    }
    for key, value in (usual | drawn).items():
        put_setting(values, key, str(pictures / value) if key in FOLDERS and value else value)
    return parse_config(values)


def sensible(drawn: dict[str, Any]) -> dict[str, Any]:
    """The drawn settings without those that a refusal names; each refusal is a line that says what to do."""
    while True:
        config = config_of(drawn)
        problems = lasting_clashes(config)
        try:
            require_complete(config)
        except ConfigError as error:
            message = str(error)
        else:
            assert not problems
            return drawn
        assert "\n" not in message
        for problem in problems:
            assert problem.sentence in message and problem.key in problem.sentence
            assert re.search(WAY_OUT, problem.sentence), problem
        named = {key for key in drawn if any(f"{problem.key}.".startswith(f"{key}.") for problem in problems)}
        named |= {key for key in drawn if key.startswith("data.") and key in message}
        assert named, f"none of the drawn settings is named: {message}"
        drawn = {key: value for key, value in drawn.items() if key not in named}


def test_every_setting_is_drawn_or_said_not_to_be() -> None:
    for key, values in VALUES.items():
        assert len(values) > 1, key
        for value in values:
            config_of({key: value})


@checked(derandomize=True, database=None, max_examples=400, deadline=None)
@given(drawn=some_settings())
def test_settings_are_refused_with_a_way_out_or_make_sense(drawn: dict[str, Any]) -> None:
    config = config_of(sensible(drawn))
    possible = 0
    for family in FAMILIES:
        try:
            settled = with_preset(config, family)
        except ConfigError as error:
            assert config.preset != "none" and "\n" not in str(error)
        else:
            possible += 1
            assert with_preset(settled, family) == settled
            require_complete(settled)
    assert possible


# --- the same, trained ----------------------------------------------------------------------------------

_RUNS = itertools.count()


CAPTIONS = {
    "named": ["a [trigger] on a wall"] * 4,
    "masked": ["a [trigger] on a wall, red, at night"] * 4,
    "partly named": ["a [trigger]", "a wall", "", "a wall, a [trigger], a wall"],
    "unnamed": ["a wall"] * 4,
    "others": ["a tree", "a house"],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of CAPTIONS; those of "masked" have masks, one all black."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, captions in CAPTIONS.items():
        (root / name).mkdir()
        for number, caption in enumerate(captions):
            path = root / name / f"{number}.png"
            _draw(path, rng)
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
            if name == "masked" and number:
                mask = np.zeros((64, 64), dtype=np.uint8)
                mask[:, : 32 * (number - 1)] = 255
                Image.fromarray(mask).save(path.with_name(f"{number}-masklabel.png"))
    return root


def _draw(path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)


def class_pictures(base: Any, prompt: str, prior: Any, side: int, paths: Mapping[int, Path]) -> None:
    """Noise stands for what the base would draw."""
    for number, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        _draw(path, np.random.default_rng(number))


def trains_or_is_refused(drawn: dict[str, Any], base: Path, pictures: Path, runs: Path) -> None:
    """Two steps leave a finite adapter; or base or pictures show, before any step, that a setting does not fit them."""
    folder = runs / f"run-{next(_RUNS)}"
    config = config_of(sensible(drawn), str(base), pictures, str(folder))
    try:
        result = train(config, class_pictures=class_pictures)
    except (ConfigError, DataError) as error:
        message = str(error)
        assert any(key in message for key in (*DECIDED_LATER, *_filled_by(config))), message
        assert "\n" not in message or isinstance(error, DataError)  # which lists pictures
        events = folder / "events.jsonl"
        lines = events.read_text(encoding="utf-8").splitlines() if events.exists() else []
        assert all(json.loads(line)["event"] != "step" for line in lines)
        return
    assert result.steps == 2
    assert set(result.formats) == set(config.output.formats)
    adapter = read_adapter(result.adapter)
    assert all(difference(adapter, read_adapter(path)).same for path in result.formats.values())
    tensors = [tensor for layer in adapter.layers.values() for tensor in layer.tensors()]
    tensors += [vectors for parts in adapter.tokens.values() for vectors in parts.values()]
    assert tensors and all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _filled_by(config: TrainConfig) -> list[str]:
    """What may be refused because the preset has other values for this family."""
    return [] if config.preset == "none" else ["optimizer.", "training.", "objective.", "adapter.text_encoder = true"]


_WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)  # each try is a run
_SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)


@checked(
    derandomize=True,
    database=None,
    max_examples=25,
    deadline=None,
    phases=_WITHOUT_SHRINKING,
    suppress_health_check=_SLOW_IS_FINE,
)
@given(drawn=some_settings())
def test_any_settings_train_or_are_refused(
    drawn: dict[str, Any], tiny_folder: Any, pictures: Path, tmp_path: Path
) -> None:
    trains_or_is_refused(drawn, tiny_folder("sd1"), pictures, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
@checked(
    derandomize=True,
    database=None,
    max_examples=135,
    deadline=None,
    phases=_WITHOUT_SHRINKING,
    suppress_health_check=_SLOW_IS_FINE,
)
@given(drawn=some_settings())
def test_many_more_settings_train_or_are_refused(
    drawn: dict[str, Any], family: str, tiny_folder: Any, pictures: Path, tmp_path: Path
) -> None:
    trains_or_is_refused(drawn, tiny_folder(family), pictures, tmp_path)

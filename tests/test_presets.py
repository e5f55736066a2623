from pathlib import Path
from typing import Any

import pytest

from sdlora.config import (
    load_config,
    parse_config,
    put_setting,
    require_complete,
    setting_at,
    with_preset,
    with_steps,
    write_config,
)
from sdlora.config.combinations import clashes
from sdlora.config.presets import _OF_FAMILY, _PRESETS, FAMILIES, FEWEST_STEPS
from sdlora.errors import ConfigError
from sdlora.families.traits import ALL_TRAITS

COMPLETE = {"base": {"path": "tiny"}, "data": {"folder": "pictures"}, "output": {"folder": "run"}}
PRESETS = ("subject", "style", "character", "fast")
EVERY = [(preset, family) for preset in PRESETS for family in FAMILIES]


def config(**settings):
    values = {name: dict(table) for name, table in COMPLETE.items()}
    for key, value in settings.items():
        put_setting(values, key.replace("__", "."), value)
    return parse_config(values)


def test_the_presets_know_every_family_and_no_other_setting_than_those_that_are():
    assert set(FAMILIES) == {traits.name for traits in ALL_TRAITS}
    assert set(_PRESETS) == {"none", *PRESETS}
    for values in (*_PRESETS.values(), *_OF_FAMILY.values()):
        for key, value in values.items():
            assert setting_at(config(**{key.replace(".", "__"): value}), key) == value


@pytest.mark.parametrize(("preset", "family"), EVERY)
def test_a_preset_changes_what_is_not_given_and_makes_sense(preset, family):
    settled = with_preset(config(preset=preset), family)
    for key, value in {**_PRESETS[preset], **_OF_FAMILY.get((preset, family), {})}.items():
        assert setting_at(settled, key) == value
    assert clashes(settled) == []
    assert settled.training.steps == 0 and settled.adapter.alpha > 0
    untouched = settled.model_copy(
        update={name: getattr(config(), name) for name in ("adapter", "objective", "optimizer", "training")}
    )
    assert untouched == config(preset=preset)


def test_families_differ_where_it_is_said():
    assert with_preset(config(preset="subject"), "sd1").adapter.text_encoder
    assert not with_preset(config(preset="subject"), "sdxl").adapter.text_encoder
    assert with_preset(config(preset="style"), "sd2").optimizer.learning_rate == 2e-4
    assert with_preset(config(preset="style"), "sdxl").optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(("preset", "family"), EVERY)
def test_what_is_given_wins_even_where_it_is_the_default(preset, family):
    given = {
        "adapter__rank": 7,
        "adapter__text_encoder": False,
        "adapter__targets": ["attn2.to_k"],
        "optimizer__learning_rate": 2e-4,
        "training__steps_per_picture": 100,
        "training__batch_size": 1,
    }
    settled = with_preset(config(preset=preset, **given), family)
    for key, value in given.items():
        found = setting_at(settled, key.replace("__", "."))
        assert (list(found) if isinstance(value, list) else found) == value


@pytest.mark.parametrize(("preset", "family"), [*EVERY, ("none", "")])
@pytest.mark.parametrize("kind", ["adamw8bit", "lion", "prodigy", "schedule-free"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_settled_once_it_stays_so_written_and_read_too(tmp_path, preset, family, kind, adapter):
    settled = with_preset(config(preset=preset, optimizer__kind=kind, adapter__kind=adapter), family)
    assert with_preset(settled, family) == settled
    write_config(settled, tmp_path / "config.toml")
    again = parse_config(load_config(tmp_path / "config.toml"))
    require_complete(again)
    assert again == settled
    for other in FAMILIES:
        assert with_preset(again, other) == settled


def test_without_a_preset_the_defaults_stay():
    assert with_preset(config(), "") == config()


def test_values_that_make_no_sense_beside_given_ones_are_left_out():
    settled = with_preset(config(preset="style", adapter__targets=["attention"]), "sd1")
    assert settled.adapter.conv_rank == 0 and settled.adapter.rank == 32
    settled = with_preset(
        config(preset="style", adapter__targets=["attn2.to_k"]), "sd1"
    )  # a pattern's kernels may be small
    assert settled.adapter.conv_rank == 0 and settled.adapter.conv_alpha == 0
    settled = with_preset(config(preset="style", adapter__targets=["resnet"], adapter__conv_alpha=2), "sd1")
    assert (settled.adapter.conv_rank, settled.adapter.conv_alpha) == (8, 2)
    settled = with_preset(config(preset="character", adapter__kind="full"), "sd1")
    assert settled.adapter.rank == 16 and settled.adapter.text_encoder
    assert settled.optimizer.learning_rate == pytest.approx(1e-5)
    words = config(preset="subject", tokens__train="alone", data__trigger="zorb")
    settled = with_preset(words, "sd1")
    assert settled.adapter == config().adapter and settled.training.steps_per_picture == 100


def test_the_file_of_words_alone_is_called_by_the_first():
    words = {"tokens__train": "alone"}
    assert with_preset(config(data__trigger="zorb", **words), "sd1").output.name == "zorb"
    assert with_preset(config(data__trigger="zorb", output__name="x", **words), "sd1").output.name == "x"
    assert with_preset(config(data__trigger="zorb"), "sd1").output.name == "adapter"
    assert with_preset(config(data__trigger="a/b", **words), "sd1").output.name == "adapter"
    concepts = [{"folder": "a"}, {"folder": "b", "trigger": "blick"}, {"folder": "c", "trigger": "zorb"}]
    assert with_preset(config(data__concepts=concepts, **words), "sd1").output.name == "blick"


def test_a_given_setting_may_act_in_one_family_alone():
    rate = config(preset="subject", optimizer__text_encoder_learning_rate=1e-5)
    require_complete(rate)
    assert with_preset(rate, "sd1").optimizer.text_encoder_learning_rate == 1e-5
    with pytest.raises(ConfigError, match="text_encoder_learning_rate is 1e-05, which needs a text encoder") as caught:
        with_preset(rate, "sdxl")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="text_encoder_learning_rate"):
        require_complete(config(preset="style", optimizer__text_encoder_learning_rate=1e-5))


def test_an_optimizer_brings_its_own_rates():
    words = {"tokens__train": "together", "data__trigger": "zorb", "adapter__text_encoder": True}
    prodigy = with_preset(config(optimizer__kind="prodigy", **words), "sd1")
    assert prodigy.optimizer.learning_rate == prodigy.optimizer.text_encoder_learning_rate == 1
    assert prodigy.tokens.learning_rate == 1
    lion = with_preset(config(optimizer__kind="lion", **words), "sd1")
    assert lion.optimizer.learning_rate == 4e-5 and lion.optimizer.text_encoder_learning_rate == 1e-5
    assert lion.tokens.learning_rate == 2e-4 and lion.optimizer.weight_decay == 0.05
    assert with_preset(config(preset="fast", optimizer__kind="lion8bit"), "sd1").optimizer.learning_rate == 1e-4
    free = with_preset(config(optimizer__kind="schedule-free"), "sd1")
    assert free.optimizer.schedule == "constant" and free.optimizer.learning_rate == 2e-4


def test_an_optimizer_leaves_what_is_given():
    given = config(optimizer__kind="prodigy", optimizer__learning_rate=0.5)
    assert with_preset(given, "").optimizer.learning_rate == 0.5
    given = config(optimizer__kind="lion", optimizer__learning_rate=2e-4, optimizer__weight_decay=0.01)
    assert with_preset(given, "").optimizer == given.optimizer


def test_whole_weights_learn_at_a_twentieth_of_the_rate_with_lion_at_a_hundredth():
    assert with_preset(config(adapter__kind="full"), "").optimizer.learning_rate == 1e-5
    assert with_preset(config(adapter__kind="full", optimizer__kind="lion"), "").optimizer.learning_rate == 2e-6


@pytest.mark.parametrize(
    ("batches", "accumulate", "processes", "steps"),
    [(2000, 1, 1, 2000), (2000, 3, 1, 667), (2000, 2, 2, 500), (2001, 2, 2, 501), (10, 1, 1, FEWEST_STEPS)],
)
def test_steps_go_through_all_batches(batches, accumulate, processes, steps):
    counted = with_steps(config(training__accumulate_batches=accumulate), batches, processes)
    assert counted.training.steps == steps
    assert with_steps(counted, 9999, 1) == counted


def test_steps_that_are_given_stay():
    assert with_steps(config(training__steps=30), 2000, 1).training.steps == 30


def test_counted_steps_must_hold_the_warm_up():
    long = config(optimizer__warmup_steps=500)
    require_complete(long)
    with pytest.raises(ConfigError, match=r"optimizer.warmup_steps is 500, more than training.steps = 300; lower"):
        with_steps(long, 300, 1)


def test_the_table_of_presets_in_the_documents_is_the_code():
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    table = {row[0]: row[1:] for row in rows if len(row) == 5}
    for number, preset in enumerate(("subject", "character", "style", "fast")):
        sd1, sdxl = (with_preset(config(preset=preset), family) for family in ("sd1", "sdxl"))
        size = f"{sd1.adapter.rank}, {sd1.adapter.alpha:g}"
        if sd1.adapter.conv_rank:
            size += f"; convolutions {sd1.adapter.conv_rank}, {sd1.adapter.conv_alpha:g}"
        rate, large = (f"{c.optimizer.learning_rate * 1e4:g}e-4" for c in (sd1, sdxl))
        assert table["rank, alpha"][number] == size
        assert table["targets"][number] == ", ".join(sd1.adapter.targets)
        assert table["text encoder"][number] == ("SD 1, SD 2" if sd1.adapter.text_encoder else "no")
        assert table["learning rate"][number] == (rate if rate == large else f"{rate}, SDXL {large}")
        assert table["times each picture is seen"][number] == str(sd1.training.steps_per_picture)
        assert table["pictures per step"][number] == str(sd1.training.batch_size)
        assert sd1.training.batch_size == sdxl.training.batch_size * sdxl.training.accumulate_batches


@pytest.mark.parametrize(
    ("values", "warmup"),
    [
        ({"training": {"steps": 4}}, 2),
        ({"training": {"steps": 10}}, 10),
        ({"training": {"steps": 20}, "data": {"trigger": "zorb"}, "tokens": {"train": "first", "handover": 0.3}}, 3),
        ({"training": {"steps": 4}, "optimizer": {"warmup_steps": 3}}, 3),
    ],
)
def test_a_warm_up_that_is_not_given_fits_a_short_run(values: dict[str, Any], warmup: int) -> None:
    assert with_preset(parse_config(values), "sd1").optimizer.warmup_steps == warmup


def test_a_description_is_what_the_new_word_starts_from() -> None:
    values = {"data": {"trigger": "zorb"}, "tokens": {"train": "together", "words": "blue robot"}}
    assert with_preset(parse_config(values), "sd1").tokens.start == "words"
    values["tokens"]["start"] = "random"
    with pytest.raises(ConfigError, match=r"tokens\.words"):
        with_preset(parse_config(values), "sd1")

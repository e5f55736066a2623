import math
import re
import tomllib

import pytest
from pydantic import ValidationError

from sdlora.config import (
    TARGET_PRESETS,
    TrainConfig,
    field_descriptions,
    is_table,
    load_config,
    parse_config,
    put_setting,
    require_complete,
    write_config,
)
from sdlora.errors import ConfigError
from sdlora.families.sd import SD1, SD2

COMPLETE = {"base": {"path": "tiny"}, "data": {"folder": "pictures"}, "output": {"folder": "run"}}


def problem_of(values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "nearest"),
    [
        (
            {"optimizer": {"learning_rte": 1e-4}},
            "unknown key optimizer.learning_rte; did you mean optimizer.learning_rate?",
        ),
        ({"learning_rate": 1e-4}, "unknown key learning_rate; did you mean optimizer.learning_rate?"),
        ({"training": {"rank": 4}}, "unknown key training.rank; did you mean adapter.rank?"),
        ({"steps": 4}, "unknown key steps; did you mean training.steps?"),
        ({"seed": 4}, "unknown key seed; did you mean training.seed?"),
        ({"optimiser": {}}, "unknown key optimiser; did you mean optimizer?"),
        ({"zzzz": 1}, "unknown key zzzz; known are preset, base, data, adapter, "),
        ({"presets": "style"}, "unknown key presets; did you mean preset?"),
        (
            {"training": {"min_snr_gamma": 5}},
            "unknown key training.min_snr_gamma; did you mean objective.min_snr_gamma?",
        ),
        ({"adapter": {"rankz": {"attn2": 4}}}, "unknown key adapter.rankz; did you mean adapter.rank?"),
        ({"ranks": {"attn2": 4}}, "unknown key ranks; did you mean adapter.ranks?"),
        ({"optimizer": {"learning_ratess": {}}}, "did you mean optimizer.learning_rates?"),
    ],
)
def test_an_unknown_key_names_the_nearest(values, nearest):
    assert nearest in problem_of(values)


def test_all_problems_come_in_one_message():
    message = problem_of(
        {
            "optimizer": {"learning_rte": 1, "learning_rate": 0},
            "data": {"repeats": 0},
            "base": {"precision": "fp8"},
            "trainig": {},
        }
    )
    for part in (
        "optimizer.learning_rte",
        "optimizer.learning_rate is 0; input should be greater than 0",
        "data.repeats is 0",
        "base.precision is 'fp8'; input should be 'auto', 'fp32', 'bf16' or 'fp16'",
        "trainig",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optimizer", "learning_rate", 0.0),
        ("optimizer", "learning_rate", -1e-4),
        ("optimizer", "learning_rate", math.nan),
        ("optimizer", "learning_rate", math.inf),
        ("optimizer", "learning_rate", "fast"),
        ("optimizer", "epsilon", math.nan),
        ("optimizer", "weight_decay", math.inf),
        ("optimizer", "weight_decay", -0.1),
        ("optimizer", "clip_norm", math.nan),
        ("optimizer", "betas", (0.9, 1.0)),
        ("optimizer", "betas", (math.nan, 0.9)),
        ("optimizer", "betas", (0.9,)),
        ("optimizer", "warmup_steps", -1),
        ("adapter", "rank", 0),
        ("adapter", "rank", 2.5),
        ("adapter", "alpha", 0),
        ("adapter", "alpha", math.inf),
        ("adapter", "dropout", 1.0),
        ("adapter", "dropout", math.nan),
        ("data.captions", "dropout", 1.5),
        ("data.captions", "dropout", math.nan),
        ("data", "resolution", -8),
        ("training", "steps", -1),
        ("training", "steps_per_picture", 0),
        ("training", "ema_decay", 1.0),
        ("training", "batch_size", -1),
        ("objective", "min_snr_gamma", 0),
        ("objective", "noise_offset", 1.5),
        ("objective", "logit_std", 0),
        ("tokens", "vectors", 76),
        ("optimizer", "lora_plus_ratio", 0.5),
        ("optimizer", "lora_plus_ratio", math.inf),
        ("adapter", "max_norm", -1),
        ("samples", "guidance_scale", math.nan),
    ],
)
def test_a_number_out_of_range_is_refused_by_key_and_value(section, key, value):
    values: dict = {}
    put_setting(values, f"{section}.{key}", value)
    message = problem_of(values)
    assert f"{section}.{key}" in message
    assert "should be" in message or "required" in message or "not given" in message


def test_a_long_wrong_value_is_not_repeated_in_full():
    assert len(problem_of({"base": {"path": ["x" * 20_000] * 50}})) < 300


def test_defaults_and_zero_where_zero_means_off():
    config = parse_config({"optimizer": {"clip_norm": 0}})
    assert config.optimizer.clip_norm == 0
    assert config.adapter.alpha == config.adapter.rank == 16
    assert config.optimizer.betas == (0.9, 0.99)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValidationError):
        TrainConfig().training.steps = 5


def test_written_and_read_again_it_is_the_same(tmp_path):
    config = parse_config(
        {
            "base": {"path": 'C:\\models "x"\\ä.safetensors', "precision": "bf16"},
            "data": {"caption": "a photo of [trigger]\tnow", "flip": True, "captions": {"dropout": 0.1}},
            "adapter": {"targets": ["attention", "ff.net.*"], "alpha": 2.5},
            "optimizer": {"learning_rate": 1e-05, "betas": [0.8, 0.95]},
            "samples": {"prompts": ["猫", "b"], "seed": 2**40},
        }
    )
    path = tmp_path / "config.toml"
    write_config(config, path)
    assert parse_config(load_config(path)) == config
    assert set(tomllib.loads(path.read_text(encoding="utf-8"))) == set(TrainConfig.model_fields)


def test_tables_of_the_users_own_names_are_written_and_read_again(tmp_path):
    odd = {'a.b "quoted"': 1, "up_blocks.*": 8, "猫\n[x]": 3, "": 2}
    arguments = {"betas": [0.9, 0.95], "foreach": False, "name": "a\tb", "nested": {"x.y": [1, [2]]}, "k": 3}
    config = parse_config(
        {
            **COMPLETE,
            "preset": "style",
            "adapter": {"ranks": odd},
            "optimizer": {"learning_rates": {"unet.down_blocks.*": 1e-4, 'te"xt': 0}, "arguments": arguments},
        }
    )
    write_config(config, tmp_path / "config.toml")
    again = parse_config(load_config(tmp_path / "config.toml"))
    assert again == config
    assert list(again.adapter.ranks) == list(odd)  # of several patterns that match the last one counts
    assert again.optimizer.arguments == arguments
    require_complete(again)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"adapter": {"ranks": {"attn2.*": 0}}}, "adapter.ranks.attn2.* is 0; input should be greater than 0"),
        ({"adapter": {"ranks": 4}}, "adapter.ranks is 4; input should be a valid dictionary"),
        ({"optimizer": {"learning_rates": {"a": -1}}}, "optimizer.learning_rates.a is -1"),
        ({"optimizer": {"kind": "adam"}}, "optimizer.kind is 'adam'; input should be 'adamw8bit', 'adamw'"),
        ({"optimizer": {"kind": "torch.optim."}}, "or a class such as 'torch.optim.RAdam'"),
    ],
)
def test_a_wrong_value_in_a_table_is_named_by_its_key(values, problem):
    assert problem in problem_of(values)


def test_tables_have_no_flag():
    assert [key for key in field_descriptions() if is_table(key)] == [
        "data.concepts",
        "adapter.ranks",
        "optimizer.arguments",
        "optimizer.learning_rates",
    ]


def test_a_missing_broken_or_binary_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: there is no such configuration file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "a.toml").write_text("steps = \n")
    with pytest.raises(ConfigError, match=r"a\.toml: is not valid TOML \(.*line 1"):
        load_config(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"b\.toml: cannot be read as a text file"):
        load_config(tmp_path / "b.toml")
    with pytest.raises(ConfigError, match="cannot be read as a text file"):
        load_config(tmp_path)


def test_require_complete_accepts_the_shortest_configuration():
    assert require_complete(parse_config(COMPLETE)) is None


def test_require_complete_names_everything_at_once():
    config = parse_config(
        {
            "data": {"resolution": 500},
            "output": {"name": "../evil"},
            "adapter": {"targets": []},
            "training": {"steps": 5},
            "optimizer": {"warmup_steps": 6},
        }
    )
    with pytest.raises(ConfigError) as caught:
        require_complete(config)
    message = str(caught.value)
    for part in (
        "base.path is not set",
        "data.folder is not set",
        "output.folder is not set",
        "output.name is '../evil'",
        "data.resolution is 500; it must be a multiple of 8",
        "adapter.targets is empty",
        "optimizer.warmup_steps is 6, more than training.steps = 5",
    ):
        assert part in message


@pytest.mark.parametrize("name", ["a/b", "a\\b", "", "..", ".hidden", "a\nb", "a:b"])
def test_an_output_name_is_a_plain_file_name(name):
    with pytest.raises(ConfigError, match=r"output\.name"):
        require_complete(parse_config({**COMPLETE, "output": {"folder": "run", "name": name}}))


def test_every_field_is_described():
    described = field_descriptions()
    assert described["training.accumulate_batches"] == "Batches per optimizer step."
    assert list(described)[:2] == ["preset", "base.path"]
    assert [key for key, text in described.items() if not text.endswith((".", "?"))] == []


def test_the_presets_of_the_help_text_are_those_of_the_families():
    for family in (SD1, SD2):
        assert set(family.target_presets) == set(TARGET_PRESETS)


# --- data ---------------------------------------------------------------------------------------------


def data_problems(data: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        require_complete(parse_config({**COMPLETE, "data": data}))
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"folder": "a", "concepts": [{"folder": "b"}]}, "data.folder is set beside data.concepts"),
        ({"concepts": [{"trigger": "b"}]}, "data.concepts.0.folder is not set"),
        ({"folder": "a", "resolution": 100}, "data.resolution is 100; it must be a multiple of 8"),
        ({"concepts": [{"folder": "b", "buckets": {"step": 12}}]}, "data.concepts.0.buckets.step is 12"),
        ({"folder": "a", "buckets": {"min_side": 512, "max_side": 256}}, "min_side is 512, more than max_side = 256"),
        ({"folder": "a", "masks": {"source": "folder"}}, "data.masks.folder is not set"),
        ({"folder": "a", "caption_from": "instance"}, "data.caption is not set"),
        ({"folder": "a", "prior": {"source": "generated"}}, "data.class_prompt is not set"),
        (
            {"folder": "a", "class_prompt": "c", "prior": {"source": "training", "folder": "b"}},
            "data.prior.folder is set beside",
        ),
        (
            {"folder": "a", "class_prompt": "c", "prior": {"source": "training", "target": "picture"}},
            'set it to "base"',
        ),
        ({"folder": "a", "captions": {"insert_trigger": True}}, "data.captions.insert_trigger is set, and no trigger"),
        ({"folder": "a", "captions": {"separator": ""}}, "data.captions.separator is empty"),
        ({"folder": "a", "captions": {"keep_separator": ",,"}}, "which holds the separator"),
        ({"folder": "a", "caption_suffixes": ["a/b"]}, "data.caption_suffixes holds 'a/b'"),
        ({"concepts": [{"folder": "b", "buckets": {"short_batches": "drop"}}]}, "short_batches differs"),
        ({"folder": "a", "repeats": 10**12}, "data.repeats is 1000000000000"),
    ],
)
def test_what_is_at_odds_in_the_data_is_named(data, problem):
    assert problem in data_problems(data)


def test_concepts_take_what_they_do_not_set_from_the_data():
    data = {
        "repeats": 3,
        "captions": {"shuffle": True, "keep_tags": 1},
        "concepts": [{"folder": "a"}, {"folder": "b", "repeats": 5, "captions": {"keep_tags": 2}}],
    }
    one, other = parse_config({"data": data}).data.concepts
    assert (one.repeats, one.captions.shuffle, one.captions.keep_tags) == (3, True, 1)
    assert (other.repeats, other.captions.shuffle, other.captions.keep_tags) == (5, True, 2)


def test_a_saved_configuration_still_hands_down_what_its_concepts_do_not_set(tmp_path):
    data = {"trigger": "x", "concepts": [{"folder": "a"}, {"folder": "b", "repeats": 5, "captions": {"keep_tags": 2}}]}
    config = parse_config({"data": data})
    write_config(config, tmp_path / "config.toml")
    values = load_config(tmp_path / "config.toml")
    assert parse_config(values) == config
    put_setting(values, "data.repeats", 7)
    assert [concept.repeats for concept in parse_config(values).data.concepts] == [7, 5]


def test_the_nearest_key_of_a_part_of_the_data_is_named():
    assert "did you mean data.captions.shuffle?" in problem_of({"data": {"captions": {"sufle": True}}})
    assert "did you mean data.prior.folder?" in problem_of({"data": {"prior_folder": "x"}})


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"adapter": {"kind": "dora"}}, "did you mean adapter.dora = true?"),
        ({"tokens": {"train": True}}, 'did you mean tokens.train = "together"?'),
        ({"objective": {"weighting": "min_snr"}}, "did you mean min-snr?"),
        ({"optimizer": {"schedule": "cosine_with_restarts"}}, "did you mean restarts?"),
    ],
)
def test_a_value_known_by_another_name_is_answered_with_ours(values, hint):
    with pytest.raises(ConfigError, match=re.escape(hint)):
        parse_config(values)


def test_descriptions_name_every_value_that_can_be_chosen():
    described = field_descriptions()
    assert described["objective.weighting"].endswith("One of none, min-snr, debiased, p2.")
    assert "One of" not in described["base.quantize"] or "nf4" in described["base.quantize"]
    assert "alone" in described["tokens.train"] and "none" in described["tokens.train"]

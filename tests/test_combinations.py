"""Combinations that make no sense are refused with the reason and a way out; those that do are not."""

import re

import pytest

from sdlora.config import load_config, parse_config, put_setting, require_complete, with_preset, write_config
from sdlora.config.combinations import adapter_clashes, clashes
from sdlora.config.idle import IDLE
from sdlora.config.sections import AdapterSection, TrainConfig
from sdlora.errors import ConfigError

COMPLETE = {
    "base": {"path": "tiny"},
    "data": {"folder": "pictures", "trigger": "zorb"},
    "output": {"folder": "run"},
}
WAY_OUT = r"\b(set|remove|lower|raise|take) "


def config(settings):
    values = {name: dict(table) for name, table in COMPLETE.items()}
    for key, value in settings.items():
        put_setting(values, key, value)
    return parse_config(values)


WORDS = {"tokens.train": "together"}
SENSELESS = [
    # kinds of adapter
    (
        {"adapter.kind": "full", "adapter.rank": 4},
        'adapter.rank is 4, which needs adapter.kind = "lora", "loha" or "lokr"',
    ),
    ({"adapter.kind": "full", "adapter.alpha": 4}, "adapter.alpha is 4.0"),
    ({"adapter.kind": "full", "adapter.ranks": {"attn2.*": 4}}, 'adapter.ranks is {"attn2.*": 4}'),
    ({"adapter.kind": "full", "adapter.dora": True}, 'adapter.dora is true, which needs adapter.kind = "lora"'),
    ({"adapter.kind": "loha", "adapter.dora": True}, "adapter.dora is true"),
    ({"adapter.kind": "lokr", "adapter.rank_stabilized": True}, "adapter.rank_stabilized is true"),
    ({"adapter.kind": "lokr", "adapter.start": "pissa"}, 'adapter.start is "pissa"'),
    (
        {"adapter.start": "pissa", "optimizer.weight_decay": 0.1},
        "optimizer.weight_decay is 0.1, which needs an update that starts at zero",
    ),
    ({"adapter.kind": "loha", "adapter.dropout": 0.1}, "adapter.dropout is 0.1"),
    ({"adapter.kind": "loha", "optimizer.lora_plus_ratio": 4}, "optimizer.lora_plus_ratio is 4.0"),
    ({"adapter.kind": "full", "adapter.rank_dropout": 0.1}, "adapter.rank_dropout is 0.1"),
    ({"adapter.kind": "full", "adapter.module_dropout": 0.1}, "adapter.module_dropout is 0.1"),
    ({"adapter.lokr_factor": 4}, 'adapter.lokr_factor is 4, which needs adapter.kind = "lokr"'),
    ({"adapter.conv_rank": 4}, "adapter.conv_rank is 4, which needs a convolution among adapter.targets"),
    ({"adapter.conv_alpha": 4, "adapter.targets": ["transformer"]}, "adapter.conv_alpha is 4.0"),
    ({"adapter.targets": []}, "adapter.targets is empty; set it to any of cross-attention, attention"),
    ({"adapter.dora": True, "adapter.start": "olora"}, 'adapter.start is "olora", and adapter.dora starts from zero'),
    ({"adapter.dora": True, "adapter.rank_dropout": 0.1}, "adapter.rank_dropout is 0.1, and adapter.dora"),
    ({"adapter.dora": True, "adapter.module_dropout": 0.1}, "adapter.module_dropout is 0.1, and adapter.dora"),
    ({"adapter.dora": True, "adapter.max_norm": 1}, "adapter.max_norm is 1.0, and adapter.dora"),
    ({"adapter.start": "pissa", "base.quantize": "nf4"}, "and base.quantize rounds them"),
    ({"adapter.dora": True, "base.quantize": "int8"}, 'set base.quantize = "nf4", or adapter.dora to false'),
    ({"adapter.kind": "loha", "base.quantize": "nf4"}, 'set base.quantize = "int8", or adapter.kind = "lora"'),
    ({"adapter.start": "pissa", "adapter.max_norm": 1}, "adapter.max_norm is 1.0, and adapter.start"),
    (
        {"optimizer.kind": "schedule-free", "adapter.max_norm": 1},
        'adapter.max_norm is 1.0, and optimizer.kind is "schedule-free", which saves an average that no bound holds for',
    ),
    # what is saved
    ({"output.formats": []}, 'output.formats is empty; set it to any of "kohya", "diffusers", "peft"'),
    ({"output.formats": ["peft", "kohya", "peft"]}, 'output.formats names "peft" twice; remove one'),
    *(
        (
            {"adapter.kind": kind, "output.formats": ["kohya", format]},
            f'output.formats has "{format}", which does not hold adapter.kind = "{kind}"; remove it',
        )
        for kind, format in (("loha", "diffusers"), ("lokr", "diffusers"), ("lokr", "peft"), ("full", "peft"))
    ),
    (
        {**WORDS, "tokens.save": "bundled", "output.formats": ["diffusers"]},
        'output.formats has "diffusers", and tokens.save is "bundled", which kohya\'s format alone can be',
    ),
    (
        {"tokens.train": "alone", "output.formats": ["kohya", "peft"]},
        'output.formats is ["kohya", "peft"], which needs an adapter',
    ),
    (
        {"objective.zero_terminal_snr": True, "output.metadata": "none"},
        'output.metadata is "none", and objective.zero_terminal_snr is true',
    ),
    # text encoders
    ({"adapter.text_encoder_parts": ["text_encoder"]}, "which needs adapter.text_encoder = true"),
    ({"adapter.text_encoder_targets": ["transformer"]}, "which needs adapter.text_encoder = true"),
    ({"adapter.text_encoder": True, "adapter.text_encoder_parts": []}, "adapter.text_encoder_parts is empty"),
    ({"adapter.text_encoder": True, "adapter.text_encoder_targets": []}, "adapter.text_encoder_targets is empty"),
    ({"optimizer.text_encoder_learning_rate": 1e-5}, "optimizer.text_encoder_learning_rate is 1e-05, which needs"),
    ({"optimizer.text_encoder_2_learning_rate": 1e-5}, "optimizer.text_encoder_2_learning_rate is 1e-05, which needs"),
    (
        {
            "adapter.text_encoder": True,
            "adapter.text_encoder_parts": ["text_encoder_2"],
            "optimizer.text_encoder_learning_rate": 1e-5,
            "optimizer.text_encoder_2_learning_rate": 2e-5,
        },
        "optimizer.text_encoder_learning_rate is 1e-05",
    ),
    # new words
    ({"tokens.vectors": 2}, 'tokens.vectors is 2, which needs new words, and so tokens.train = "together"'),
    ({"tokens.learning_rate": 1e-2}, "tokens.learning_rate is 0.01"),
    ({"tokens.train": "alone", "data.trigger": ""}, "no trigger is given that becomes a new word; set data.trigger"),
    ({**WORDS, "data.trigger": "  "}, "no trigger is given that becomes a new word"),
    ({**WORDS, "data.captions.dropout": 1}, 'data.captions.dropout is 1, and tokens.train is "together"'),
    ({**WORDS, "data.captions.dropout_every_epochs": 1}, "remove data.captions.dropout_every_epochs"),
    ({**WORDS, "tokens.start": "class", "data.class_prompt": " "}, "data.class_prompt is not given"),
    ({**WORDS, "tokens.start": "class"}, 'tokens.start is "class", and data.class_prompt is not given'),
    ({**WORDS, "tokens.start": "words"}, 'tokens.start is "words", and tokens.words is empty'),
    (
        {**WORDS, "tokens.words": "small animal", "tokens.start": "random"},
        'tokens.words is "small animal", which needs tokens.start = "words"',
    ),
    ({**WORDS, "tokens.handover": 0}, "which leaves the new words no step"),
    (
        {"tokens.train": "first", "tokens.handover": 1},
        'which leaves the adapter no step; lower it, or set tokens.train = "alone"',
    ),
    ({**WORDS, "tokens.handover": 0.1, "training.steps": 4, "optimizer.warmup_steps": 0}, "of training.steps = 4"),
    ({"tokens.train": "alone", "tokens.handover": 0.2}, "tokens.handover is 0.2"),
    ({"tokens.train": "alone", "tokens.save": "bundled"}, 'tokens.save is "bundled", which needs an adapter file'),
    ({"tokens.train": "alone", "data.prior.folder": "others"}, 'data.prior.folder is "others", which needs an adapter'),
    ({"tokens.train": "alone", "adapter.rank": 4}, "adapter.rank is 4, which needs an adapter"),
    ({"tokens.train": "alone", "adapter.kind": "full"}, 'adapter.kind is "full", which needs an adapter'),
    (
        {"tokens.train": "alone", "optimizer.learning_rate": 1e-3},
        "optimizer.learning_rate is 0.001, which needs an adapter",
    ),
    ({"tokens.train": "alone", "optimizer.learning_rates": {"a": 1.0}}, "optimizer.learning_rates is"),
    # objective
    ({"objective.huber_c": 0.2}, 'objective.huber_c is 0.2, which needs objective.loss = "huber"'),
    ({"objective.loss": "l1", "objective.huber_schedule": "constant"}, 'objective.huber_schedule is "constant"'),
    ({"objective.weighting": "p2", "objective.min_snr_gamma": 1}, "objective.min_snr_gamma is 1.0"),
    ({"objective.p2_gamma": 0.5}, 'objective.p2_gamma is 0.5, which needs objective.weighting = "p2"'),
    ({"objective.logit_mean": 1}, 'objective.logit_mean is 1.0, which needs objective.timesteps = "logit-normal"'),
    ({"objective.logit_std": 2}, "objective.logit_std is 2.0"),
    ({"objective.timesteps": "snr", "objective.weighting": "none"}, 'set objective.timesteps = "uniform"'),
    ({"objective.min_timestep": 500, "objective.max_timestep": 500}, "lower objective.min_timestep"),
    ({"objective.antithetic": True}, "set training.batch_size to 2 or more"),
    ({"objective.zero_terminal_snr": True, "base.prediction": "epsilon"}, "take a base that predicts v"),
    # optimizers
    ({"optimizer.kind": "adafactor", "optimizer.betas": [0.9, 0.95]}, "optimizer.betas is [0.9, 0.95], which needs"),
    ({"optimizer.kind": "lion", "optimizer.epsilon": 1e-6}, "optimizer.epsilon is 1e-06"),
    ({"optimizer.kind": "adafactor", "optimizer.epsilon": 1e-6}, "optimizer.epsilon is 1e-06"),
    ({"optimizer.cycles": 2}, 'optimizer.cycles is 2, which needs optimizer.schedule = "restarts"'),
    ({"optimizer.power": 1}, 'optimizer.power is 1.0, which needs optimizer.schedule = "polynomial"'),
    ({"optimizer.schedule": "constant", "optimizer.final_share": 0.1}, "optimizer.final_share is 0.1"),
    ({"optimizer.kind": "schedule-free", "optimizer.final_share": 0.1}, "optimizer.final_share is 0.1"),
    ({"optimizer.kind": "schedule-free", "optimizer.schedule": "cosine"}, 'set optimizer.schedule = "constant"'),
    ({"optimizer.kind": "schedule-free", "training.ema_decay": 0.9}, "set training.ema_decay to 0"),
    ({"optimizer.kind": "prodigy", "optimizer.learning_rate": 2e-4}, "set optimizer.learning_rate to 1"),
    ({**WORDS, "optimizer.kind": "prodigy", "tokens.learning_rate": 1e-3}, "set tokens.learning_rate to 1"),
    (
        {"optimizer.kind": "prodigy", "optimizer.learning_rates": {"a.*": 1e-4}},
        "optimizer.learning_rates.a.* is 0.0001",
    ),
    ({"optimizer.kind": "prodigy", "optimizer.lora_plus_ratio": 4}, "optimizer.lora_plus_ratio is 4.0"),
    ({"optimizer.warmup_steps": 6, "training.steps": 5}, "optimizer.warmup_steps is 6, more than training.steps = 5"),
    (
        {"tokens.train": "first", "optimizer.warmup_steps": 6, "training.steps": 10},
        "the 5 steps that tokens.handover = 0.5",
    ),
    ({**WORDS, "optimizer.warmup_steps": 6, "training.steps": 10}, "more than the 5 steps"),
    ({"optimizer.arguments": {"lr": 1}}, "optimizer.arguments.lr is set; remove it: set optimizer.learning_rate"),
    ({"optimizer.arguments": {"a": [1, {"b": None}]}}, "which a TOML file cannot hold"),
    ({"optimizer.arguments": {"a": {1: 2}}}, "which a TOML file cannot hold"),
    # the run
    ({"training.micro_batch": 2}, "training.micro_batch is 2, and a batch has 1"),
]


@pytest.mark.parametrize(("settings", "sentence"), SENSELESS)
def test_what_makes_no_sense_is_refused_with_a_way_out(settings, sentence):
    with pytest.raises(ConfigError) as caught:
        require_complete(config(settings))
    message = str(caught.value)
    assert sentence in message and "\n" not in message
    assert re.search(WAY_OUT, message)


SENSIBLE = [
    {"adapter.kind": "full"},
    {"adapter.kind": "loha", "adapter.rank_dropout": 0.1, "adapter.module_dropout": 0.1, "adapter.max_norm": 1},
    {"adapter.kind": "lokr", "adapter.lokr_factor": 4, "adapter.conv_rank": 2, "adapter.targets": ["attention", "resnet"]},
    {"adapter.conv_alpha": 2, "adapter.targets": ["conv1"]},
    {"data.captions.dropout": 1},
    {**WORDS, "data.captions.dropout": 0.9, "data.captions.dropout_every_epochs": 2},
    {"adapter.dora": True, "adapter.rank_stabilized": True, "adapter.dropout": 0.1},
    {"adapter.start": "pissa", "adapter.dropout": 0.1, "adapter.rank_dropout": 0.1, "adapter.module_dropout": 0.1},
    {"adapter.text_encoder": True, "adapter.text_encoder_parts": ["text_encoder_2"], "optimizer.text_encoder_learning_rate": 1e-5},
    {"adapter.text_encoder": True, "optimizer.text_encoder_2_learning_rate": 1e-5},
    {"tokens.train": "alone"},
    {"adapter.kind": "loha", "output.formats": ["peft", "kohya"]},
    {"adapter.dora": True, "output.formats": ["diffusers", "peft"]},
    {**WORDS, "output.formats": ["kohya", "diffusers"], "output.metadata": "none"},
    {"objective.zero_terminal_snr": True, "output.metadata": "minimal"},
    {"tokens.train": "first", "adapter.kind": "full"},
    {**WORDS, "tokens.handover": 1, "tokens.save": "bundled", "tokens.start": "words", "tokens.words": "a cat"},
    {**WORDS, "tokens.start": "class", "data.class_prompt": "a cat"},
    {"objective.loss": "huber", "objective.huber_schedule": "constant", "objective.huber_c": 1},
    {"objective.timesteps": "snr", "objective.weighting": "p2", "objective.p2_gamma": 0.5},
    {"objective.antithetic": True, "data.batch_size": 2},
    {"objective.zero_terminal_snr": True},
    {"objective.min_timestep": 999, "objective.max_timestep": 1000},
    {"optimizer.kind": "prodigy", "optimizer.learning_rates": {"attn1.*": 0}},
    {"optimizer.kind": "schedule-free"},
    {"optimizer.kind": "adafactor", "optimizer.arguments": {"d": 2.0, "eps": [1e-30, 1e-3]}},
    {"optimizer.schedule": "restarts", "optimizer.cycles": 5, "optimizer.final_share": 0.1, "training.ema_decay": 0.99},
    {"training.micro_batch": 2, "training.batch_size": 2, "training.steps_per_picture": 7, "training.steps": 20},
]  # fmt: skip


@pytest.mark.parametrize("settings", SENSIBLE, ids=str)
def test_what_makes_sense_passes_and_passes_again_when_all_of_it_is_given(settings, tmp_path):
    sound = config(settings)
    require_complete(sound)
    settled = with_preset(sound, "sd1")
    write_config(settled, tmp_path / "config.toml")
    again = parse_config(load_config(tmp_path / "config.toml"))
    require_complete(again)
    assert with_preset(again, "sd1") == again == settled


def test_each_rule_of_settings_that_cannot_act_has_a_case():
    """No rule without an example: each is broken by some case above."""
    cases = [config(settings) for settings, _ in SENSELESS]
    for rule in IDLE:
        broken = [clash.key for case in cases if not rule.acts(case) for clash in clashes(case)]
        assert set(broken) & set(rule.keys), rule


def test_several_concepts_count_each_for_itself():
    values = {
        "data.folder": "",
        "data.trigger": "",
        "data.concepts": [{"folder": "a", "trigger": "x", "class_prompt": "a cat"}, {"folder": "b", "trigger": "y"}],
        "tokens.train": "together",
        "tokens.start": "class",
    }
    found = [clash.sentence for clash in clashes(config(values))]
    assert len(found) == 1 and "data.concepts.1.class_prompt is not given" in found[0]
    values["tokens.start"] = "trigger"
    assert clashes(config(values)) == []


def test_everything_at_odds_comes_at_once():
    with pytest.raises(ConfigError) as caught:
        require_complete(
            config({"adapter.kind": "full", "adapter.dora": True, "objective.p2_gamma": 2, "training.micro_batch": 9})
        )
    for part in ("adapter.dora is true", "objective.p2_gamma is 2.0", "training.micro_batch is 9"):
        assert part in str(caught.value)


def test_an_adapter_and_a_base_are_judged_without_the_rest_of_a_run():
    assert [clash.key for clash in adapter_clashes(AdapterSection(kind="loha"), "nf4")] == ["adapter.kind"]
    assert [clash.key for clash in adapter_clashes(AdapterSection(dora=True), "int8")] == ["adapter.dora"]
    assert [clash.key for clash in adapter_clashes(AdapterSection(start="pissa"), "int8")] == ["adapter.start"]
    assert not [
        *adapter_clashes(AdapterSection(dora=True), "nf4"),
        *adapter_clashes(AdapterSection(kind="loha"), "int8"),
    ]


def test_defaults_make_sense():
    assert clashes(TrainConfig()) == []

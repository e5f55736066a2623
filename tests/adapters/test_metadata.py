"""What an adapter's header says of what was trained."""

from __future__ import annotations

import json

import pytest
from every_family import one_family
from trained_kinds import NAME, section

from sdlora.adapters.metadata import trained_metadata
from sdlora.adapters.trainable import new_adapter
from sdlora.config import TrainConfig, parse_config

LINEAR = {"targets": ("attn1.to_q",), "text_encoder": False}
CONVOLUTIONS = {"targets": ("conv1",), "text_encoder": False}
# kind of tests/trained_kinds.py, where rank is 4 and alpha 2 -> what differs, then rank, alpha and other arguments told
SIZES = [
    ("lora", {}, ("4", "2"), {"conv_dim": "4", "conv_alpha": "2"}),
    ("lora", LINEAR, ("4", "2"), {}),
    ("lora", CONVOLUTIONS, ("4", "2"), {"conv_dim": "4", "conv_alpha": "2"}),
    ("lora", LINEAR | {"ranks": {"attn*.to_q": 8}}, ("8", "4"), {}),
    ("locon", {}, ("4", "2"), {"conv_dim": "2", "conv_alpha": "3"}),
    ("locon", {"conv_rank": 6, "conv_alpha": 0}, ("4", "2"), {"conv_dim": "6", "conv_alpha": "3"}),
    ("rank-stabilized", LINEAR, ("4", "4"), {"rs_lora": "True"}),
    ("pissa", LINEAR, ("8", "4"), {}),
    ("dora", LINEAR, ("4", "2"), {"algo": "lora", "dora_wd": "True"}),
    ("loha", {}, ("4", "2"), {"algo": "loha", "conv_dim": "4", "conv_alpha": "2"}),
    ("lokr", LINEAR | {"lokr_factor": 2}, ("4", "2"), {"algo": "lokr"}),
    ("lokr-whole", {}, (None, None), {"algo": "lokr"}),
    ("full", {}, (None, None), {"algo": "full"}),
]


@one_family
@pytest.mark.parametrize(("kind", "settings", "size", "arguments"), SIZES)
def test_rank_and_alpha_are_those_of_the_written_layers(tiny_base, kind, settings, size, arguments):
    chosen, base = section(kind, **settings), tiny_base("sd1")
    metadata = trained_metadata(TrainConfig(adapter=chosen), base, new_adapter(base, NAME, chosen, 0).layers())
    assert (metadata.get("ss_network_dim"), metadata.get("ss_network_alpha")) == size
    assert json.loads(metadata["ss_network_args"]) == arguments
    assert metadata["ss_network_module"] == ("lycoris.kohya" if "algo" in arguments else "networks.lora")


UNET = {"ss_unet_lr": "0.0002", "ss_learning_rate": "0.0002"}
BOTH = {"text_encoder": True}
RATES = [
    ("sd1", {}, UNET),
    ("sd1", {"adapter": BOTH}, UNET | {"ss_text_encoder_lr": "5e-05"}),
    ("sdxl", {"adapter": BOTH}, UNET | {"ss_text_encoder_lr": "5e-05"}),
    (
        "sdxl",
        {"adapter": BOTH, "optimizer": {"text_encoder_2_learning_rate": 1e-5}},
        UNET | {"ss_text_encoder_lr": "[5e-05, 1e-05]"},
    ),
    (
        "sdxl",
        {
            "adapter": BOTH | {"text_encoder_parts": ["text_encoder_2"]},
            "optimizer": {"text_encoder_2_learning_rate": 1e-5},
        },
        UNET | {"ss_text_encoder_lr": "1e-05"},
    ),
    ("sd1", {"tokens": {"train": "together", "learning_rate": 0.01}}, UNET | {"sdlora_tokens_lr": "0.01"}),
    (
        "sd1",
        {"tokens": {"train": "alone", "learning_rate": 0.01}},
        {"ss_learning_rate": "0.01", "sdlora_tokens_lr": "0.01"},
    ),
]


@one_family
@pytest.mark.parametrize(("family", "values", "told"), RATES)
def test_rates_are_those_of_what_was_trained(tiny_base, family, values, told):
    config, base = parse_config(values), tiny_base(family)
    alone = config.tokens.train == "alone"
    layers = {} if alone else new_adapter(base, NAME, config.adapter, 0).layers()
    metadata = trained_metadata(config, base, layers)
    assert {key: value for key, value in metadata.items() if key.endswith(("_lr", "_rate"))} == told
    assert alone != ("ss_network_module" in metadata)

"""PEFT's folders: read as PEFT means them, and written so that PEFT itself loads them."""

import json
from dataclasses import replace

import pytest
import torch
from adapter_kinds import random_layer
from peft import PeftModel
from safetensors.torch import load_file, save_file

from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.layers import DoraLayer
from sdlora.adapters.live import base_weight
from sdlora.adapters.write import write_adapter
from sdlora.errors import FormatError, OutputError

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"


@pytest.fixture
def folder(tmp_path):
    """A folder of PEFT's with one layer, and what its configuration is replaced by."""

    def make(**settings):
        save_file(
            {
                f"base_model.model.{Q.removeprefix('unet.')}.lora_A.weight": torch.ones(2, 6),
                f"base_model.model.{Q.removeprefix('unet.')}.lora_B.weight": torch.ones(4, 2),
            },
            tmp_path / "adapter_model.safetensors",
        )
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 2, "lora_alpha": 6}, 3.0),
        ({"r": 2, "lora_alpha": 6, "alpha_pattern": {"to_q": 1}}, 0.5),
        ({"r": 2, "lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5),
        ({}, 1.0),
    ],
)
def test_the_configuration_gives_the_scale(folder, settings, scale):
    adapter = read_adapter(folder(**settings))
    assert list(adapter.layers) == [Q]
    assert adapter.layers[Q].scale == pytest.approx(scale)


def test_a_folder_of_one_component_among_several_says_which(folder, tmp_path):
    made = folder(r=2, lora_alpha=2)
    inner = tmp_path / "both" / "text_encoder_2"
    inner.mkdir(parents=True)
    key = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(1, 3), f"{key}.lora_B.weight": torch.ones(2, 1)},
        inner / "adapter_model.safetensors",
    )
    (inner / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4}))
    (tmp_path / "both" / "unet").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (made / name).rename(tmp_path / "both" / "unet" / name)
    adapter = read_adapter(tmp_path / "both")
    assert set(adapter.layers) == {Q, "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"}
    assert adapter.family == "sdxl"
    assert adapter.layers["text_encoder_2.text_model.encoder.layers.0.mlp.fc1"].scale == 4.0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "adapter_config.json cannot be read"),
        ("[]", "adapter_config.json cannot be read"),
        ('{"peft_type": "IA3"}', "is a PEFT adapter of the kind IA3, which is not read; known: LORA, LOHA, LOKR"),
        ('{"init_lora_weights": "pissa_niter_4"}', "was started by pissa_niter_4 and acts on a base that PEFT changes"),
        ('{"lora_alpha": "many"}', "its alpha is 'many'; expected a number"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_refused(folder, content, sentence):
    made = folder()
    (made / "adapter_config.json").write_text(content)
    with pytest.raises(FormatError, match=sentence) as caught:
        read_adapter(made)
    assert str(caught.value).startswith(str(made)) and "\n" not in str(caught.value)


def test_a_folder_without_configuration_or_weights_is_refused(folder, tmp_path):
    made = folder()
    (made / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors: is missing; PEFT keeps the weights there"):
        read_adapter(made)
    (made / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"is a folder without adapter_config\.json; name a \.safetensors file in it"):
        read_adapter(made)


@pytest.mark.parametrize("kind", ["lora", "dora", "mixed ranks", "loha"])
def test_peft_loads_what_is_written_and_does_the_same(tiny_base, make_adapter, tmp_path, kind):
    base = tiny_base()
    adapter = make_adapter(base, text_encoder=False, rank=2, alpha=3.0)
    layers = dict(adapter.layers)
    if kind == "dora":
        layers = {
            path: DoraLayer(layer, base_weight(base, path).flatten(1).norm(dim=1) * 1.1)
            for path, layer in layers.items()
        }
    elif kind == "mixed ranks":
        other = make_adapter(base, text_encoder=False, rank=4, alpha=1.0).layers
        layers |= {path: other[path] for path in list(layers)[::3]}
    elif kind == "loha":
        layers = {path: random_layer("loha", tuple(base_weight(base, path).shape)) for path in layers}
    write_adapter(replace(adapter, layers=layers), tmp_path / "out", "peft")
    weights = {path: base_weight(base, path).clone() for path in layers}
    model = PeftModel.from_pretrained(base.unet, tmp_path / "out" / "unet")
    model.merge_adapter()
    for path, layer in layers.items():
        theirs = model.get_submodule(f"base_model.model.{path.removeprefix('unet.')}").get_base_layer().weight
        torch.testing.assert_close(theirs - weights[path], layer.update_of(weights[path]), atol=2e-6, rtol=1e-4)


def test_peft_loads_text_encoders_by_todays_names(tiny_base, make_adapter, tmp_path):
    base = tiny_base()
    adapter = make_adapter(base)
    write_adapter(adapter, tmp_path / "out", "peft")
    for name, encoder in base.text_encoders.items():
        live = dict(encoder.named_modules())
        keys = load_file(tmp_path / "out" / name / "adapter_model.safetensors")
        paths = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in keys}
        assert paths and all(path in live for path in paths)


@pytest.mark.parametrize("kind", ["tucker", "lokr", "dense", "dora by column", "dora of loha"])
def test_kinds_that_peft_cannot_hold_are_refused_and_nothing_is_written(tmp_path, kind):
    adapter = AdapterFile({CONV: random_layer(kind, (8, 6, 3, 3))}, "sd1")
    for format in ("peft", "diffusers"):
        with pytest.raises(FormatError, match="which diffusers and PEFT do not hold as it is; write the file in kohya"):
            write_adapter(adapter, tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


def test_several_kinds_in_one_file_are_refused(tmp_path):
    layers = {Q: random_layer("lora", (4, 6)), CONV: random_layer("loha", (8, 6, 3, 3))}
    with pytest.raises(FormatError, match="of the kinds LOHA and LORA; PEFT holds one kind in a file, kohya's all"):
        write_adapter(AdapterFile(layers, "sd1"), tmp_path / "out", "peft")
    layers = {Q: random_layer("lora", (4, 6)), CONV: random_layer("dora", (8, 6, 3, 3))}
    with pytest.raises(FormatError, match="some layers are DoRA and some are not"):
        write_adapter(AdapterFile(layers, "sd1"), tmp_path / "out", "peft")


def test_an_earlier_folder_of_pefts_is_replaced_and_nothing_else(tmp_path):
    adapter = AdapterFile({Q: random_layer("lora", (4, 6))}, "sd1")
    write_adapter(adapter, tmp_path / "out", "peft")
    write_adapter(replace(adapter, layers={Q: random_layer("lora", (4, 6), seed=1)}), tmp_path / "out", "peft")
    assert read_adapter(tmp_path / "out").layers[Q].down[0, 0] == random_layer("lora", (4, 6), seed=1).down[0, 0]
    other = tmp_path / "mine"
    other.mkdir()
    (other / "diary.txt").write_text("dear diary")
    with pytest.raises(OutputError, match=r"is there already and holds diary\.txt besides"):
        write_adapter(adapter, other, "peft")
    assert (other / "diary.txt").read_text() == "dear diary"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_lokr_of_whole_factors_with_a_scale_of_its_own_is_refused(tmp_path):
    key = f"base_model.model.{Q.removeprefix('unet.')}"
    save_file(
        {f"{key}.lokr_w1": torch.ones(2, 2), f"{key}.lokr_w2": torch.ones(4, 3)}, tmp_path / "adapter_model.safetensors"
    )
    for settings, sound in (({}, True), ({"alpha": 4}, False), ({"alpha_pattern": {"to_q": 4}}, False)):
        config = {"peft_type": "LOKR", "r": 8, "alpha": 8, **settings}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        if sound:
            assert read_adapter(tmp_path).layers[Q].scale == 1.0
        else:
            with pytest.raises(FormatError, match="1 LoKr layers of whole factors"):
                read_adapter(tmp_path)


def test_the_second_text_encoder_is_known_by_its_width(tmp_path):
    key = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    tensors = {f"{key}.lora_A.weight": torch.ones(1, 1280), f"{key}.lora_B.weight": torch.ones(5120, 1)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert list(read_adapter(tmp_path).layers) == ["text_encoder_2.text_model.encoder.layers.0.mlp.fc1"]

"""Stripping: text goes, weights stay byte for byte; layers go, the others stay what they were."""

import json
from dataclasses import replace

import pytest
import torch
from adapter_kinds import random_layer

from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.inspect import inspect_adapter
from sdlora.adapters.strip import strip_adapter
from sdlora.adapters.write import write_adapter
from sdlora.errors import ConfigError, FormatError, OutputError
from sdlora.headers import read_header
from sdlora.storage import rewrite_metadata, sha256_of_tensor_data

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
UP = "unet.up_blocks.1.attentions.0.proj_in"
TEXT_1 = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
TEXT_2 = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
TEXT = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_output_name": "cat",
    "ss_sd_model_name": "/home/anna/sd.safetensors",
    "ss_tag_frequency": '{"1_anna": {"anna": 3}}',
    "ss_seed": "3",
    "ss_text_encoder_lr": "1e-05",
    "ss_unet_lr": "0.0001",
}
HASHES = {"sshs_model_hash", "sshs_legacy_hash"}


def adapter(*paths, words=(), family="sdxl", kind="lora"):
    layers = {path: random_layer(kind, (64, 48), seed) for seed, path in enumerate(paths or (Q, UP, TEXT_1, TEXT_2))}
    tokens = {name: {"text_encoder": torch.full((2, 768), 0.3)} for name in words}
    return AdapterFile(layers, family, TEXT, tokens)


def text_of(path):
    return read_header(path).metadata


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_private_text_goes_and_the_weights_stay(tmp_path, format):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_adapter(adapter(), source, format)
    stripped = strip_adapter(source, target)
    assert stripped.removed == {"ss_sd_model_name": "a path", "ss_tag_frequency": "captions"}
    assert text_of(target) == {key: text for key, text in text_of(source).items() if key not in stripped.removed}
    assert sha256_of_tensor_data(target) == sha256_of_tensor_data(source)
    assert "anna" not in target.read_bytes().decode("latin-1")
    assert inspect_adapter(target).problems == []


@pytest.mark.parametrize(("keep", "kept"), [("minimal", {"ss_base_model_version"}), ("none", set())])
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_less_text_still_leaves_what_the_file_itself_needs(tmp_path, format, keep, kept):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_adapter(adapter(words=["zorb"]), source, format)
    stripped = strip_adapter(source, target, keep=keep)
    own = {"lora_adapter_metadata", "format"} if format == "diffusers" else set()
    assert text_of(target).keys() == kept | HASHES | own | {"sdlora_words"}
    assert stripped.removed["ss_seed"] == "not needed to use what is left"
    read = read_adapter(target)
    assert read.layers.keys() == adapter().layers.keys() and read.tokens.keys() == {"zorb"}


def test_pefts_folder_and_its_words_are_stripped_too(tmp_path):
    write_adapter(adapter(Q, TEXT_1, words=["zorb"]), tmp_path / "a", "peft")
    settings = tmp_path / "a" / "unet" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": "/home/anna/sd"}))
    word = tmp_path / "a" / "embeddings" / "zorb.safetensors"
    rewrite_metadata(word, word, text_of(word) | {"modelspec.author": "anna"})
    stripped = strip_adapter(tmp_path / "a", tmp_path / "b")
    assert stripped.shortened == {"adapter_config.json": "a path or an address in base_model_name_or_path"}
    files = [file for file in (tmp_path / "b").rglob("*") if file.is_file()]
    assert len(files) == 5 and not any(b"anna" in file.read_bytes() for file in files)
    assert read_adapter(tmp_path / "b").tokens.keys() == {"zorb"}


def test_a_words_file_that_stays_where_it_is_is_spoken_of(tmp_path):
    write_adapter(adapter(words=["zorb"]), tmp_path / "a.safetensors")
    word = tmp_path / "embeddings" / "zorb.safetensors"
    rewrite_metadata(word, word, text_of(word) | {"modelspec.author": "anna"})
    assert strip_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors").telling == {
        word: ("modelspec.author",)
    }
    elsewhere = strip_adapter(tmp_path / "a.safetensors", tmp_path / "c" / "b.safetensors")
    assert elsewhere.telling == {}
    assert "modelspec.author" not in text_of(tmp_path / "c" / "embeddings" / "zorb.safetensors")
    strip_adapter(word, word, overwrite=True)
    assert text_of(word)["sdlora_word"] == "zorb" and "modelspec.author" not in text_of(word)


def test_a_words_file_that_stays_is_spoken_of_where_another_word_is_written(tmp_path):
    write_adapter(adapter(words=["zorb", "blick"]), tmp_path / "a.safetensors")
    words = tmp_path / "embeddings"
    for name in ("zorb", "blick"):
        file = words / f"{name}.safetensors"
        rewrite_metadata(file, file, text_of(file) | {"modelspec.author": "anna"})
    (words / "zorb.safetensors").rename(tmp_path / "zorb.safetensors")  # where programs look first
    stripped = strip_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert stripped.files == (tmp_path / "b.safetensors", words / "zorb.safetensors")
    assert stripped.telling == {
        tmp_path / "zorb.safetensors": ("modelspec.author",),
        words / "blick.safetensors": ("modelspec.author",),
    }


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_layers_go_by_the_beginning_of_their_path(tmp_path, format):
    write_adapter(adapter(), tmp_path / "a.safetensors", format)
    target = tmp_path / "b.safetensors"
    stripped = strip_adapter(tmp_path / "a.safetensors", target, drop=["text_encoder", "unet.up_blocks.1"])
    assert stripped.dropped == {"text_encoder": 1, "unet.up_blocks.1": 1}
    read = read_adapter(target)
    assert set(read.layers) == {Q, TEXT_2} and read.family == "sdxl"
    assert inspect_adapter(target).format == format
    before = read_adapter(tmp_path / "a.safetensors").layers
    assert all(
        torch.equal(one, two)
        for path in read.layers
        for one, two in zip(before[path].tensors(), read.layers[path].tensors(), strict=True)
    )
    assert read.metadata["ss_text_encoder_lr"] == "1e-05"  # one of them is left
    strip_adapter(tmp_path / "a.safetensors", target, drop=["text_encoder", "text_encoder_2"], overwrite=True)
    metadata = read_adapter(target).metadata
    assert "ss_text_encoder_lr" not in metadata and metadata["ss_unet_lr"] == "0.0001"
    assert {"ss_sd_model_name", "ss_tag_frequency"}.isdisjoint(metadata)


@pytest.mark.parametrize("bundle", [False, True])
def test_words_are_dropped_or_stay_as_they_lay(tmp_path, bundle):
    source, target = tmp_path / "a.safetensors", tmp_path / "b" / "b.safetensors"
    write_adapter(adapter(words=["zorb", "blick"]), source, bundle=bundle)
    stripped = strip_adapter(source, target, drop=["words"])
    assert stripped.dropped == {"words": 2} and read_adapter(target).tokens == {}
    assert "sdlora_words" not in text_of(target) and not (tmp_path / "b" / "embeddings").exists()
    strip_adapter(source, target, drop=["unet.up_blocks"], overwrite=True)
    assert read_adapter(target).tokens.keys() == {"zorb", "blick"}
    assert (tmp_path / "b" / "embeddings").exists() is not bundle


@pytest.mark.parametrize(
    ("drop", "sentence"),
    [
        (["text"], "--drop text: the adapter has no layer that begins with 'text'"),
        ([""], "no layer that begins with ''"),
        (["words"], "--drop words: the adapter has no new words"),
        (["unet", "text_encoder", "text_encoder_2"], "nothing would be left of the adapter"),
    ],
)
def test_what_drops_nothing_or_all_is_refused(tmp_path, drop, sentence):
    write_adapter(adapter(), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=sentence):
        strip_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", drop=drop)
    assert not (tmp_path / "b.safetensors").exists()


def test_targets_and_formats_that_do_not_go(tmp_path):
    write_adapter(adapter(), tmp_path / "a.safetensors")
    with pytest.raises(OutputError, match="is there already"):
        strip_adapter(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    comfy = {"diffusion_model.input_blocks.1.1.proj_in": random_layer("lora", (8, 6))}
    tensors = {
        f"{path}.lora_{half}.weight": tensor
        for path, layer in comfy.items()
        for half, tensor in (("down", layer.down), ("up", layer.up))
    }
    from safetensors.torch import save_file

    save_file(
        tensors | {name.replace("1.1", "2.1"): tensor.clone() for name, tensor in tensors.items()},
        tmp_path / "c.safetensors",
    )
    with pytest.raises(FormatError, match="is in the format of comfyui, which is read alone; convert it"):
        strip_adapter(tmp_path / "c.safetensors", tmp_path / "d.safetensors", drop=["unet.down_blocks.0.attentions.0"])
    strip_adapter(tmp_path / "c.safetensors", tmp_path / "d.safetensors")  # text goes from any format
    assert (
        read_adapter(tmp_path / "d.safetensors").layers.keys() == read_adapter(tmp_path / "c.safetensors").layers.keys()
    )


def test_magnitudes_and_other_kinds_come_through_a_drop(tmp_path):
    for kind in ("dora", "lokr"):
        write_adapter(replace(adapter(kind=kind)), tmp_path / f"{kind}.safetensors")
        strip_adapter(tmp_path / f"{kind}.safetensors", tmp_path / f"{kind}-2.safetensors", drop=["text_encoder_2"])
        assert inspect_adapter(tmp_path / f"{kind}-2.safetensors").modules == {
            "unet": 2,
            "text_encoder": 1,
            "text_encoder_2": 0,
        }

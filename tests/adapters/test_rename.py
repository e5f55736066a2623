"""Renaming: other text, names of words and keys before tensors that stay byte for byte."""

import json
from dataclasses import replace

import pytest
import torch
from adapter_kinds import random_layer
from safetensors.torch import save_file

from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.inspect import inspect_adapter
from sdlora.adapters.rename import rename_adapter
from sdlora.adapters.strip import strip_adapter
from sdlora.adapters.write import write_adapter
from sdlora.errors import ConfigError, FormatError, OutputError
from sdlora.headers import read_header
from sdlora.storage import rewrite_metadata, serialize_tensors, sha256_of_tensor_data

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = {
    "ss_base_model_version": "sd_v1",
    "ss_output_name": "old",
    "modelspec.title": "old",
    "modelspec.trigger_phrase": "zorb, a zorblin by zorb",
    "ss_tag_frequency": json.dumps({"old": {"zorb": 3}, "old-2": {"a zorb": 1, "zorblin": 2}, "older": {"x": 1}}),
    "ss_dataset_dirs": json.dumps({"old": {"n_repeats": 2, "img_count": 3}}),
    "ss_num_train_images": "12",
}


def vectors(value, *names):
    return {name: {"text_encoder": torch.full((2, 768), value)} for name in names}


def adapter(*names, **text):
    return AdapterFile({Q: random_layer("lora", (64, 48))}, "sd1", TEXT | text, vectors(0.3, *names))


def text_of(path):
    return read_header(path).metadata


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_name_and_a_trigger_leave_the_weights_as_they_are(tmp_path, format):
    source, target = tmp_path / "old.safetensors", tmp_path / "there" / "new.safetensors"
    write_adapter(adapter(), source, format)
    renamed = rename_adapter(source, target, trigger="a blick")
    assert (renamed.name, renamed.trigger, renamed.files) == ("new", "a blick", (target,))
    assert sha256_of_tensor_data(target) == sha256_of_tensor_data(source) == text_of(target)["sshs_model_hash"]
    assert read_header(target).tensors == read_header(source).tensors
    text = text_of(target)
    assert text["ss_output_name"] == text["modelspec.title"] == "new"
    assert text["modelspec.trigger_phrase"] == "a blick"
    assert json.loads(text["ss_tag_frequency"]) == {"new": {"a blick": 12}}
    assert json.loads(text["ss_dataset_dirs"]) == {"new": {"n_repeats": 2, "img_count": 3}}
    assert inspect_adapter(target).problems == []


def test_without_a_trigger_tags_stay_under_the_new_name(tmp_path):
    write_adapter(adapter(), tmp_path / "a.safetensors")
    rename_adapter(tmp_path / "a.safetensors", tmp_path / "a.safetensors", name="my new", overwrite=True)
    tags = json.loads(text_of(tmp_path / "a.safetensors")["ss_tag_frequency"])
    assert list(tags) == ["my new", "my new-2", "older"]
    assert text_of(tmp_path / "a.safetensors")["modelspec.trigger_phrase"] == TEXT["modelspec.trigger_phrase"]


def test_a_folder_keeps_its_name_where_another_has_the_new_one(tmp_path):
    tags = {"dog": {"woof": 5}, "cat": {"meow": 3}, "cat-2": {"purr": 1}}
    folders = {"cat": {"n_repeats": 1, "img_count": 3}, "cat-2": {"n_repeats": 4}, "dog-2": {"n_repeats": 9}}
    text = {"ss_output_name": "cat", "ss_tag_frequency": json.dumps(tags), "ss_dataset_dirs": json.dumps(folders)}
    write_adapter(adapter(**text), tmp_path / "a.safetensors")
    rename_adapter(tmp_path / "a.safetensors", tmp_path / "dog.safetensors")
    text = text_of(tmp_path / "dog.safetensors")
    assert json.loads(text["ss_tag_frequency"]) == {"dog": {"woof": 5}, "cat": {"meow": 3}, "dog-2": {"purr": 1}}
    assert json.loads(text["ss_dataset_dirs"]) == {
        "dog": folders["cat"], "cat-2": folders["cat-2"], "dog-2": folders["dog-2"],
    }  # fmt: skip


def test_a_word_beside_gets_a_file_of_its_new_name(tmp_path):
    source, target = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    write_adapter(adapter("zorb", "blick"), source)
    before = (tmp_path / "embeddings" / "zorb.safetensors").read_bytes()
    renamed = rename_adapter(source, target, words={"zorb": "<glim>"})
    assert renamed.words == {"zorb": "<glim>"}
    read = read_adapter(target)
    assert set(read.tokens) == {"<glim>", "blick"}
    assert torch.equal(read.tokens["<glim>"]["text_encoder"], vectors(0.3, "x")["x"]["text_encoder"])
    (own,) = [file for file in (tmp_path / "embeddings").iterdir() if "glim" in file.name]
    assert renamed.files == (target, own)  # blick's lies there already
    assert text_of(own)["sdlora_word"] == text_of(own)["modelspec.title"] == "<glim>"
    assert (tmp_path / "embeddings" / "zorb.safetensors").read_bytes() == before
    assert read_adapter(source).tokens.keys() == {"zorb", "blick"}
    text = text_of(target)
    assert text["modelspec.trigger_phrase"] == "<glim>, a zorblin by <glim>"
    assert json.loads(text["ss_tag_frequency"])["new-2"] == {"a <glim>": 1, "zorblin": 2}


def test_in_another_folder_all_words_come_along(tmp_path):
    write_adapter(adapter("zorb", "blick"), tmp_path / "old.safetensors")
    rename_adapter(
        tmp_path / "old.safetensors", tmp_path / "b" / "x.safetensors", words={"zorb": "blick", "blick": "zorb"}
    )
    assert sorted(file.name for file in (tmp_path / "b" / "embeddings").iterdir()) == [
        "blick.safetensors",
        "zorb.safetensors",
    ]
    assert text_of(tmp_path / "b" / "x.safetensors")["modelspec.trigger_phrase"] == "blick, a zorblin by blick"
    assert set(read_adapter(tmp_path / "b" / "x.safetensors").tokens) == {"zorb", "blick"}


def test_another_adapters_word_of_the_new_name_is_not_replaced(tmp_path):
    write_adapter(replace(adapter(), tokens=vectors(0.5, "blick")), tmp_path / "other.safetensors")
    write_adapter(adapter("zorb"), tmp_path / "old.safetensors")
    with pytest.raises(OutputError, match=r"blick\.safetensors: is there already and knows 'blick' with other vectors"):
        rename_adapter(tmp_path / "old.safetensors", tmp_path / "new.safetensors", words={"zorb": "blick"})
    assert not (tmp_path / "new.safetensors").exists()
    assert read_adapter(tmp_path / "other.safetensors").tokens
    write_adapter(adapter("zorb", "glim"), tmp_path / "two.safetensors")
    before = sorted((tmp_path / "embeddings").iterdir())
    with pytest.raises(OutputError, match="with other vectors"):
        rename_adapter(tmp_path / "two.safetensors", tmp_path / "new.safetensors", words={"glim": "a", "zorb": "blick"})
    assert sorted((tmp_path / "embeddings").iterdir()) == before  # none of the words is left behind


def test_a_bundled_word_is_renamed_by_its_keys(tmp_path):
    source, target = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    write_adapter(adapter("zorb", "blick"), source, bundle=True)
    rename_adapter(source, target, words={"zorb": "gl.im"})
    assert "bundle_emb.gl.im.string_to_param.*" in read_header(target).tensors
    assert set(read_adapter(target).tokens) == {"gl.im", "blick"}
    assert sha256_of_tensor_data(target) == sha256_of_tensor_data(source)
    assert "sshs_legacy_hash" not in text_of(target)  # it is of the keys too
    assert inspect_adapter(target).problems == []


def test_pefts_folder_is_renamed_with_its_words(tmp_path):
    both = adapter("zorb")
    both = replace(both, layers=both.layers | {"text_encoder.text_model.encoder.layers.0.mlp.fc1": both.layers[Q]})
    write_adapter(both, tmp_path / "old", "peft")
    target = tmp_path / "new"
    renamed = rename_adapter(tmp_path / "old", target, words={"zorb": "glim"})
    assert renamed.name == "new"
    assert sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()) == [
        "embeddings/glim.safetensors",
        "text_encoder/adapter_config.json",
        "text_encoder/adapter_model.safetensors",
        "unet/adapter_config.json",
        "unet/adapter_model.safetensors",
    ]
    for part in ("unet", "text_encoder"):
        place = f"{part}/adapter_model.safetensors"
        assert text_of(target / place)["ss_output_name"] == "new"
        assert sha256_of_tensor_data(target / place) == sha256_of_tensor_data(tmp_path / "old" / place)
    assert read_adapter(target).tokens.keys() == {"glim"}
    rename_adapter(target, target, name="again", overwrite=True)
    assert text_of(target / "unet/adapter_model.safetensors")["ss_output_name"] == "again"
    with pytest.raises(FormatError, match="is a part of PEFT's folder"):
        rename_adapter(target / "unet/adapter_model.safetensors", tmp_path / "x.safetensors")


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_an_embedding_is_called_by_its_file(tmp_path, family):
    words = vectors(0.3, "zorb")
    if family == "sdxl":
        words["zorb"]["text_encoder_2"] = torch.full((2, 1280), 0.4)
    source, target = tmp_path / "zorb.safetensors", tmp_path / "glim.safetensors"
    write_adapter(AdapterFile({}, family, TEXT, words), source)
    renamed = rename_adapter(source, target)
    assert (renamed.name, renamed.words) == ("glim", {"zorb": "glim"})
    assert read_adapter(target).tokens.keys() == {"glim"}
    assert read_adapter(target).token_digests()["glim"] == read_adapter(source).token_digests()["zorb"]
    text = text_of(target)
    assert text["modelspec.trigger_phrase"] == text["ss_output_name"] == text["sdlora_word"] == "glim"


def test_diffusers_embedding_is_renamed_by_its_key(tmp_path):
    save_file({"<zorb>": torch.ones(768)}, tmp_path / "a.safetensors")
    rename_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", words={"<zorb>": "<gl.im>"})
    assert list(read_header(tmp_path / "b.safetensors").tensors) == ["<gl.im>"]
    assert read_adapter(tmp_path / "b.safetensors").tokens.keys() == {"<gl.im>"}
    with pytest.raises(ConfigError, match=r"its format cannot call a word 'gl\.im'; choose another name"):
        rename_adapter(tmp_path / "a.safetensors", tmp_path / "c.safetensors", name="gl.im")
    with pytest.raises(ConfigError, match="its format cannot call a word 'clip_l'"):
        rename_adapter(tmp_path / "a.safetensors", tmp_path / "c.safetensors", name="clip_l")
    assert not (tmp_path / "c.safetensors").exists()


def test_words_that_a_header_marks_change_places(tmp_path):
    """cloneofsimo's: a tensor called as the word, and an entry that says so."""
    tensors = {
        f"text_encoder:{number}:{half}": torch.ones(shape)
        for number in range(48)
        for half, shape in (("down", (1, 768)), ("up", (768, 1)))
    }
    tensors |= {"<s1>": torch.full((768,), 1.0), "<s2>": torch.full((768,), 2.0)}
    marks = {"<s1>": "<embed>", "<s2>": "<embed>", "text_encoder:0:rank": "1"}
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    source.write_bytes(serialize_tensors(tensors, marks))
    rename_adapter(source, target, words={"<s1>": "<s2>", "<s2>": "cat"})
    words = read_adapter(target).tokens
    assert {word: float(parts["text_encoder"].mean()) for word, parts in words.items()} == {"<s2>": 1.0, "cat": 2.0}
    assert text_of(target).get("<s1>") is None and len(read_adapter(target).layers) == 48
    strip_adapter(target, target, keep="none", overwrite=True)
    assert read_adapter(target).tokens.keys() == {"<s2>", "cat"}  # the marks are the file's own
    for name in ("text_encoder:0:up", "unet:500:down", "ss_output_name"):
        with pytest.raises(ConfigError, match="its format cannot call a word"):
            rename_adapter(source, tmp_path / "c.safetensors", words={"<s1>": name})
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"nobody": "x"}, "knows no word 'nobody'; its words are 'blick', 'zorb'"),
        ({"zorb": "blick"}, "two words would be called 'blick'"),
        ({"zorb": "BLICK"}, "two words would be called 'zorb'|two words would be called 'BLICK'"),
        ({"zorb": "x", "blick": "x"}, "two words would be called 'x'"),
        ({"zorb": "  "}, "expected one line of 1 to 500 characters"),
        ({"zorb": "a\nb"}, "expected one line of 1 to 500 characters"),
        ({"zorb": "a\x1b[2J"}, "expected one line"),
        ({"zorb": "x" * 501}, "expected one line"),
    ],
)
@pytest.mark.parametrize("bundle", [False, True])
def test_names_that_no_word_can_have_are_refused(tmp_path, bundle, words, sentence):
    write_adapter(adapter("zorb", "blick"), tmp_path / "old.safetensors", bundle=bundle)
    with pytest.raises(ConfigError, match=sentence):
        rename_adapter(tmp_path / "old.safetensors", tmp_path / "new.safetensors", words=words)
    assert not (tmp_path / "new.safetensors").exists()


def test_an_embedding_has_one_name(tmp_path):
    write_adapter(AdapterFile({}, "sd1", {}, vectors(0.3, "zorb")), tmp_path / "zorb.safetensors")
    for options, sentence in (
        ({"name": "a", "words": {"zorb": "b"}}, "--name is 'a', and the embedding's word 'b', which is one thing"),
        ({"trigger": "a"}, "--trigger is 'a', and the embedding's word 'x'"),
        ({"words": {"y": "b"}}, "is the word 'zorb'; name that"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            rename_adapter(tmp_path / "zorb.safetensors", tmp_path / "x.safetensors", **options)


def test_what_cannot_be_renamed_is_said(tmp_path):
    write_adapter(adapter(), tmp_path / "a.safetensors")
    with pytest.raises(OutputError, match="is there already; name another, or say --overwrite"):
        rename_adapter(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="adapters are written as safetensors"):
        rename_adapter(tmp_path / "a.safetensors", tmp_path / "b.pt")
    torch.save({"x": torch.ones(1, 768)}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match="is a pickle, which has no header to change; convert it"):
        rename_adapter(tmp_path / "x.pt", tmp_path / "y.safetensors")
    write_adapter(adapter("zorb"), tmp_path / "w.safetensors")
    (tmp_path / "embeddings" / "zorb.safetensors").unlink()
    with pytest.raises(FormatError, match=r"w\.safetensors: was trained together with the new word 'zorb'"):
        rename_adapter(tmp_path / "w.safetensors", tmp_path / "y.safetensors")


@pytest.mark.parametrize(
    "odd", ["", "[1]", '{"old": 3, "b": {"zorb": "many"}}', '{"a": {"zorb": NaN}}', "[" * 5000, '{"old": "\\ud800"}']
)
def test_odd_json_in_the_header_is_no_obstacle(tmp_path, odd):
    source = tmp_path / "old.safetensors"
    write_adapter(adapter("zorb"), source)
    text = text_of(source) | {"ss_tag_frequency": odd, "ss_dataset_dirs": odd, "ss_num_train_images": "9" * 5000}
    rewrite_metadata(source, source, text)
    rename_adapter(source, tmp_path / "new.safetensors", words={"zorb": "glim"})
    assert read_adapter(tmp_path / "new.safetensors").tokens.keys() == {"glim"}
    rename_adapter(source, tmp_path / "new.safetensors", trigger="glim", overwrite=True)
    assert json.loads(text_of(tmp_path / "new.safetensors")["ss_tag_frequency"]) == {"new": {"glim": 1}}

import json
import struct

import pytest

from sdlora.app.library import Library, trigger_of
from sdlora.errors import FormatError


def safetensors(tensor="lora_unet_x.lora_down.weight", **metadata):
    entries = {"__metadata__": metadata, tensor: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


def test_adapters_are_found_in_subfolders_by_name(library_folder):
    (entry,) = Library(library_folder).adapters()
    assert entry.name == "demo/adapter"
    assert entry.trigger == "sks ball"
    assert str(library_folder) not in entry.id


def test_broken_file_is_listed_with_its_reason_and_not_offered(library_folder):
    (entry,) = Library(library_folder).unusable()
    assert entry.name == "broken"
    assert entry.problem.startswith("is a web page saved under this name")


def test_checkpoints_and_models_are_no_adapters(tmp_path):
    (tmp_path / "base.safetensors").write_bytes(safetensors("model.diffusion_model.input_blocks.0.0.weight"))
    (tmp_path / "vae.safetensors").write_bytes(safetensors("decoder.conv_in.weight"))
    (tmp_path / "odd.safetensors").write_bytes(safetensors(sdlora_words="[]"))
    problems = {entry.name: entry.problem for entry in Library(tmp_path).unusable()}
    assert problems == {
        "base": "is a whole checkpoint, not an adapter; give it as --base",
        "odd": "its header entry sdlora_words does not name words; train or export the adapter again",
        "vae": "holds no adapter (1 tensors)",
    }


@pytest.mark.parametrize(
    ("tensor", "metadata", "word"),
    [
        ("emb_params", {}, "vector"),
        ("clip_l", {"sdlora_word": "zorb"}, "zorb"),
        ("<cat-toy>", {"modelspec.trigger_phrase": "other"}, "<cat-toy>"),
    ],
)
def test_an_embedding_is_listed_as_one_with_its_word(tmp_path, tensor, metadata, word):
    (tmp_path / "vector.safetensors").write_bytes(safetensors(tensor, **metadata))
    (entry,) = Library(tmp_path).adapters()
    assert (entry.name, entry.trigger, entry.problem) == ("vector (embedding)", word, "")


def test_the_words_beside_an_adapter_are_listed_with_it_alone(tmp_path):
    """Another's word in the same folder, and one whose adapter is gone, are listed for themselves."""
    (tmp_path / "run" / "embeddings").mkdir(parents=True)
    path = tmp_path / "run" / "pair.safetensors"
    path.write_bytes(safetensors(sdlora_words='{"zorb": "ab"}'))
    for word in ("zorb", "other"):
        (tmp_path / "run" / "embeddings" / f"{word}.safetensors").write_bytes(safetensors("emb_params"))
    library = Library(tmp_path)
    assert [entry.name for entry in library.adapters()] == ["run/embeddings/other (embedding)", "run/pair"]
    assert library.unusable() == []
    path.unlink()
    assert [entry.trigger for entry in library.adapters()] == ["other", "zorb"]


def test_bundles_and_files_that_only_name_words_are_adapters(tmp_path):
    (tmp_path / "bundle.safetensors").write_bytes(safetensors("bundle_emb.zorb.clip_l"))
    (tmp_path / "names.safetensors").write_bytes(safetensors("x.y", sdlora_words='{"zorb": "ab"}'))
    assert [entry.name for entry in Library(tmp_path).adapters()] == ["bundle", "names"]


def test_training_state_and_hidden_files_are_not_looked_at(tmp_path):
    for place in ("run/checkpoints/state", ".cache/x", ".partial"):
        path = tmp_path / f"{place}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(safetensors())
    assert Library(tmp_path).adapters() == Library(tmp_path).unusable() == []


def test_file_that_appears_changes_or_goes_is_noticed(tmp_path):
    library, path = Library(tmp_path), tmp_path / "a.safetensors"
    assert library.adapters() == []
    path.write_bytes(safetensors(**{"modelspec.trigger_phrase": "one"}))
    assert [entry.trigger for entry in library.adapters()] == ["one"]
    path.write_bytes(safetensors(**{"modelspec.trigger_phrase": "three"}))
    assert [entry.trigger for entry in library.adapters()] == ["three"]
    path.unlink()
    assert library.adapters() == []


def test_missing_folder_is_an_empty_library(tmp_path):
    assert Library(tmp_path / "nowhere").adapters() == []


@pytest.mark.parametrize("id", ["../secret", "/etc/passwd", "demo/adapter", "demo/adapter.safetensors", "0" * 16])
def test_only_an_id_of_the_catalogue_finds_a_file(library_folder, id):
    with pytest.raises(FormatError, match="press Refresh"):
        Library(library_folder).find(id)


@pytest.mark.parametrize(
    ("metadata", "trigger"),
    [
        ({}, ""),
        ({"modelspec.trigger_phrase": " sks \n cat "}, "sks cat"),
        ({"ss_tag_frequency": '{"10_cat": {"cat": 3, "sks": 12}}'}, "sks"),
        ({"ss_tag_frequency": "{}"}, ""),
        ({"ss_tag_frequency": "not json"}, ""),
        ({"ss_tag_frequency": "[1, 2]"}, ""),
        ({"ss_tag_frequency": '{"a": {"b": "many"}}'}, ""),
        ({"ss_tag_frequency": "[" * 100_000}, ""),
    ],
)
def test_trigger(metadata, trigger):
    assert trigger_of(metadata) == trigger

import json
import struct

import pytest
import torch

from sdlora import AdapterFile, LoraLayer, write_adapter
from sdlora.app.library import Library
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


def test_words_that_no_file_can_be_called_are_a_problem_of_their_own_file(library_folder):
    (library_folder / "odd.safetensors").write_bytes(safetensors(sdlora_words='{"\\ud800": "x"}'))
    library = Library(library_folder)
    assert [entry.name for entry in library.adapters()] == ["demo/adapter"]
    entry = next(entry for entry in library.unusable() if entry.name == "odd")
    assert entry.problem.startswith("its header entry sdlora_words does not name words")


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


def test_a_folder_that_peft_has_written_is_one_adapter_with_its_words(tmp_path):
    layer = LoraLayer(torch.ones(2, 6), torch.ones(4, 2), 2.0)
    words = {"zorb": {"text_encoder": torch.ones(1, 768)}}
    adapter = AdapterFile({"unet.conv_in": layer}, "sd1", {"modelspec.trigger_phrase": "sks ball"}, words)
    write_adapter(adapter, tmp_path / "cats" / "mine", "peft")
    library = Library(tmp_path)
    (entry,) = library.adapters()
    assert (entry.name, entry.path, entry.trigger) == ("cats/mine", tmp_path / "cats" / "mine", "sks ball")
    (tmp_path / "cats" / "mine" / "unet" / "adapter_config.json").write_text("{")
    assert library.adapters()[0].name == "cats/mine/embeddings/zorb (embedding)"  # the adapter brings it no more
    assert [entry.problem for entry in library.unusable()] == [
        "adapter_config.json cannot be read (JSONDecodeError); export the adapter again"
    ]

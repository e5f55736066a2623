"""What the library of a folder finds."""

import hashlib
import json
import os
import shutil
import struct

import pytest
import torch
from library_files import KEY, PATH, folder, library, make, names
from safetensors.torch import save_file

from sdlora.adapters.file import AdapterFile
from sdlora.adapters.layers import LoraLayer
from sdlora.adapters.write import write_adapter
from sdlora.errors import ConfigError, FormatError
from sdlora.sharing.library import AdapterLibrary
from sdlora.storage import sha256_of_file, sha256_of_tensor_data

__all__ = ["folder", "library"]


# --- what is found -------------------------------------------------------------------------------------


def test_one_content_is_one_entry_with_all_its_files(library, folder):
    cats, dogs = library.search()
    assert (cats.name, dogs.name) == ("cats/v1", "dogs/v1")
    assert cats.paths == [folder / "cats" / "v1.safetensors", folder / "copied.safetensors"]
    path = cats.paths[0]
    assert cats.id == sha256_of_file(path) and cats.autov2 == cats.id[:10]
    assert cats.autov3 == sha256_of_tensor_data(path)[:12] and cats.autov1 == ""
    assert cats.modified == pytest.approx(max(file.stat().st_mtime for file in cats.paths), abs=1e-3)
    facts = cats.facts
    assert (facts.title, facts.triggers, facts.words) == ("Grey Cats", ["zorb", "sks cat"], [])
    assert (facts.family, facts.format, facts.kinds, facts.rank) == ("sd1", "kohya", {"lora": 1}, 2)
    assert facts.modules == {"unet": 1, "text_encoder": 0, "text_encoder_2": 0}
    assert (facts.base, facts.base_hash) == ("dreamy_v8.safetensors", "879db523c3")
    assert facts.tags == {"grey fur": 12, "whiskers": 7}
    assert (facts.bytes, facts.problems) == (path.stat().st_size, [])
    (refused,) = library.refused()
    assert refused.path == folder / "page.safetensors" and refused.problem.startswith("is a web page")
    assert json.loads(json.dumps(cats.to_json()))["paths"] == [str(path) for path in cats.paths]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"text": "GREY cat"}, ["cats/v1"]),
        ({"text": "whisk dreamy"}, ["cats/v1"]),
        ({"text": "v1"}, ["cats/v1", "dogs/v1"]),
        ({"text": "v1 dog"}, ["dogs/v1"]),
        ({"text": "cat dog"}, []),
        ({"text": "copied"}, ["copied"]),  # the copy by whose name it was asked for
        ({"name": "PIED", "family": "sd1"}, ["copied"]),
        ({"name": "grey cats"}, ["cats/v1"]),
        ({"name": "whiskers"}, []),
        ({"trigger": "SKS"}, ["cats/v1"]),
        ({"trigger": "dog"}, ["dogs/v1"]),  # its commonest tag, having no phrase
        ({"tag": "grey fur"}, ["cats/v1"]),
        ({"tag": "zorb"}, []),
        ({"family": "sd1"}, ["cats/v1"]),
        ({"family": "sdxl", "name": "v1"}, ["dogs/v1"]),
        ({"family": "unknown"}, []),
        ({"kind": "lora"}, ["cats/v1", "dogs/v1"]),
        ({"kind": "embedding"}, []),
        ({"base": "Dreamy"}, ["cats/v1"]),
        ({"base": "879DB5"}, ["cats/v1"]),
        ({"base": "879d"}, []),
        ({"limit": 1}, ["cats/v1"]),
    ],
)
def test_search(library, wanted, found):
    assert names(library.search(**wanted)) == found


@pytest.mark.parametrize("text", ["%", "_", '"', "*", "'", "';--", "a* OR b", "NEAR(", "\\", "zorb*", "c_ts"])
def test_signs_of_query_languages_are_letters(library, text):
    found = {"%": ["dogs/v1"], "_": ["cats/v1", "dogs/v1"]}.get(text, [])
    assert names(library.search(text)) == found
    assert names(library.search(tag=text)) == (["dogs/v1"] if found else [])
    assert names(library.search(base=text)) == (["cats/v1"] if text == "_" else [])
    assert names(library.search(name=text)) == names(library.search(trigger=text)) == []
    for filter in ("hash", "kind", "family"):
        with pytest.raises(ConfigError):
            library.search(**{filter: text})
    assert len(library.search()) == 2


def test_an_embedding_under_two_names_has_the_word_that_was_asked_for(tmp_path):
    for word in ("alpha", "beta"):
        save_file({"emb_params": torch.ones(2, 768)}, tmp_path / f"{word}.safetensors")
    library = AdapterLibrary(tmp_path)
    library.refresh()
    for wanted in ({"trigger": "beta"}, {"text": "beta"}, {"name": "beta"}):
        (entry,) = library.search(**wanted)
        assert list(entry.facts.words) == ["beta"] and len(entry.paths) == 2


def test_a_long_question_is_answered(library):
    assert names(library.search("v1 " * 5000)) == ["cats/v1", "dogs/v1"]
    assert library.search("x" * 100_000) == library.search(tag="y" * 100_000) == []


def test_names_are_told_first_then_triggers_then_the_rest(tmp_path):
    make(tmp_path / "c.safetensors", {"modelspec.trigger_phrase": "x", "ss_tag_frequency": '{"a": {"moss": 1}}'}, 1.0)
    make(tmp_path / "b.safetensors", {"modelspec.trigger_phrase": "moss"}, 2.0)
    make(tmp_path / "z-moss.safetensors", {}, 3.0)
    make(tmp_path / "a.safetensors", {"ss_sd_model_name": "moss"}, 4.0)
    library = AdapterLibrary(tmp_path)
    library.refresh()
    assert names(library.search("moss")) == ["z-moss", "b", "a", "c"]
    assert names(library.search("moss", limit=2)) == ["z-moss", "b"]


def test_any_hash_finds_it_by_its_beginning(tmp_path):
    path = tmp_path / "large.safetensors"
    tensors = {f"{KEY}.lora_down.weight": torch.arange(300_000.0).reshape(1, -1)}
    tensors[f"{KEY}.lora_up.weight"] = torch.ones(4, 1)
    save_file(tensors, path, {"sshs_model_hash": "ABCDEF0123456789", "sshs_legacy_hash": "00c0ffee"})
    nothing = hashlib.sha256().hexdigest()
    make(tmp_path / "small.safetensors", {"sshs_model_hash": nothing, "sshs_legacy_hash": nothing[:8]})
    library = AdapterLibrary(tmp_path)
    library.refresh()
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    autov1 = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    whole, behind = hashlib.sha256(data).hexdigest(), hashlib.sha256(data[8 + length :]).hexdigest()
    for digest in (whole, whole[:6].upper(), whole[:10], behind, behind[:12], autov1, "abcdef01", "00c0ff"):
        assert names(library.search(hash=digest)) == ["large"], digest
    assert library.search(hash=whole)[0].autov1 == autov1
    assert library.search(hash="e3b0c442") == []  # the hash of nothing, which says nothing of the small one
    for odd in (whole[:5], "xyzxyz", "0x123456"):
        with pytest.raises(ConfigError, match="expected 6 or more hexadecimal digits"):
            library.search(hash=odd)


def test_unknown_families_and_kinds_are_refused(library):
    with pytest.raises(ConfigError, match="family is 'flux'; expected sd1, sd2, sdxl or unknown"):
        library.search(family="flux")
    with pytest.raises(ConfigError, match="kind is 'oft'; expected lora, loha, lokr, dense, dora or embedding"):
        library.search(kind="oft")


def test_words_embeddings_and_folders_of_pefts(tmp_path):
    words = {"<Größe>": {"text_encoder": torch.ones(1, 768)}}
    adapter = AdapterFile({PATH: LoraLayer(torch.ones(2, 6), torch.ones(4, 2), 2.0)}, "sd1", {}, words)
    write_adapter(adapter, tmp_path / "mine", "peft")
    save_file({"<cat>": torch.ones(2, 1024)}, tmp_path / "cat.safetensors")
    library = AdapterLibrary(tmp_path)
    library.refresh()
    (mine,) = library.search(kind="lora")
    assert (mine.name, mine.facts.format, mine.facts.words) == ("mine", "peft", ["<Größe>"])
    assert mine.paths == [tmp_path / "mine"] and len(mine.id) == 64
    assert mine in library.search(trigger="gro\u0308SSE")  # put together otherwise, as some systems name files
    (cat,) = library.search(kind="embedding", family="sd2")
    assert cat.facts.words == ["<cat>"]
    (tmp_path / "mine" / "unet" / "adapter_config.json").write_text("{")
    library.refresh()
    assert "adapter_config.json cannot be read" in library.refused()[0].problem
    assert library.search(kind="lora") == []


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_tag_frequency": "not json", "modelspec.trigger_phrase": "\x1b[31m\u202e\x00", "ss_output_name": "[red]"},
        {"ss_tag_frequency": "[" * 100_000},
        {"ss_tag_frequency": json.dumps({"a": {"x" * 1_000_000: 3}}), "ss_output_name": "n" * 1_000_000},
        {"ss_tag_frequency": json.dumps({"a": {f"t{n}": 10**40 + n for n in range(9)}}), "ss_sd_model_name": "../../x"},
        {"ss_tag_frequency": json.dumps({f"d{d}": {f"t{n}": n for n in range(2000)} for d in range(20)})},
        {"ss_sd_model_hash": "'; DROP TABLE files; --", "sshs_model_hash": "%", "ss_output_name": "\ud83d\ude00"},
    ],
)
def test_odd_headers_are_listed_with_short_plain_texts(tmp_path, metadata):
    make(
        tmp_path / "odd.safetensors", {key: text.encode("utf-8", "replace").decode() for key, text in metadata.items()}
    )
    library = AdapterLibrary(tmp_path)
    library.refresh()
    (entry,) = library.search()
    text = json.dumps(entry.to_json(), ensure_ascii=False)
    assert text.isprintable() and len(text) < 30_000
    assert "/" not in entry.facts.base


def test_a_name_that_is_no_unicode_is_listed_and_found(folder, library):
    path = folder / os.fsdecode(b"caf\xe9.safetensors")
    try:
        shutil.copy(folder / "dogs" / "v1.safetensors", path)
    except OSError:
        pytest.skip("this file system takes no such names")
    library.refresh()
    (entry,) = library.search("caf")
    assert path in entry.paths
    assert "caf?.safetensors" in json.dumps(entry.to_json(), ensure_ascii=False)


# --- find ----------------------------------------------------------------------------------------------


def test_find_by_path_name_title_and_hash(library, folder, monkeypatch):
    cats, dogs = library.search()
    monkeypatch.chdir(folder / "dogs")
    for reference in ("cats/v1", "cats/v1.safetensors", str(folder / "cats" / "v1.safetensors"), "COPIED", "grey cats"):
        assert library.find(reference) == cats
    for reference in ("v1.safetensors", "dogs/v1", "./v1", "../dogs/v1", dogs.id, dogs.autov3, dogs.id[:6].upper()):
        assert library.find(reference) == dogs


def test_a_name_of_two_adapters_is_told_with_their_hashes(library):
    cats, dogs = library.search()
    with pytest.raises(FormatError) as caught:
        library.find("V1")
    assert f"cats/v1 ({cats.id[:10]}), dogs/v1 ({dogs.id[:10]}); say which by its hash or path" in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("dogs/v2", "no adapter in .* has that name, path or hash; nearest are dogs/v1"),
        ("copyed", "nearest are cats/v1"),
        ("0123456789", "sdlora adapter list shows what is there"),
        ("", "no adapter in"),
        ("../../../etc/passwd", "no adapter in"),
        ("x" * 100_000, "no adapter in"),
        ("\x00\ud800", "no adapter in"),
        ("page", "page.safetensors: is a web page"),
    ],
)
def test_what_is_not_there_is_told_with_what_is_near(library, reference, sentence):
    with pytest.raises(FormatError, match=sentence) as caught:
        library.find(reference)
    assert len(str(caught.value)) < 1000

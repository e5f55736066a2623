"""Bases by their Hugging Face id: taken from the cache, without any network."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from families_help import load, refusal
from huggingface_hub import constants

from sdlora.config import BaseSection
from sdlora.errors import ModelError
from sdlora.families.sources import find_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, name: str, folder: Path, revision: str = "main") -> Path:
    """`cache` holds a model as it is after a download."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / revision).write_text(COMMIT)
    return place / "snapshots" / COMMIT


@pytest.mark.parametrize("shape", ["sd1", "sdxl"])
def test_a_cached_id_is_loaded_offline(cache, tiny_folder, shape):
    put(cache, "owner/model", tiny_folder(shape))
    base = load("owner/model")
    assert base.source.name == "owner/model"
    expected = load(tiny_folder(shape))
    assert base.weights_sha256() == expected.weights_sha256()
    assert base.source.sha256 == expected.source.sha256


def test_a_revision_is_honoured(cache, tiny_folder):
    snapshot = put(cache, "owner/model", tiny_folder("sd1"), "v2")
    assert find_base(BaseSection(path="owner/model", revision="v2")) == snapshot
    assert find_base(BaseSection(path="owner/model", revision=COMMIT)) == snapshot
    assert "it is not in the Hugging Face cache, and HF_HUB_OFFLINE is set" in refusal("owner/model")


def test_only_what_is_needed_is_asked_for(monkeypatch, tmp_path):
    asked = {}

    def download(name, **options):
        asked.update(name=name, **options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_base(BaseSection(path="owner/model", revision="r", variant="fp16")) == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/model", "r")
    patterns = asked["allow_patterns"]
    assert "unet/*model.fp16.safetensors" in patterns and "text_encoder_2/*model.fp16.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".ckpt", "*model.safetensors")) for pattern in patterns)


def test_a_broken_connection_is_one_sentence(monkeypatch):
    def fail(*_, **__):
        raise OSError("connection reset")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=r"huggingface\.co cannot be reached; go online once to download it"):
        find_base(BaseSection(path="owner/model"))


def test_a_tokenizer_in_the_cache_serves_a_checkpoint(cache, tiny_folder, tmp_path):
    import ldm_layout

    from sdlora.families.tiny import tiny_pipeline

    config = tmp_path / "config"
    shutil.copytree(tiny_folder("sd1"), config, ignore=shutil.ignore_patterns("tokenizer", "*.safetensors"))
    (tmp_path / "file").mkdir()
    path = tmp_path / "file" / "a.safetensors"
    ldm_layout.write_checkpoint(tiny_pipeline("sd1"), path, metadata={"modelspec.prediction_type": "epsilon"})
    assert "none was found beside it" in refusal(path, config=str(config))
    put(cache, "openai/clip-vit-large-patch14", tiny_folder("sd1") / "tokenizer")
    base = load(path, config=str(config))
    with torch.no_grad():
        assert torch.equal(
            base.family.encode_prompts(base, ["a red ball"]).states,
            load(tiny_folder("sd1")).family.encode_prompts(load(tiny_folder("sd1")), ["a red ball"]).states,
        )

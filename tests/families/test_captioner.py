"""Models of every kind say what pictures show; folders that hold none are refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_captioners import CHAT_OF_TEXTS, save_captioner
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import is_torchvision_available

from sdlora.errors import ConfigError, DataError, ModelError
from sdlora.families.captioner import Captioner, load_captioner

RED, BLUE = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (20, 50), "blue")


@pytest.fixture(scope="session")
def captioner_folder(tmp_path_factory):
    """`captioner_folder(kind, says)`: the folder of a tiny model; do not write to it."""
    from sdlora.quiet import quiet_libraries

    quiet_libraries()
    folders: dict[tuple[Any, ...], Path] = {}

    def folder(kind: str, says: str = "a red cat", **options: Any) -> Path:
        key = (kind, says, *options.items())
        if key not in folders:
            folders[key] = save_captioner(kind, tmp_path_factory.mktemp("captioners") / kind, says, **options)
        return folders[key]

    return folder


def load(folder: Path, **options: Any) -> Captioner:
    return load_captioner(str(folder), **({"device": "cpu"} | options))


def refusal(name: Path | str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_captioner(str(name), device="cpu", **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


# --- describing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["git", "vit-gpt2", "llava", "qwen2-vl", "florence2"])
def test_a_caption_is_what_the_model_says_and_no_more(captioner_folder, kind):
    captioner = load(captioner_folder(kind))
    assert captioner.describe([RED, BLUE]) == ["a red cat", "a red cat"]
    assert captioner.describe([BLUE], beams=2) == ["a red cat"]


@pytest.mark.parametrize("kind", ["blip", "blip-2"])
@pytest.mark.parametrize("prompt", [None, "a photo of"])
def test_a_caption_has_at_most_the_wanted_tokens_and_not_the_prompt(captioner_folder, kind, prompt):
    captioner = load(captioner_folder(kind), prompt=prompt)
    assert captioner.describe([RED], max_tokens=3) == ["cat cat cat"]
    assert captioner.describe([RED, BLUE], max_tokens=5) == ["cat cat cat cat cat"] * 2


@pytest.mark.parametrize("kind", ["git", "vit-gpt2"])
def test_a_plain_prompt_is_what_the_caption_goes_on_from(captioner_folder, kind):
    assert load(captioner_folder(kind), prompt="a").describe([RED]) == ["red cat"]
    assert load(captioner_folder(kind), prompt="a photo of").describe([RED]) == ["a red cat"]


def test_an_answer_may_begin_like_the_prompt_of_an_encoder(captioner_folder):
    assert load(captioner_folder("florence2"), prompt="a red").describe([RED]) == ["a red cat"]


def test_florence_is_given_its_task(captioner_folder):
    assert load(captioner_folder("florence2"), prompt="<MORE_DETAILED_CAPTION>").describe([RED]) == ["a red cat"]
    assert "should be the only content" in refusal(captioner_folder("florence2"), prompt="<CAPTION> a")


@pytest.mark.parametrize("kind", ["llava", "qwen2-vl"])
def test_a_chat_model_is_asked_the_prompt(captioner_folder, kind):
    assert load(captioner_folder(kind), prompt="is this a dog").describe([RED, BLUE]) == ["blue", "blue"]
    assert load(captioner_folder(kind), prompt="what is this ?").describe([RED, BLUE]) == ["a red cat", "a red cat"]


def test_a_chat_template_may_take_texts_alone(captioner_folder):
    folder = captioner_folder("llava", chat_template=CHAT_OF_TEXTS)
    assert load(folder, prompt="is this a dog").describe([RED, BLUE]) == ["blue", "blue"]


def test_a_chat_template_of_the_tokenizer_serves(captioner_folder, tmp_path):
    folder = Path(shutil.copytree(captioner_folder("llava"), tmp_path / "model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load(folder, prompt="is this a dog").describe([RED]) == ["blue"]


def test_a_model_without_chat_template_can_be_given_the_whole_form(captioner_folder):
    folder = captioner_folder("llava", chat_template=None)
    assert load(folder, prompt="user : <image> is this a dog assistant :").describe([RED, BLUE]) == ["blue", "blue"]
    assert "give --prompt in the form that the model's page shows" in refusal(folder)
    assert "give --prompt in the form that the model's page shows" in refusal(folder, prompt="is this a dog")


def test_thoughts_are_left_out(captioner_folder):
    folder = captioner_folder("llava", says="<think> of dog </think> a red cat")
    assert load(folder).describe([RED]) == ["a red cat"]
    assert load(folder).describe([RED], max_tokens=3) == [""]


@pytest.mark.parametrize("kind", ["git", "vit-gpt2", "llava", "qwen2-vl", "florence2"])
def test_captions_come_from_the_pictures_and_do_not_depend_on_the_others(captioner_folder, kind):
    captioner = load(captioner_folder(kind, says=""))
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "white")]
    pictures += [Image.linear_gradient("L").convert("RGB"), BLUE]
    alone = [captioner.describe([picture], max_tokens=12)[0] for picture in pictures]
    assert len(set(alone)) > 1
    assert captioner.describe(pictures, max_tokens=12) == alone


def test_nothing_is_left_to_chance(captioner_folder, tmp_path):
    folder = Path(shutil.copytree(captioner_folder("qwen2-vl", says=""), tmp_path / "model"))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"do_sample": True, "temperature": 9.0}))
    captioner = load(folder)
    captions = set()
    for seed in range(4):
        torch.manual_seed(seed)
        captions |= set(captioner.describe([RED], max_tokens=12))
    assert captions == set(load(captioner_folder("qwen2-vl", says="")).describe([RED], max_tokens=12))


@pytest.mark.parametrize("kind", ["vit-gpt2", "llava", "qwen2-vl"])
def test_half_precision_says_the_same(captioner_folder, kind):
    assert load(captioner_folder(kind), precision="bf16").describe([RED, BLUE]) == ["a red cat", "a red cat"]


def test_a_picture_that_the_model_cannot_take_is_told_of(captioner_folder):
    captioner = load(captioner_folder("qwen2-vl"))
    with pytest.raises(DataError, match=r"^the model cannot take this picture \(absolute aspect ratio"):
        captioner.describe([Image.new("RGB", (2000, 4))])
    assert captioner.describe([RED]) == ["a red cat"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("17 GB"), "m: does not fit into the GPU's memory; set --batch-size to 1"),
        (RuntimeError("bad kernel\nand more"), r"^m: cannot describe pictures \(bad kernel\)$"),
    ],
)
def test_a_model_that_fails_says_so_in_one_sentence(error, sentence):
    class Failing:
        device, dtype = torch.device("cpu"), torch.float32

        def generate(self, **_):
            raise error

    captioner = Captioner("m", Failing(), None, lambda pictures: BatchFeature({"pixel_values": torch.zeros(1)}))
    with pytest.raises(ModelError, match=sentence):
        captioner.describe([RED])


# --- refusals ----------------------------------------------------------------------------------------


@pytest.fixture
def copy(captioner_folder, tmp_path):
    """A GIT that may be damaged."""
    return Path(shutil.copytree(captioner_folder("git"), tmp_path / "model"))


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a file; --model takes the folder" in refusal(tmp_path / "model.safetensors")
    assert "there is no such folder; --model takes" in refusal(tmp_path / "nothing")
    assert "(it has no config.json)" in refusal(tmp_path)


def test_another_kind_of_model_is_refused(copy, tiny_folder):
    change_config(copy, model_type="clip")
    assert "is no image-to-text model (its config.json says 'clip')" in refusal(copy)
    (copy / "config.json").write_text("[]")
    assert "config.json: does not describe a model" in refusal(copy)
    assert "is no image-to-text model (it has no config.json)" in refusal(tiny_folder("sd1"))


def test_code_from_a_model_is_never_run(copy, tmp_path):
    (copy / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    own = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model", "AutoProcessor": "code.Model"}
    change_config(copy, auto_map=own)
    assert load(copy).describe([RED]) == ["a red cat"]
    change_config(copy, model_type="moondream", auto_map=own)
    assert "comes with program code of its own, which sdlora never runs" in refusal(copy)
    assert not (tmp_path / "run").exists()


def test_pickles_are_not_opened(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    sentence = refusal(copy)
    assert "holds no weights in .safetensors files (there: pytorch_model.bin, pickles that could run code" in sentence
    (copy / "pytorch_model.bin").unlink()
    assert "holds no weights in .safetensors files; choose" in refusal(copy)


def test_missing_weights_are_not_made_up(copy):
    weights = load_file(copy / "model.safetensors")
    lost = [name for name in weights if "attention.self.query" in name]
    assert lost
    save_file({name: weight for name, weight in weights.items() if name not in lost}, copy / "model.safetensors")
    assert f"its files lack {len(lost)} of the model's weights, such as {min(lost)}" in refusal(copy)


def test_the_pooler_of_an_encoder_may_be_missing(captioner_folder, tmp_path):
    folder = Path(shutil.copytree(captioner_folder("vit-gpt2"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors")
    assert load(folder).describe([RED]) == ["a red cat"]


def test_a_damaged_model_is_refused(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "model: cannot be loaded (" in refusal(copy)


def test_a_model_without_preparation_of_pictures_is_refused(copy):
    (copy / "processor_config.json").unlink()
    assert "(it has neither preprocessor_config.json nor processor_config.json)" in refusal(copy)
    (copy / "processor_config.json").write_text("{}")
    assert "model: cannot be loaded (" in refusal(copy)


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_a_model_that_needs_torchvision_says_so(captioner_folder, tmp_path):
    folder = Path(shutil.copytree(captioner_folder("llava"), tmp_path / "model"))
    settings = (folder / "processor_config.json").read_text()
    assert "CLIPImageProcessor" in settings
    (folder / "processor_config.json").write_text(settings.replace("CLIPImageProcessor", "Lfm2VlImageProcessor"))
    assert "with torchvision, which is not installed; install the version that goes with your torch" in refusal(folder)


def test_an_unknown_device_is_a_setting(captioner_folder):
    with pytest.raises(ConfigError, match="device is 'gpu'"):
        load(captioner_folder("git"), device="gpu")


# --- by Hugging Face id ------------------------------------------------------------------------------


def test_a_cached_id_is_loaded_offline(captioner_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--owner--captioner"
    shutil.copytree(captioner_folder("git"), place / "snapshots" / commit)
    for name in ("main", "refs/pr/4"):
        (place / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "refs" / name).write_text(commit)
    assert load_captioner("owner/captioner", device="cpu").describe([RED]) == ["a red cat"]
    assert load_captioner("owner/captioner", revision="refs/pr/4", device="cpu").describe([RED]) == ["a red cat"]
    assert "it is not in the Hugging Face cache, and HF_HUB_OFFLINE is set" in refusal("owner/other")


def test_another_kind_of_model_is_refused_before_its_weights_are_downloaded(copy, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options["revision"], options["allow_patterns"]))
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_captioner("owner/model", revision="r", device="cpu")
    assert [(name, revision) for name, revision, _ in asked] == [("owner/model", "r")] * 2
    assert asked[0][2] == ["config.json"] and "*.safetensors" in asked[1][2]
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked[1][2])
    change_config(copy, model_type="clip")
    asked.clear()
    assert "owner/model: is no image-to-text model" in refusal("owner/model")
    assert [patterns for *_, patterns in asked] == [["config.json"]]

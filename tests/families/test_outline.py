"""What a base asks of captions and pictures is known without its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ldm_layout
import pytest

from sdlora.assets import TINY_SD
from sdlora.config import BaseSection
from sdlora.errors import ModelError
from sdlora.families.outline import BaseOutline, CutText, outline_base
from sdlora.families.registry import load_base
from sdlora.families.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def tiny() -> BaseOutline:
    return outline_base(BaseSection(path="tiny"))


@pytest.mark.parametrize("shape", ["sd1", "sd2", "sdxl"])
def test_it_agrees_with_the_loaded_base(tiny_folder: Any, shape: str) -> None:
    section = BaseSection(path=str(tiny_folder(shape)))
    outline, base = outline_base(section), load_base(section, "cpu")
    assert (outline.title, outline.resolution) == (base.family.title, base.resolution)
    texts = ["a photo", "a red ball, " * 40]
    excess = [outline.cut(texts)[text].excess if text in outline.cut(texts) else 0 for text in texts]
    assert excess == base.family.excess_tokens(base, texts)
    assert outline.token_limits == dict.fromkeys(base.text_encoders, 77)


def test_no_weight_is_needed(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(TINY_SD, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert outline_base(BaseSection(path=str(folder))).resolution == 128
    unet = folder / "unet" / "config.json"
    unet.write_text(json.dumps(json.loads(unet.read_text()) | {"sample_size": None}))
    assert outline_base(BaseSection(path=str(folder))).resolution == 512


@pytest.mark.parametrize(
    ("metadata", "settings", "resolution"),
    [
        ({"modelspec.prediction_type": "v"}, {}, 768),
        ({"modelspec.prediction_type": "epsilon"}, {}, 512),
        ({}, {"prediction": "v"}, 768),
        ({}, {}, None),
    ],
)
def test_a_checkpoint_whose_size_hangs_on_what_it_predicts(
    tmp_path: Path, metadata: dict[str, str], settings: dict[str, Any], resolution: int | None
) -> None:
    path = tmp_path / "model.safetensors"
    ldm_layout.write_checkpoint(tiny_pipeline("sd2"), path, metadata=metadata)
    shutil.copytree(TINY_SD / "tokenizer", tmp_path / "tokenizer")
    outline = outline_base(BaseSection(path=str(path), **settings))
    assert (outline.title, outline.resolution) == ("Stable Diffusion 2.x", resolution)
    assert outline.token_limits == {"text_encoder": 77}


def test_a_configuration_that_the_user_names_describes_a_checkpoint(tmp_path: Path, tiny_folder: Any) -> None:
    path = tmp_path / "model.safetensors"
    ldm_layout.write_checkpoint(tiny_pipeline("sd1"), path)
    tokenizer = str(TINY_SD / "tokenizer")
    assert outline_base(BaseSection(path=str(path), config=str(TINY_SD), tokenizer=tokenizer)).resolution == 128


def test_what_is_cut_off_begins_with_a_whole_word(tiny: BaseOutline) -> None:
    # 75 tokens are seen; "zorblin" is 6 of them in this vocabulary, "a" and "," are one each.
    assert len(tiny.tokens(["zorblin"])[0]) == 6
    fits, over, within = " ".join("a" * 75), " ".join("a" * 75) + ", a", " ".join("a" * 73) + " zorblin, a"
    assert tiny.cut([fits]) == {}
    assert tiny.cut([fits, over, within]) == {over: CutText(2, ", a"), within: CutText(6, "zorblin, a")}
    assert tiny.cut([]) == {}


def test_a_word_is_in_a_text_by_its_tokens(tiny: BaseOutline) -> None:
    texts = ["the zorblin", "Zorblin's hat", "zorblin2", "zorblins", "a zor blin", ""]
    assert tiny.texts_with("zorblin", texts) == {"the zorblin", "Zorblin's hat", "zorblin2"}


def test_common_words(tiny: BaseOutline) -> None:
    assert tiny.is_common_word("photo") and not tiny.is_common_word("zorblin")


def test_a_base_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(TINY_SD, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    with pytest.raises(ModelError, match="'tokenizer' is missing or incomplete"):
        outline_base(BaseSection(path=str(folder)))
    with pytest.raises(ModelError, match="there is no such file or folder"):
        outline_base(BaseSection(path=str(tmp_path / "missing")))

"""A folder of adapters as a library has it, for the tests of what it finds and of its index."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from sdlora.sharing.library import AdapterLibrary

PATH = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CATS = {
    "ss_output_name": "Grey Cats",
    "modelspec.trigger_phrase": "zorb, sks cat",
    "ss_base_model_version": "sd_v1",
    "ss_sd_model_name": "dreamy_v8.safetensors",
    "ss_sd_model_hash": "879db523c3",
    "ss_tag_frequency": '{"10_cat": {"grey fur": 12, "whiskers": 7}}',
}
DOGS = {"ss_base_model_version": "sdxl_base_v1-0", "ss_tag_frequency": '{"a": {"dog": 3, "100%_good": 1}}'}


@pytest.fixture
def folder(tmp_path):
    """Two adapters of one name, one of them twice, and a web page."""
    folder = tmp_path / "library"
    make(folder / "cats" / "v1.safetensors", CATS)
    make(folder / "dogs" / "v1.safetensors", DOGS, value=2.0)
    shutil.copy(folder / "cats" / "v1.safetensors", folder / "copied.safetensors")
    (folder / "page.safetensors").write_text("<html>sign in</html>")
    return folder


def make(path, metadata, value=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{KEY}.lora_down.weight": torch.full((2, 6), value), f"{KEY}.lora_up.weight": torch.ones(4, 2)},
        path,
        metadata,
    )


@pytest.fixture
def library(folder):
    library = AdapterLibrary(folder)
    library.refresh()
    return library


def names(found):
    return [entry.name for entry in found]

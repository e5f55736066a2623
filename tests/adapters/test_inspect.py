"""What is said of adapter files of every format, from the header alone and with the numbers."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from adapter_kinds import random_layer
from safetensors.torch import save_file

from sdlora.adapters.file import AdapterFile
from sdlora.adapters.inspect import inspect_adapter
from sdlora.adapters.write import FORMATS, write_adapter
from sdlora.errors import FormatError
from sdlora.storage import sha256_of_file, sha256_of_tensor_data

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
TEXT_KEY = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture
def adapter():
    layers = {
        Q: random_layer("lora", (8, 768)),
        CONV: random_layer("lora", (8, 6, 3, 3)),
        TEXT: random_layer("lora", (4, 6)),
    }
    return AdapterFile(layers, "sd1", {"ss_output_name": "zorb"})


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_told_with_its_layers(adapter, tmp_path, format):
    path = tmp_path / "x"
    write_adapter(adapter, path, format)
    report = inspect_adapter(path)
    assert (report.format, report.family) == (format, "sd1")
    assert report.modules == {"unet": 2, "text_encoder": 1, "text_encoder_2": 0}
    assert report.kinds == {"lora": 3}
    assert report.rank == 3 and report.alpha == (3.0 if format == "diffusers" else 2.0)
    assert (report.tokens, report.unknown_keys, report.problems) == ([], [], [])
    assert report.metadata["ss_output_name"] == "zorb"
    quick = inspect_adapter(path, header_only=True)
    assert quick == replace(report, alpha=None, sha256="", autov3="")
    if path.is_file():
        assert report.sha256 == sha256_of_file(path) and report.autov3 == sha256_of_tensor_data(path)[:12]


def test_the_json_has_these_keys(adapter, tmp_path):
    write_adapter(adapter, tmp_path / "a.safetensors")
    found = inspect_adapter(tmp_path / "a.safetensors").to_json()
    assert {
        "format", "family", "modules", "rank", "alpha", "tokens", "unknown_keys", "problems", "sha256", "autov3", "metadata",
    } <= found.keys()  # fmt: skip


def test_several_ranks_alphas_and_kinds_are_all_named(adapter, tmp_path):
    low = random_layer("lora", (8, 6, 3, 3))
    layers = {
        **adapter.layers,
        CONV: replace(low, down=low.down[:1], up=low.up[:, :1], alpha=0.5),
        TEXT: random_layer("dora", (4, 6)),
        "unet.conv_in": random_layer("loha", (8, 4, 3, 3)),
        "unet.conv_out": random_layer("dense", (4, 8, 3, 3)),
    }
    write_adapter(replace(adapter, layers=layers), tmp_path / "a.safetensors")
    report = inspect_adapter(tmp_path / "a.safetensors")
    assert report.rank == [1, 3] and report.alpha == [0.5, 2.0]
    assert report.kinds == {"lora": 2, "dora lora": 1, "loha": 1, "dense": 1}


def test_words_beside_and_inside_and_alone(adapter, tmp_path):
    words = {"zorb": {"text_encoder": torch.ones(2, 768)}}
    write_adapter(replace(adapter, tokens=words), tmp_path / "beside.safetensors")
    write_adapter(replace(adapter, tokens=words), tmp_path / "inside.safetensors", bundle=True)
    write_adapter(AdapterFile({}, "sd1", {}, words), tmp_path / "alone.safetensors")
    save_file({"<cat>": torch.ones(1, 1024)}, tmp_path / "cat.safetensors")
    for name, tokens, format in (
        ("beside", ["zorb"], "kohya"),
        ("inside", ["zorb"], "kohya"),
        ("alone", ["zorb"], "embedding"),
        ("cat", ["<cat>"], "embedding"),
    ):
        report = inspect_adapter(tmp_path / f"{name}.safetensors")
        assert (report.tokens, report.format, report.unknown_keys) == (tokens, format, [])
    assert report.family == "sd2" and report.modules["unet"] == 0


def pair(down=None, up=None):
    return {
        f"{KEY}.lora_down.weight": torch.ones(2, 768) if down is None else down,
        f"{KEY}.lora_up.weight": torch.ones(8, 2) if up is None else up,
    }


@pytest.mark.parametrize(
    ("tensors", "metadata", "problem"),
    [
        ({**pair(), "x.y": torch.ones(1)}, {}, "1 tensors are not understood, such as 'x.y'"),
        (
            {**pair(), "lora_unet_conv_in.lora_up.weight": torch.ones(2, 2)},
            {},
            "lora_unet_conv_in has no lora_down.weight",
        ),
        (pair(up=torch.ones(8, 3)), {}, "1 layers cannot be read, such as: .* make no pair"),
        (pair(up=torch.full((8, 2), float("nan"))), {}, "1 tensors hold NaN or infinity, such as lora_unet_down"),
        (pair(up=torch.zeros(8, 2)), {}, "1 of 1 layers change nothing, such as unet.down_blocks"),
        (
            pair(),
            {"sshs_model_hash": "e3b0c44298fc1c14"},
            "its header says sshs_model_hash e3b0c44298fc, its content has",
        ),
    ],
)
def test_faults_are_listed_and_not_raised(tmp_path, tensors, metadata, problem):
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    report = inspect_adapter(tmp_path / "a.safetensors")
    assert len(report.problems) == 1

    assert re.search(problem, report.problems[0])


def test_what_is_no_adapter_is_refused(tmp_path):
    save_file({"model.diffusion_model.out.2.bias": torch.ones(4)}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="is a whole Stable Diffusion checkpoint"):
        inspect_adapter(tmp_path / "a.safetensors")


def test_headers_are_read_without_torch(adapter, tmp_path):
    write_adapter(adapter, tmp_path / "a.safetensors")
    code = (
        "import sys; from sdlora.adapters.inspect import inspect_adapter; "
        f"inspect_adapter({str(tmp_path / 'a.safetensors')!r}, header_only=True); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_of_one_layout_are_told_apart_by_what_their_headers_say(tmp_path):
    """What is told of keys and shapes is kept for the next file; family, words and lists of a report are its own."""
    tensors = {f"{TEXT_KEY}.lora_down.weight": torch.ones(2, 768), f"{TEXT_KEY}.lora_up.weight": torch.ones(768, 2)}
    texts = [
        {},
        {"ss_base_model_version": "sd_v1"},
        {"ss_v2": "True"},
        {"modelspec.architecture": "stable-diffusion-xl"},
    ]
    texts.append({"sdlora_words": '{"zorb": "ab"}', "note": "x" * 2_000_000, "ss_v2": "True"})
    texts.append({"ss_base_model_version": "sd_v1" + " " * 2_000_000})  # too long to be kept
    for _ in range(2):
        found = []
        for number, text in enumerate(texts):
            save_file(tensors, tmp_path / f"{number}.safetensors", text)
            report = inspect_adapter(tmp_path / f"{number}.safetensors", header_only=True)
            found.append((report.family, report.tokens))
            report.modules.clear()
            report.kinds.clear()
        assert found == [("", []), ("sd1", []), ("sd2", []), ("sdxl", []), ("sd2", ["zorb"]), ("sd1", [])]

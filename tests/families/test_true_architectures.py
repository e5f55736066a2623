"""The true SD 1.5, SD 2.1 and SDXL, without their weights: sizes, layers, and their names in other programs' files.

What is expected was written by hand: literals here, and tests/fixtures, where a line stands for every
combination of its alternatives.
"""

import functools
import itertools
import json
import math
import os
import re
import struct
from pathlib import Path

import ldm_layout
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from sdlora.adapters.formats import kohya
from sdlora.assets import CONFIGS
from sdlora.families.base import match_targets
from sdlora.families.detect import detect_base
from sdlora.families.registry import FAMILIES
from sdlora.families.traits import UNET_PREFIX, VAE_PREFIX
from sdlora.families.weights import CheckpointWeights
from sdlora.headers import read_header

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHAPES = ["sd1", "sd2", "sdxl"]

# As published with the models.
PARAMETERS = {
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}

# SD 1.x and 2.x have 16 attentions of 1 transformer block, SDXL has 11 of 70 blocks together (5 of 2, 6 of
# 10). A block has 8 attention layers, half of them cross-attention, and 2 feed-forward layers; proj_in and
# proj_out come once an attention, be they 1 x 1 convolutions (SD 1.x) or linear.
# SD 1.x and 2.x have 8 + 2 + 12 resnets of 3 layers, 2 + 12 of them with a shortcut, and 3 + 3 samplers;
# SDXL has 6 + 2 + 9 resnets, 2 + 9 with a shortcut, and 2 + 2 samplers. All layers are those and conv_in,
# conv_out, 2 of the time embedding and, in SDXL, 2 of the added embedding.
_SD_LAYERS = {
    "cross-attention": 16 * 4,
    "attention": 16 * 8,
    "transformer": 192,
    "resnet": 22 * 3 + 14 + 6,
    "transformer and resnet": 278,
    "*": 278 + 4,
}
LAYERS = {
    "sd1": _SD_LAYERS,
    "sd2": _SD_LAYERS,
    "sdxl": {
        "cross-attention": 70 * 4,
        "attention": 70 * 8,
        "transformer": 722,
        "resnet": 17 * 3 + 11 + 4,
        "transformer and resnet": 788,
        "*": 788 + 6,
    },
}
# Layers of the text encoder: 4 of attention and 2 of its feed-forward network in each of 12, 23 or 32.
TEXT_LAYERS = {
    ("sd1", "text_encoder"): (48, 72),
    ("sd2", "text_encoder"): (92, 138),
    ("sdxl", "text_encoder"): (48, 72),
    ("sdxl", "text_encoder_2"): (128, 192),
}

# An original checkpoint: the type of its weights, and what it stores as text encoder beyond what is used.
PRECISION = {"sd1": ("F32", "fp32"), "sd2": ("F32", "fp32"), "sdxl": ("F16", "fp16")}
UNUSED_TEXT_WEIGHTS = {
    ("sd1", "text_encoder"): 0,
    # The 24th layer (its matrices; biases and norms), the projection and logit_scale.
    ("sd2", "text_encoder"): (12 * 1024**2 + 13 * 1024) + 1024**2 + 1,
    ("sdxl", "text_encoder"): 0,
    ("sdxl", "text_encoder_2"): 1,  # logit_scale
}
BYTES = {"I64": 8, "I32": 4, "F32": 4, "F16": 2}


def expand(text: str) -> list[str]:
    """Return "a{0..2}{x,y}" as a0x, a0y, a1x, ..."""
    parts = re.split(r"\{(.+?)\}", text)
    choices = [_alternatives(part) if number % 2 else [part] for number, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _alternatives(text: str) -> list[str]:
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        return [str(number) for number in range(int(match[1]), int(match[2]) + 1)]
    return text.split(",")


def fixture_lines(name: str) -> list[str]:
    lines = (FIXTURES / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@functools.cache
def checkpoint_entries(shape: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return {key: (shape, type)} of an original checkpoint."""
    entries = {}
    for line in fixture_lines(f"checkpoint_{shape}.txt") + fixture_lines("checkpoint_vae.txt"):
        keys, form, *kind = line.split()
        sides = () if form == "scalar" else tuple(int(side) for side in form.split("x"))
        for key in expand(keys):
            assert key not in entries, f"{key} is listed twice"
            entries[key] = (sides, kind[0] if kind else PRECISION[shape][0])
    return entries


@functools.cache
def true_models(shape: str) -> dict[str, torch.nn.Module]:
    """Return the components as the bundled configuration describes them, on the meta device."""
    folder = CONFIGS / shape
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
        } | {
            name: part.kind(part.kind.config_class.from_pretrained(folder / name))
            for name, part in FAMILIES[shape].text_encoders.items()
        }


def text_encoders(shape: str) -> dict[str, torch.nn.Module]:
    return {name: true_models(shape)[name] for name in FAMILIES[shape].text_encoders}


def file_path(component: str, path: str) -> str:
    """Return a layer's path as adapter files know it: text encoders have "text_model." in it, which some lost."""
    if component.startswith("text_encoder") and not path.startswith("text_"):
        return f"{component}.text_model.{path}"
    return f"{component}.{path}"


# --- sizes and layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_number_of_parameters(shape):
    models = true_models(shape)
    assert {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()} == PARAMETERS[shape]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_number_of_unet_layers_that_presets_choose(shape):
    unet, presets = true_models(shape)["unet"], FAMILIES[shape].target_presets
    counts = {name: len(match_targets(unet, name.split(" and "), presets)) for name in LAYERS[shape]}
    assert counts == LAYERS[shape]
    assert set(presets) <= set(LAYERS[shape])


@pytest.mark.parametrize(("shape", "component"), TEXT_LAYERS)
def test_the_number_of_text_encoder_layers_that_presets_choose(shape, component):
    encoder, presets = true_models(shape)[component], FAMILIES[shape].text_encoder_presets
    assert list(presets) == ["attention", "transformer"]
    assert tuple(len(match_targets(encoder, [name], presets)) for name in presets) == TEXT_LAYERS[shape, component]


# --- names in kohya's files --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_every_layer_comes_back_from_its_key(shape):
    models = {"unet": true_models(shape)["unet"]} | text_encoders(shape)
    layers = [file_path(name, path) for name, model in models.items() for path in match_targets(model, ["*"])]
    keys = [kohya.key_name(path, shape) for path in layers]
    projections = int(shape == "sdxl")  # text_projection, behind the second encoder's layers
    encoder_layers = sum(TEXT_LAYERS[shape, name][1] for name in text_encoders(shape))
    assert len(layers) == LAYERS[shape]["*"] + encoder_layers + projections
    assert len(set(keys)) == len(keys)
    assert [kohya.module_path(key) for key in keys] == layers


def test_the_projection_behind_the_text_encoder_comes_back_from_its_key():
    assert "text_projection" in match_targets(true_models("sdxl")["text_encoder_2"], ["*"])
    assert kohya.key_name("text_encoder_2.text_projection", "sdxl") == "lora_te2_text_projection"
    assert kohya.module_path("lora_te2_text_projection") == "text_encoder_2.text_projection"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_keys_are_those_that_kohyas_trainer_writes(shape):
    family = FAMILIES[shape]
    layers = {"unet": match_targets(true_models(shape)["unet"], ["transformer", "resnet"], family.target_presets)}
    for name, encoder in text_encoders(shape).items():
        layers[name] = match_targets(encoder, ["transformer"], family.text_encoder_presets)
    keys = [kohya.key_name(file_path(name, path), shape) for name, paths in layers.items() for path in paths]
    expected = [key for line in fixture_lines(f"kohya_{shape}.txt") for key in expand(line)]
    assert sorted(keys) == sorted(expected)


def test_the_keys_of_sdxl_are_the_checkpoints_names():
    unet = true_models("sdxl")["unet"]
    for path in match_targets(unet, ["*"]):
        original = ldm_layout.unet_name(f"{path}.weight", 2, unet)
        assert f"{UNET_PREFIX}{original}" in checkpoint_entries("sdxl")
        key = "lora_unet_" + original.removesuffix(".weight").replace(".", "_")
        assert kohya.key_name(f"unet.{path}", "sdxl") == key


# --- original checkpoints ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hollow_checkpoint(tmp_path_factory):
    """`hollow_checkpoint(shape)`: a checkpoint of true names and sizes that reads as zeros and takes no room."""
    files: dict[str, Path] = {}

    def write(shape: str) -> Path:
        if shape not in files:
            folder = tmp_path_factory.mktemp("hollow")
            _skip_without_sparse_files(folder)
            files[shape] = folder / f"{shape}.safetensors"
            _write_hollow(files[shape], checkpoint_entries(shape))
        return files[shape]

    yield write
    for file in files.values():
        file.unlink()


def _skip_without_sparse_files(folder: Path) -> None:
    probe = folder / "probe"
    probe.touch()
    os.truncate(probe, 1 << 24)
    taken = getattr(probe.stat(), "st_blocks", 1 << 24) * 512
    probe.unlink()
    if taken > 1 << 20:
        pytest.skip("the file system has no sparse files")


def _write_hollow(path: Path, entries: dict[str, tuple[tuple[int, ...], str]]) -> None:
    header, end = {}, 0
    # The widest types first, so that each tensor lies at a multiple of its width.
    for key, (sides, kind) in sorted(entries.items(), key=lambda item: -BYTES[item[1][1]]):
        start, end = end, end + BYTES[kind] * math.prod(sides)
        header[key] = {"dtype": kind, "shape": sides, "data_offsets": (start, end)}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + end)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_is_recognised_by_its_header(hollow_checkpoint, shape):
    facts = detect_base(hollow_checkpoint(shape))
    assert facts.family is FAMILIES[shape].traits
    counts = {part: count + UNUSED_TEXT_WEIGHTS.get((shape, part), 0) for part, count in PARAMETERS[shape].items()}
    assert facts.components == {part: (count, PRECISION[shape][1]) for part, count in counts.items()}
    (undeclared,) = facts.odd
    assert undeclared.startswith("it does not say whether it predicts epsilon or v")


class ShapeReader:
    """Stands in for safetensors' reader: tensors have their shapes and no numbers, so that none of 7 GB is read."""

    def __init__(self, file: Path, framework: str) -> None:
        self._entries = read_header(file).tensors

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass

    def get_tensor(self, key: str) -> torch.Tensor:
        return torch.empty(self._entries[key].shape, device="meta")

    def get_slice(self, key: str) -> torch.Tensor:
        return self.get_tensor(key)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_holds_exactly_the_weights_of_the_models(hollow_checkpoint, monkeypatch, shape):
    monkeypatch.setattr("sdlora.families.weights.safe_open", ShapeReader)
    file = hollow_checkpoint(shape)
    weights = CheckpointWeights(file, read_header(file), CONFIGS / shape, FAMILIES[shape].traits.encoder_prefixes)
    for part, model in true_models(shape).items():
        found = {name: tensor.shape for group in weights.tensors(part, model) for name, tensor in group.items()}
        assert found == {name: tensor.shape for name, tensor in model.state_dict().items()}, part


@pytest.mark.parametrize("shape", SHAPES)
def test_every_unet_weight_is_taken_from_its_own_key(hollow_checkpoint, shape):
    file, unet = hollow_checkpoint(shape), true_models(shape)["unet"]
    weights = CheckpointWeights(file, read_header(file), CONFIGS / shape, FAMILIES[shape].traits.encoder_prefixes)
    names = weights._unet_names(unet)
    assert names == {name: UNET_PREFIX + ldm_layout.unet_name(name, 2, unet) for name in unet.state_dict()}
    assert set(names.values()) == {key for key in checkpoint_entries(shape) if key.startswith(UNET_PREFIX)}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout_that_tests_write_is_the_original_one(shape):
    """tests/ldm_layout.py, with which smaller checkpoints are made, names true models as the fixture does."""
    models = true_models(shape)
    written = {
        UNET_PREFIX + ldm_layout.unet_name(name, 2, models["unet"]): tensor.shape
        for name, tensor in models["unet"].state_dict().items()
    }
    written |= {VAE_PREFIX + ldm_layout.vae_name(name, 4): None for name in models["vae"].state_dict()}
    for name, part in FAMILIES[shape].text_encoders.items():
        layout = ldm_layout.open_clip if part.pad_token else ldm_layout.clip
        tensors = layout(models[name], FAMILIES[shape].traits.encoder_prefixes[name])
        written |= {key: tensor.shape for key, tensor in tensors.items()}
    expected = {key: sides for key, (sides, _) in checkpoint_entries(shape).items() if key.startswith(_prefixes(shape))}
    if shape == "sd2":  # the layer that SD 2.x does not use is copied there when a file is written
        expected = {key: sides for key, sides in expected.items() if ".resblocks.23." not in key}
    assert written.keys() == expected.keys()
    assert all(form is None or tuple(form) == expected[key] for key, form in written.items())


def _prefixes(shape: str) -> tuple[str, ...]:
    return UNET_PREFIX, VAE_PREFIX, *FAMILIES[shape].traits.encoder_prefixes.values()

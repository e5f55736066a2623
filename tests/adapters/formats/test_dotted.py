"""Keys with dots, as diffusers, PEFT and ComfyUI write them, and the alphas that are told elsewhere."""

import json
import math

import pytest
import torch
from format_help import read

from sdlora.adapters.formats.detect import contents_of
from sdlora.adapters.formats.dotted import alphas_of, canonical_path
from sdlora.adapters.layers import DoraLayer
from sdlora.errors import FormatError

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
SECOND = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"

# (key, module path, part): what each program writes.
DIALECTS = {
    "diffusers, today": {
        f"{Q}.lora_A.weight": (Q, "down"),
        f"{Q}.lora_B.weight": (Q, "up"),
        f"{TEXT}.lora_A.weight": (TEXT, "down"),
        f"{TEXT}.lora_B.weight": (TEXT, "up"),
        f"{SECOND}.lora_A.weight": (SECOND, "down"),
        f"{SECOND}.lora_B.weight": (SECOND, "up"),
    },
    "diffusers with flattened text encoders": {
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight": (TEXT, "down"),
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_B.weight": (TEXT, "up"),
    },
    "diffusers' scripts": {
        f"{Q}.lora.down.weight": (Q, "down"),
        f"{Q}.lora.up.weight": (Q, "up"),
        f"{OUT}.lora.down.weight": (OUT, "down"),
        f"{OUT}.lora.up.weight": (OUT, "up"),
        f"{TEXT}.lora_linear_layer.down.weight": (TEXT, "down"),
        f"{TEXT}.lora_linear_layer.up.weight": (TEXT, "up"),
    },
    "diffusers, attention processors": {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": (Q, "down"),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight": (Q, "up"),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.down.weight": (OUT, "down"),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.up.weight": (OUT, "up"),
    },
    "diffusers, attention processors of the UNet alone": {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": (Q, "down"),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight": (Q, "up"),
    },
    "diffusers, text encoder's old layers": {
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight": (TEXT, "down"),
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight": (TEXT, "up"),
    },
    "diffusers' paths with kohya's names": {
        f"{Q}.lora_down.weight": (Q, "down"),
        f"{Q}.lora_up.weight": (Q, "up"),
    },
    "diffusers, a component's PEFT keys": {
        f"unet.base_model.model.{Q.removeprefix('unet.')}.lora_A.weight": (Q, "down"),
        f"unet.base_model.model.{Q.removeprefix('unet.')}.lora_B.weight": (Q, "up"),
    },
    "PEFT": {
        f"base_model.model.{Q.removeprefix('unet.')}.lora_A.weight": (Q, "down"),
        f"base_model.model.{Q.removeprefix('unet.')}.lora_B.weight": (Q, "up"),
    },
    "PEFT with its adapter's name": {
        f"base_model.model.{CONV.removeprefix('unet.')}.lora_A.default.weight": (CONV, "down"),
        f"base_model.model.{CONV.removeprefix('unet.')}.lora_B.default.weight": (CONV, "up"),
    },
    "PEFT, text encoder": {
        "base_model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight": (TEXT, "down"),
        "base_model.model.encoder.layers.0.self_attn.q_proj.lora_B.weight": (TEXT, "up"),
    },
    "ComfyUI": {
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_down.weight": (Q, "down"),
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_up.weight": (Q, "up"),
        "diffusion_model.input_blocks.1.0.in_layers.2.lora_down.weight": (CONV, "down"),
        "diffusion_model.input_blocks.1.0.in_layers.2.lora_up.weight": (CONV, "up"),
    },
}  # fmt: skip
FORMATS = {"PEFT": "peft", "ComfyUI": "comfyui"}


def tensors_of(keys) -> dict[str, torch.Tensor]:
    shapes = {"down": (2, 6), "up": (4, 2)}
    return {key: torch.randn(shapes[half]) for key, (_, half) in keys.items()}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_dialect_names_these_layers(dialect):
    keys = DIALECTS[dialect]
    tensors = tensors_of(keys)
    layers, unknown = read(tensors)
    assert unknown == ()
    assert set(layers) == {path for path, _ in keys.values()}
    for key, (path, half) in keys.items():
        assert getattr(layers[path], half) is tensors[key]
        assert layers[path].scale == 1.0
    found = contents_of({key: tuple(tensor.shape) for key, tensor in tensors.items()}, {})
    assert found.format == next((name for part, name in FORMATS.items() if dialect.startswith(part)), "diffusers")


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (64, "")])
def test_the_family_is_told_by_the_width_of_cross_attention(width, family):
    path = OUT.replace("to_out.0", "to_k")
    shapes = {f"{path}.lora_A.weight": (2, width), f"{path}.lora_B.weight": (4, 2)}
    assert contents_of(shapes, {}).family == family
    assert (
        contents_of(shapes | {f"{SECOND}.lora_A.weight": (2, 4), f"{SECOND}.lora_B.weight": (4, 2)}, {}).family
        == "sdxl"
    )


def test_what_is_no_layers_tensor_is_named():
    keys = DIALECTS["diffusers, today"]
    extra = {
        f"{Q}.lora_embedding_A": torch.ones(1),
        "vae.encoder.conv_in.lora_A.weight": torch.ones(2, 2),
        "x": torch.ones(1),
    }
    layers, unknown = read({**tensors_of(keys), **extra})
    assert len(layers) == 3 and set(unknown) == set(extra)


@pytest.mark.parametrize("missing", ["lora_A.weight", "lora_B.weight"])
def test_half_a_pair_is_refused_in_the_files_own_words(missing):
    tensors = tensors_of(DIALECTS["diffusers, today"])
    del tensors[f"{Q}.{missing}"]
    with pytest.raises(FormatError, match=rf"to_q has no {missing}; the file is incomplete"):
        read(tensors)


def test_one_layer_in_two_spellings_is_refused():
    tensors = tensors_of(DIALECTS["diffusers, today"]) | tensors_of(DIALECTS["diffusers' scripts"])
    with pytest.raises(FormatError, match="names a layer that the file holds under another name too"):
        read(tensors)


def test_magnitudes_belong_to_rows_whatever_their_shape():
    tensors = {
        f"{CONV}.lora_A.weight": torch.randn(2, 6, 3, 3),
        f"{CONV}.lora_B.weight": torch.randn(4, 2, 1, 1),
        f"{CONV}.lora_magnitude_vector.weight": torch.rand(1, 4, 1, 1),
        f"{Q}.lora_A.weight": torch.randn(2, 6),
        f"{Q}.lora_B.weight": torch.randn(4, 2),
        f"{Q}.lora_magnitude_vector": torch.rand(4),
    }
    layers, unknown = read(tensors)
    assert unknown == ()
    assert all(isinstance(layer, DoraLayer) and not layer.by_column for layer in layers.values())
    weight = torch.randn(4, 6, 3, 3)
    changed = weight + layers[CONV].lora.delta_weight()
    norms = changed.flatten(1).norm(dim=1)[:, None, None, None]
    expected = tensors[f"{CONV}.lora_magnitude_vector.weight"].reshape(4, 1, 1, 1) * changed / norms - weight
    torch.testing.assert_close(layers[CONV].update_of(weight), expected)


# ------------------------------------------------------------------- alphas


def test_alphas_of_the_header_count():
    entry = {
        "unet.r": 2,
        "unet.lora_alpha": 8,
        "unet.alpha_pattern": {"attn2.to_out.0": 1},
        "text_encoder.lora_alpha": 3,
    }
    tensors = tensors_of(DIALECTS["diffusers' scripts"])
    layers, _ = read(tensors, {"lora_adapter_metadata": json.dumps(entry)})
    assert {path: layer.scale for path, layer in layers.items()} == {Q: 4.0, OUT: 0.5, TEXT: 1.5}


def test_alphas_of_the_file_count_before_those_of_the_header():
    tensors = tensors_of(DIALECTS["diffusers, today"]) | {f"{Q}.alpha": torch.tensor(1.0)}
    layers, _ = read(tensors, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8})})
    assert layers[Q].scale == 0.5


def test_rslora_divides_by_the_root_of_the_rank():
    assert alphas_of({"lora_alpha": 3, "use_rslora": True}, {Q: 4}) == {Q: 3 * math.sqrt(4)}


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("to_q", True),
        ("attn1.to_q", True),
        (r"attn1\.to_q", True),
        ("^to_q", False),
        ("^" + Q.removeprefix("unet."), True),
        ("_q", False),
        ("attn2.to_q", False),
    ],
)
def test_a_pattern_is_the_end_of_a_path(pattern, matches):
    found = alphas_of({"lora_alpha": 1, "alpha_pattern": {pattern: 5}}, {Q: 1})
    assert found == {Q: 5.0 if matches else 1.0}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 2}}, r"alpha_pattern '\(a\+\)\+\$' is a regular expression"),
        ({"lora_alpha": "x"}, "its alpha is 'x'; expected a number"),
        ({"lora_alpha": float("nan")}, "its alpha is 'nan'; expected a number"),
        ({"lora_alpha": 10**400}, "its alpha is '1000"),
        ({"lora_alpha": True}, "its alpha is 'True'"),
        ({"lora_alpha": 1, "alpha_pattern": [1]}, "its alpha_pattern is no table of numbers"),
    ],
)
def test_alphas_that_cannot_be_read_are_refused(settings, sentence):
    with pytest.raises(FormatError, match=sentence):
        alphas_of(settings, {Q: 1})


@pytest.mark.parametrize("entry", ["{", "[]", "3", "[" * 100_000])
def test_an_unreadable_header_entry_is_refused(entry):
    with pytest.raises(FormatError, match="its header entry lora_adapter_metadata is not readable"):
        read(tensors_of(DIALECTS["diffusers, today"]), {"lora_adapter_metadata": entry})


def test_paths():
    assert canonical_path("conv_in") == "unet.conv_in"
    assert canonical_path("unet.conv_in") == "unet.conv_in"
    assert (
        canonical_path("text_encoder_2.encoder.layers.1.mlp.fc1")
        == "text_encoder_2.text_model.encoder.layers.1.mlp.fc1"
    )
    for foreign in ("vae.x", "", "unet", "unet.", "unet..x", "unet.a b", "transformer.blocks.0"):
        assert canonical_path(foreign) == ""


def test_a_text_encoders_pattern_counts_with_and_without_text_model():
    inside = TEXT.removeprefix("text_encoder.")
    for pattern in (f"^{inside}", f"^{inside.removeprefix('text_model.')}", "layers.0.self_attn.q_proj"):
        assert alphas_of({"lora_alpha": 8, "alpha_pattern": {pattern: 1}}, {TEXT: 1}) == {TEXT: 1.0}


def test_the_first_of_several_patterns_counts():
    assert alphas_of({"alpha_pattern": {"to_q": 3, "attn1.to_q": 4}}, {Q: 1}) == {Q: 3.0}
    assert alphas_of({"alpha_pattern": {"attn1.to_q": 4, "to_q": 3}}, {Q: 1}) == {Q: 4.0}

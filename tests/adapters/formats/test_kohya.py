import hashlib

import pytest
import torch
from format_help import read

from sdlora.adapters.formats import kohya
from sdlora.adapters.layers import LoraLayer
from sdlora.errors import FormatError
from sdlora.families.base import match_targets
from sdlora.storage import serialize_tensors

# Keys as kohya's trainer writes them, and the diffusers modules that they mean.
KEYS = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_attn2_to_out_0": "unet.down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_2": "unet.up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2",
    "lora_unet_up_blocks_1_attentions_0_proj_in": "unet.up_blocks.1.attentions.0.proj_in",
    "lora_unet_mid_block_attentions_0_proj_out": "unet.mid_block.attentions.0.proj_out",
    "lora_unet_down_blocks_0_resnets_1_time_emb_proj": "unet.down_blocks.0.resnets.1.time_emb_proj",
    "lora_unet_up_blocks_0_resnets_2_conv_shortcut": "unet.up_blocks.0.resnets.2.conv_shortcut",
    "lora_unet_mid_block_resnets_1_conv2": "unet.mid_block.resnets.1.conv2",
    "lora_unet_down_blocks_1_downsamplers_0_conv": "unet.down_blocks.1.downsamplers.0.conv",
    "lora_unet_time_embedding_linear_1": "unet.time_embedding.linear_1",
    "lora_unet_conv_in": "unet.conv_in",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "lora_te_text_model_encoder_layers_11_self_attn_out_proj": "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
    "lora_te_text_model_encoder_layers_5_mlp_fc1": "text_encoder.text_model.encoder.layers.5.mlp.fc1",
}  # fmt: skip

# SDXL's UNet goes by the names of the original code, blocks numbered through.
SDXL_KEYS = {
    "lora_unet_input_blocks_0_0": "unet.conv_in",
    "lora_unet_input_blocks_1_0_in_layers_2": "unet.down_blocks.0.resnets.0.conv1",
    "lora_unet_input_blocks_2_0_emb_layers_1": "unet.down_blocks.0.resnets.1.time_emb_proj",
    "lora_unet_input_blocks_3_0_op": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "lora_unet_input_blocks_4_0_skip_connection": "unet.down_blocks.1.resnets.0.conv_shortcut",
    "lora_unet_input_blocks_5_1_transformer_blocks_1_attn2_to_out_0": "unet.down_blocks.1.attentions.1.transformer_blocks.1.attn2.to_out.0",
    "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj": "unet.down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
    "lora_unet_middle_block_0_out_layers_3": "unet.mid_block.resnets.0.conv2",
    "lora_unet_middle_block_1_proj_in": "unet.mid_block.attentions.0.proj_in",
    "lora_unet_middle_block_1_transformer_blocks_9_ff_net_2": "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.2",
    "lora_unet_middle_block_2_in_layers_2": "unet.mid_block.resnets.1.conv1",
    "lora_unet_output_blocks_0_1_proj_out": "unet.up_blocks.0.attentions.0.proj_out",
    "lora_unet_output_blocks_2_2_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_v": "unet.up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_v",
    "lora_unet_output_blocks_8_0_skip_connection": "unet.up_blocks.2.resnets.2.conv_shortcut",
    "lora_unet_out_2": "unet.conv_out",
    "lora_unet_time_embed_0": "unet.time_embedding.linear_1",
    "lora_unet_label_emb_0_2": "unet.add_embedding.linear_2",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "lora_te2_text_model_encoder_layers_31_mlp_fc2": "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
}  # fmt: skip


def layer_paths(module: torch.nn.Module, prefix: str) -> list[str]:
    return [prefix + path for path in match_targets(module, ["*"])]


@pytest.mark.parametrize("key", KEYS)
def test_keys_and_module_paths(key):
    assert kohya.module_path(key) == KEYS[key]
    assert kohya.key_name(KEYS[key], "sd1") == kohya.key_name(KEYS[key], "sd2") == key


@pytest.mark.parametrize("key", SDXL_KEYS)
def test_keys_and_module_paths_of_sdxl(key):
    assert kohya.module_path(key) == SDXL_KEYS[key]
    assert kohya.key_name(SDXL_KEYS[key], "sdxl") == key


def test_sdxl_in_diffusers_spelling_is_read_too():
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    layers, unknown = read(pair(name))
    assert unknown == ()
    assert list(layers) == [SDXL_KEYS["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"]]


def test_one_layer_in_both_spellings_is_refused():
    both = pair("lora_unet_down_blocks_1_attentions_0_proj_in") | pair("lora_unet_input_blocks_4_1_proj_in")
    with pytest.raises(FormatError, match="names a layer that the file holds under another name too"):
        read(both)


def test_every_layer_of_the_tiny_bases_comes_back_from_its_key(tiny_base, shape):
    paths = layer_paths(tiny_base().unet, "unet.")
    names = [kohya.key_name(path, shape) for path in paths]
    assert len(paths) > 60
    assert [kohya.module_path(name) for name in names] == paths
    assert len(set(names)) == len(names)


def test_paths_and_keys_without_a_place_are_refused():
    with pytest.raises(FormatError, match=r"layer 'vae\.decoder' has no place in kohya's format"):
        kohya.key_name("vae.decoder", "sd1")
    with pytest.raises(FormatError, match=r"layer 'text_encoder_2\.x' has no place in kohya's format for sd2"):
        kohya.key_name("text_encoder_2.x", "sd2")
    with pytest.raises(FormatError, match="has no place in kohya's format for sdxl"):
        kohya.key_name("unet.conv_norm_out", "sdxl")
    with pytest.raises(FormatError, match="key 'lora_te3_x' does not start with"):
        kohya.module_path("lora_te3_x")


def test_write_gives_these_tensors():
    layer = LoraLayer(torch.ones(2, 3), torch.zeros(4, 2), 0.5)
    tensors = kohya.write({"unet.mid_block.attentions.0.proj_in": layer}, "sd1")
    name = "lora_unet_mid_block_attentions_0_proj_in"
    assert set(tensors) == {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"}
    assert tensors[f"{name}.alpha"].shape == ()
    assert tensors[f"{name}.alpha"].item() == 0.5
    assert tensors[f"{name}.lora_down.weight"] is layer.down


def pair(name="lora_unet_conv_in", down=(2, 3), up=(4, 2), **parts):
    return {f"{name}.lora_down.weight": torch.ones(down), f"{name}.lora_up.weight": torch.ones(up), **parts}


def test_read_takes_a_missing_alpha_as_scale_one():
    layers, unknown = read(pair())
    assert unknown == ()
    assert layers["unet.conv_in"].alpha == 2.0
    assert layers["unet.conv_in"].scale == 1.0


def test_read_takes_alpha_of_any_shape_and_type():
    for alpha in (torch.tensor(4), torch.tensor([4.0]), torch.tensor(4.0, dtype=torch.float16)):
        layers, _ = read({**pair(), "lora_unet_conv_in.alpha": alpha})
        assert layers["unet.conv_in"].scale == 2.0


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"lora_unet_conv_in.lora_up.weight": torch.ones(4, 2)}, "has no lora_down.weight; the file is incomplete"),
        ({"lora_unet_conv_in.lora_down.weight": torch.ones(4, 2)}, "has no lora_up.weight; the file is incomplete"),
        (
            {**pair("lora_unet_conv_out"), "lora_unet_conv_in.alpha": torch.tensor(1.0)},
            "conv_in has no lora_down.weight",
        ),
        (pair(down=(2, 3), up=(4, 3)), r"has shapes down \(2, 3\) and up \(4, 3\), which make no pair"),
        (pair(down=(0, 3), up=(4, 0)), "make no pair"),
        (pair(down=(2, 3, 3, 3), up=(4, 2)), "make no pair"),
        (pair(down=(2, 3, 3, 3), up=(4, 2, 3, 3)), "make no pair"),
        (pair(down=(2,), up=(4,)), "make no pair"),
        ({**pair(), "lora_unet_conv_in.alpha": torch.tensor([1.0, 2.0])}, "alpha has 2 numbers"),
        ({**pair(), "lora_unet_conv_in.alpha": torch.tensor(float("nan"))}, "alpha is nan; expected a finite"),
        ({**pair(), "lora_unet_conv_in.alpha": torch.tensor(float("inf"))}, "alpha is inf"),
        ({key: value.to(torch.int8) for key, value in pair().items()}, "expected floating-point numbers"),
    ],
)
def test_what_makes_no_layer_is_refused(tensors, sentence):
    with pytest.raises(FormatError, match=sentence):
        read(tensors)


def test_read_names_what_it_does_not_know():
    extra = {
        "lora_unet_conv_in.diff_b": torch.ones(4),
        "lora_unet_conv_in.oft_blocks": torch.ones(2, 2, 2),
        **pair("lora_unet_mid__block_x"),
        **pair("lora_unet_input_blocks_3_1_proj_in"),
        **pair("lora_unet_output_blocks_4_0_in_layers_0"),
    }
    layers, unknown = read({**pair(), **extra})
    assert list(layers) == ["unet.conv_in"]
    assert set(unknown) == set(extra)


def test_recognises():
    assert kohya.places(dict.fromkeys(pair(), (2, 2)), {})
    assert not kohya.places({"lora_unet_conv_in.alpha": ()}, {})
    assert not kohya.places({"unet.conv_in.lora_A.weight": (2, 2), "lora_te3_x.lora_up.weight": (2, 2)}, {})


@pytest.mark.parametrize(
    ("key", "width", "metadata", "family"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768, {}, "sd1"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 1024, {}, "sd2"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k", 320, {}, ""),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 2048, {}, "sdxl"),
        ("lora_unet_conv_in", 4, {"ss_base_model_version": "sd_v1"}, "sd1"),
        ("lora_unet_conv_in", 4, {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ("lora_unet_conv_in", 4, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        ("lora_unet_conv_in", 4, {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2"),
        ("lora_unet_conv_in", 4, {"ss_v2": "True"}, "sd2"),
        ("lora_unet_conv_in", 4, {"ss_base_model_version": "sd_v2_v"}, "sd2"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 640, {}, "sdxl"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280, {"ss_v2": "True"}, "sdxl"),
    ],
)
def test_family_of(key, width, metadata, family):
    shapes = {key: tuple(tensor.shape) for key, tensor in pair(key, down=(2, width)).items()}
    assert kohya.family_of(kohya.places(shapes, metadata), shapes, metadata) == family


def test_hashes_are_those_of_the_file_without_its_metadata():
    generator = torch.Generator().manual_seed(0)
    tensors = {"lora_unet_conv_in.lora_down.weight": torch.randn(600, 600, generator=generator)}
    data = serialize_tensors(tensors, {})
    found = kohya.hashes(tensors)
    body = tensors["lora_unet_conv_in.lora_down.weight"].numpy().tobytes()
    assert found["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert found["sshs_legacy_hash"] == hashlib.sha256(data[1 << 20 : (1 << 20) + 65536]).hexdigest()[:8]


def test_layers_of_other_models_are_none():
    for name in ("double_blocks_0_img_attn_proj", "single_blocks_1_linear1", "joint_blocks_0_x_block_attn_qkv"):
        with pytest.raises(FormatError, match=r"is an adapter for Flux or a like model|holds no adapter"):
            read(pair(f"lora_unet_{name}"))
    layers, unknown = read(
        {**pair("lora_unet_double_blocks_0_img_attn_proj"), **pair("lora_te1_text_model_encoder_layers_0_mlp_fc1")}
    )
    assert len(layers) == 1 and len(unknown) == 2


def test_lycoris_by_itself_and_the_upsampler_of_sd1_by_its_original_name():
    layers, unknown = read(
        {**pair("lycoris_mid_block_attentions_0_proj_in"), **pair("lora_unet_output_blocks_2_1_conv")}
    )
    assert unknown == ()
    assert set(layers) == {"unet.mid_block.attentions.0.proj_in", "unet.up_blocks.0.upsamplers.0.conv"}

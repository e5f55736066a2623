import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from sdlora.adapters.file import AdapterFile, adapter_family, read_adapter, write_adapter
from sdlora.adapters.layers import LoraLayer
from sdlora.errors import ConfigError, FormatError
from sdlora.storage import read_header, sha256_of_tensor_data

PATH = "unet.mid_block.attentions.0.proj_in"
NAME = "lora_unet_mid_block_attentions_0_proj_in"
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}


def adapter_of(layer: LoraLayer) -> AdapterFile:
    return AdapterFile({PATH: layer}, "sd1")


def test_write_read_write_gives_the_same_bytes(tiny_base, make_adapter, tmp_path, shape):
    base = tiny_base()
    adapter = make_adapter(base, alpha=0.7)
    adapter = replace(
        adapter, metadata={"ss_output_name": "zorb", "note": "ä", "ss_base_model_version": VERSIONS[shape]}
    )
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_adapter(adapter, first)
    read = read_adapter(first)
    write_adapter(read, second)
    assert first.read_bytes() == second.read_bytes()
    assert read.family == shape == adapter_family(first)
    assert read.metadata["ss_output_name"] == "zorb"
    assert set(read.layers) == set(adapter.layers)
    for path, layer in adapter.layers.items():
        assert torch.equal(read.layers[path].down, layer.down)
        assert torch.equal(read.layers[path].up, layer.up)
        assert read.layers[path].alpha == pytest.approx(0.7, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_stay_halves_with_their_alpha(tmp_path, dtype):
    layer = LoraLayer(torch.randn(4, 8).to(dtype), torch.randn(8, 4).to(dtype), 2.5)
    write_adapter(adapter_of(layer), tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors")
    assert read.layers[PATH].down.dtype == dtype
    assert read.layers[PATH].alpha == 2.5
    write_adapter(read, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_hashes_in_the_header_are_recomputed(tmp_path):
    layer = LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    stale = AdapterFile({PATH: layer}, "sd1", {"sshs_model_hash": "e3b0c442"})
    write_adapter(stale, tmp_path / "a.safetensors")
    written = read_header(tmp_path / "a.safetensors").metadata
    assert written["sshs_model_hash"] == sha256_of_tensor_data(tmp_path / "a.safetensors")
    assert set(written) == {"sshs_model_hash", "sshs_legacy_hash"}


def test_components_are_counted(tiny_base, make_adapter):
    base = tiny_base()
    adapter = make_adapter(base)
    assert set(adapter.components()) == {"unet", *base.text_encoders}
    assert adapter.components()["text_encoder"] == 8
    assert sum(adapter.components().values()) == len(adapter.layers)


def test_non_finite_weights_are_not_written_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(adapter_of(LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)), path)
    before = path.read_bytes()
    for value in (float("nan"), float("inf")):
        bad = LoraLayer(torch.ones(1, 2), torch.full((2, 1), value), 1.0)
        with pytest.raises(FormatError, match=f"layer {PATH} holds NaN or infinity; not written"):
            write_adapter(adapter_of(bad), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="adapter format 'a1111' is unknown; known: kohya"):
        write_adapter(AdapterFile({}, "sd1"), tmp_path / "a.safetensors", "a1111")


def pair(name=NAME, suffixes=("lora_down.weight", "lora_up.weight")):
    return {f"{name}.{suffixes[0]}": torch.ones(1, 2), f"{name}.{suffixes[1]}": torch.ones(2, 1)}


REFUSED = {
    "half a pair": ({f"{NAME}.lora_up.weight": torch.ones(2, 1)}, "has no lora_down.weight; the file is incomplete"),
    "NaN": ({**pair(), f"{NAME}.lora_up.weight": torch.full((2, 1), float("nan"))}, "holds NaN or infinity"),
    "NaN in float8": (
        {key: torch.full_like(value, float("nan")).to(torch.float8_e4m3fn) for key, value in pair().items()},
        "holds NaN or infinity",
    ),
    "DoRA": ({**pair(), f"{NAME}.dora_scale": torch.ones(2, 1)}, "is a DoRA adapter"),
    "Tucker": (
        {**pair(), f"{NAME}.lora_mid.weight": torch.ones(1, 1)},
        "1 tensors that this version does not understand",
    ),
    "mixed LyCORIS": ({**pair(), "lora_unet_conv_in.hada_w1_a": torch.ones(1)}, "is a LyCORIS adapter"),
    "LyCORIS": ({"lora_unet_conv_in.lokr_w1": torch.ones(1)}, "is a LyCORIS adapter"),
    "bundle": ({**pair(), "bundle_emb.cat.emb_params": torch.ones(1, 4)}, "textual-inversion embedding besides"),
    "PEFT": (pair("unet.conv_in", ("lora_A.weight", "lora_B.weight")), "diffusers or PEFT format"),
    "diffusers": (pair("unet.conv_in", ("lora.down.weight", "lora.up.weight")), "diffusers or PEFT format"),
    "checkpoint": ({"model.diffusion_model.out.2.bias": torch.ones(4)}, "is a whole Stable Diffusion checkpoint"),
    "embedding": ({"emb_params": torch.ones(2, 8)}, "is a textual-inversion embedding"),
    "anything": ({"transformer.blocks.0": torch.ones(2, 8)}, r"holds no adapter \(1 tensors, such as 'transformer"),
    "nothing": ({}, r"holds no adapter \(0 tensors, none\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_readable_adapter_is_refused_in_one_sentence(tmp_path, name):
    tensors, sentence = REFUSED[name]
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(FormatError, match=sentence) as caught:
        read_adapter(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_folder_and_a_web_page_are_refused(tmp_path):
    with pytest.raises(FormatError, match="there is no such adapter file"):
        read_adapter(tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match="is a folder"):
        read_adapter(tmp_path)
    (tmp_path / "a.safetensors").write_text("<html>log in</html>")
    with pytest.raises(FormatError, match="is a web page"):
        read_adapter(tmp_path / "a.safetensors")


def test_random_damage_is_refused_or_harmless(tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(adapter_of(LoraLayer(torch.ones(2, 3), torch.ones(3, 2), 1.0)), path)
    sound, draw, refused = path.read_bytes(), random.Random(11), 0
    for _ in range(600):
        data = bytearray(sound)
        for _ in range(draw.choice((1, 2, 4))):
            data[draw.randrange(len(data))] = draw.choice((draw.randrange(256), *b'0123"_.,[]'))
        path.write_bytes(data)
        try:
            layers = read_adapter(path).layers
        except FormatError as error:
            refused += 1
            assert str(error).startswith(str(path))
        else:
            assert all(layer.delta_weight().isfinite().all() for layer in layers.values())
    assert 100 < refused < 600

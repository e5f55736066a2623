"""cloneofsimo's numbered layers, in the order in which that trainer met them."""

import json

import pytest
import torch
from format_help import read

from sdlora.adapters.file import read_adapter
from sdlora.adapters.formats.detect import contents_of
from sdlora.errors import FormatError
from sdlora.storage import serialize_tensors

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def unet_layers(cross=768, middle_last=True, gates=True):
    """(path, input width, output width) as the public trainer's traversal gives them: written out block by block."""
    down = [(f"down_blocks.{b}.attentions.{a}", w) for b, w in enumerate((320, 640, 1280)) for a in range(2)]
    up = [(f"up_blocks.{b}.attentions.{a}", w) for b, w in ((1, 1280), (2, 640), (3, 320)) for a in range(3)]
    middle = [("mid_block.attentions.0", 1280)]
    for place, width in down + (up + middle if middle_last else middle + up):
        block = f"{place}.transformer_blocks.0"
        for name in ATTENTION:
            yield f"{block}.attn1.{name}", width, width
        if gates:
            yield f"{block}.ff.net.0.proj", width, 8 * width
        for name in ATTENTION:
            yield f"{block}.attn2.{name}", cross if name in ("to_k", "to_v") else width, width


def tensors_of(layers, component="unet", rank=1):
    found = {}
    for number, (_, inside, out) in enumerate(layers):
        found[f"{component}:{number}:down"] = torch.zeros(rank, inside)
        found[f"{component}:{number}:up"] = torch.zeros(out, rank)
    return found


@pytest.mark.parametrize(("cross", "family"), [(768, "sd1"), (1024, "sd2")])
@pytest.mark.parametrize("middle_last", [True, False])
@pytest.mark.parametrize("gates", [True, False])
def test_layers_are_found_by_their_order(cross, family, middle_last, gates):
    expected = list(unet_layers(cross, middle_last, gates))
    tensors = tensors_of(expected)
    layers, unknown = read(tensors, {"unet": json.dumps(["CrossAttention", "Attention", "GEGLU"])})
    assert unknown == () and len(layers) == 16 * (9 if gates else 8)
    assert set(layers) == {f"unet.{path}" for path, _, _ in expected}
    for number, (path, _, _) in enumerate(expected):
        assert layers[f"unet.{path}"].down is tensors[f"unet:{number}:down"]
    assert contents_of({key: tuple(tensor.shape) for key, tensor in tensors.items()}, {}).family == family


def test_text_encoder_and_words(tmp_path):
    tensors = tensors_of([("", 768, 768)] * 48, "text_encoder") | {"<s1>": torch.randn(768)}
    path = tmp_path / "a.safetensors"
    path.write_bytes(serialize_tensors(tensors, {"<s1>": "<embed>", "text_encoder:0:rank": "1"}))
    adapter = read_adapter(path)
    assert len(adapter.layers) == 48
    names = [name.rpartition(".")[2] for name in list(adapter.layers)[:4]]
    assert names == ["k_proj", "v_proj", "q_proj", "out_proj"]
    assert torch.equal(adapter.tokens["<s1>"]["text_encoder"], tensors["<s1>"][None])
    assert adapter.family == "sd1"


@pytest.mark.parametrize("change", ["a layer less", "a gap", "another width"])
def test_an_unknown_order_is_refused(change):
    tensors = tensors_of(unet_layers())
    if change == "a layer less":
        del tensors["unet:143:down"], tensors["unet:143:up"]
    elif change == "a gap":
        tensors["unet:200:down"], tensors["unet:200:up"] = tensors.pop("unet:143:down"), tensors.pop("unet:143:up")
    else:
        tensors["unet:3:down"] = torch.zeros(1, 321)
    with pytest.raises(FormatError, match=r"layers unet:0 to unet:\d+ stand in no order that is known"):
        read(tensors)


def test_half_a_pair_is_refused():
    tensors = tensors_of(unet_layers())
    del tensors["unet:5:up"]
    with pytest.raises(FormatError, match="unet:5 has no up; the file is incomplete"):
        read(tensors)

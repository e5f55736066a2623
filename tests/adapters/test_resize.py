"""Resizing: to a rank, a share of energy, or a file's size."""

import pytest
import torch
from adapter_kinds import random_layer

from sdlora.adapters.algebra import Truncation
from sdlora.adapters.blocks import block_of
from sdlora.adapters.file import AdapterFile
from sdlora.adapters.layers import DoraLayer, LoraLayer
from sdlora.adapters.resize import resize
from sdlora.errors import ConfigError, FormatError

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.up_blocks.1.resnets.0.conv1"
MID = "unet.mid_block.attentions.0.proj_in"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def low_rank(out, inside, rank, seed, decay=0.5):
    generator = torch.Generator().manual_seed(seed)
    scale = decay ** torch.arange(rank)
    return LoraLayer(
        torch.randn(rank, inside, generator=generator), torch.randn(out, rank, generator=generator) * scale, 4.0
    )


@pytest.fixture
def adapter():
    return AdapterFile(
        {Q: low_rank(60, 50, 16, 0), TEXT: low_rank(40, 40, 16, 1)}, "sd1", {"ss_network_dim": "16", "a": "b"}
    )


def lost(before, after):
    one, other = before.delta_weight(), after.delta_weight()
    return float(((one - other).square().sum() / one.square().sum()).double())


def test_to_a_rank(adapter):
    done = []
    resized = resize(adapter, Truncation(rank=4), on_layer=lambda number, count: done.append((number, count)))
    assert {layer.rank for layer in resized.adapter.layers.values()} == {4}
    assert done == [(1, 2), (2, 2)]
    for path, layer in adapter.layers.items():
        kept = resized.energy[block_of(path)]
        assert 1 - kept == pytest.approx(lost(layer, resized.adapter.layers[path]), abs=1e-5)
    assert min(resized.energy.values()) <= resized.energy[""] <= max(resized.energy.values())
    assert resized.adapter.metadata["ss_network_dim"] == resized.adapter.metadata["ss_network_alpha"] == "4"
    assert resized.adapter.metadata["a"] == "b"


def test_to_a_share_of_energy(adapter):
    resized = resize(adapter, Truncation(energy=0.95))
    for path, layer in adapter.layers.items():
        small = resized.adapter.layers[path]
        assert lost(layer, small) <= 0.05 + 1e-6
        assert lost(layer, resize(adapter, Truncation(rank=small.rank - 1)).adapter.layers[path]) > 0.05
    assert resized.energy[""] >= 0.95


def test_to_a_size(adapter):
    for size in (3000, 8000, 11_000):
        resized = resize(adapter, Truncation(), bytes=size)
        made = sum(tensor.nbytes for layer in resized.adapter.layers.values() for tensor in layer.tensors())
        assert 0.7 * size < made <= size
    with pytest.raises(ConfigError, match=r"0\.0005 MB is too small: rank 1 in every layer takes 0\.00076 MB"):
        resize(adapter, Truncation(), bytes=500)
    whole = resize(adapter, Truncation(), bytes=10_000_000)
    assert {layer.rank for layer in whole.adapter.layers.values()} == {16} and whole.energy[""] == pytest.approx(1)


def test_other_kinds_become_lora_of_the_weights_shape():
    layers = {
        CONV: random_layer("loha", (32, 40, 3, 3)),
        MID: random_layer("lokr", (32, 40)),
        Q: random_layer("dense", (60, 50)),
        TEXT: random_layer("dora", (40, 40)),
    }
    resized = resize(AdapterFile(layers, "sd1"), Truncation(rank=2)).adapter
    assert resized.layers[CONV].shape == (32, 40, 3, 3) and resized.layers[MID].shape == (32, 40, 1, 1)
    assert isinstance(resized.layers[Q], LoraLayer) and isinstance(resized.layers[TEXT], DoraLayer)
    assert torch.equal(resized.layers[TEXT].magnitude, layers[TEXT].magnitude)
    assert {layer.rank for layer in resized.layers.values()} == {2}
    assert resized.metadata["ss_network_module"] == "lycoris.kohya"


def test_words_alone_cannot_be_resized():
    words = {"zorb": {"text_encoder": torch.ones(1, 4)}}
    with pytest.raises(FormatError, match="has no layers to resize, only words"):
        resize(AdapterFile({}, "sd1", {}, words), Truncation(rank=1))


def test_blocks():
    assert [block_of(path) for path in (Q, CONV, MID, TEXT)] == [
        "unet.down_blocks.0",
        "unet.up_blocks.1",
        "unet.mid_block",
        "text_encoder",
    ]

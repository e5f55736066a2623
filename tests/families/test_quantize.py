"""The UNet's linear layers in int8 and nf4, on the CPU as on a GPU."""

import pytest
import torch
from torch import nn

from sdlora import BaseSection, Engine, load_base, make_request
from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.inject import (
    add_adapter,
    remove_adapter,
    set_adapter_weights,
)
from sdlora.adapters.live import base_weight
from sdlora.adapters.trainable import new_adapter
from sdlora.adapters.write import write_adapter
from sdlora.config import AdapterSection
from sdlora.errors import ModelError
from sdlora.families.base import Conditioning, PictureSize
from sdlora.families.quantize import full_weight, weight_bytes

SHAPES = ("sd1", "sd2", "sdxl")
SIZE = PictureSize((64, 64), (0, 0), (64, 64))


@pytest.fixture(params=["int8", "nf4"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def quantized(tiny_folder, shape, kind):
    return lambda wanted=kind, precision="fp32": load_base(
        BaseSection(path=str(tiny_folder(shape)), precision=precision, quantize=wanted), "cpu"
    )


def predict(base) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(base.dtype)
    states = torch.randn(2, 77, base.unet.config.cross_attention_dim, generator=generator).to(base.dtype)
    conditioning = Conditioning(states, torch.randn(2, 32, generator=generator).to(base.dtype))
    return base.family.predict(base, latents, torch.tensor([10, 700]), conditioning, [SIZE] * 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_layers_of_the_attention_blocks_are_held_in_few_bits(quantized, kind):
    base, plain = quantized(), quantized("none")
    assert base.quantize == kind
    changed = {
        path
        for path, layer in base.unet.named_modules()
        if type(layer).__name__.startswith("Linear") and type(layer) is not nn.Linear
    }
    expected = {
        path for path, layer in plain.unet.named_modules() if isinstance(layer, nn.Linear) and "attentions." in path
    }
    assert changed == expected and len(changed) > 20
    for path in sorted(changed)[:3]:
        layer, before = base.unet.get_submodule(path), plain.unet.get_submodule(path).weight
        # A row of int8 has steps of max/127. nf4's widest gap is 0.3 of its block's maximum, itself held in 8 bits.
        bound = {"int8": 0.6 / 127, "nf4": 0.2}[kind] * before.abs().max()
        assert (full_weight(layer) - before).abs().max() <= bound
        count = before.numel()
        held = weight_bytes(nn.ModuleList([layer])) - (0 if layer.bias is None else 4 * layer.bias.numel())
        # int8: a byte a weight and a float32 a row. nf4: half a byte, a byte of scale for each 64, small tables.
        tables = {"int8": 4 * before.shape[0] + 1, "nf4": count // 64 + 2500}[kind]
        assert held <= {"int8": count, "nf4": count // 2}[kind] + tables
    assert weight_bytes(base.unet) < weight_bytes(plain.unet)
    with torch.no_grad():
        ours, theirs = predict(base), predict(plain)
    assert 0 < (ours - theirs).norm() / theirs.norm() < {"int8": 0.02, "nf4": 0.25}[kind]


@pytest.mark.parametrize(("shape", "precision"), [("sd1", "fp32"), ("sd1", "bf16"), ("sd2", "bf16"), ("sdxl", "bf16")])
def test_an_adapter_over_it_trains_saves_and_acts_alike(quantized, tmp_path, shape, precision):
    base = quantized(precision=precision)
    digest = base.weights_sha256()
    with torch.no_grad():
        predict(base)  # as when the prediction type is checked before training
    assert base.weights_sha256() == digest
    section = AdapterSection(rank=4, targets=("transformer",))
    trained = new_adapter(base, "trained", section, seed=1)
    parameters = [weight.parameter for weight in trained.weights]
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    goal = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", dtype=base.dtype, enabled=base.dtype != torch.float32):
            loss = (predict(base).float() - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert base.weights_sha256() == digest
    path = tmp_path / "a.safetensors"
    write_adapter(AdapterFile(trained.layers(), shape), path)
    other = quantized(precision=precision)
    bare = predict(other)
    add_adapter(other, "file", read_adapter(path))
    set_adapter_weights(other, {"file": 1.0})
    with torch.no_grad(), torch.autocast("cpu", dtype=base.dtype, enabled=base.dtype != torch.float32):
        torch.testing.assert_close(predict(other).float(), predict(base).float(), atol=0.02, rtol=0.02)
    assert not torch.allclose(predict(other).float(), bare.float(), atol=1e-3)
    remove_adapter(other, "file")
    assert other.weights_sha256() == digest


def test_a_weight_can_be_had_in_full(quantized):
    base, plain = quantized(), quantized("none")
    for path in ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "unet.conv_in"):
        norm = pytest.approx(float(base_weight(plain, path).norm()), rel=0.05)
        assert float(base_weight(base, path).norm()) == norm
        with torch.no_grad():
            predict(base)
        assert float(base_weight(base, path).norm()) == norm


def test_pictures_are_made_with_it_and_the_recipe_says_so(quantized, kind):
    engine, plain = Engine(quantized()), Engine(quantized("none"))
    request = make_request(prompt="a red ball", steps=2)
    ((picture, recipe),) = engine.generate(request)
    ((other, reference),) = plain.generate(request)
    assert recipe.quantize == kind and reference.quantize == "none"
    assert picture.size == other.size and picture.tobytes() != other.tobytes()


def test_where_bitsandbytes_fails_it_is_said(quantized, monkeypatch):
    import bitsandbytes

    def fail(*_, **__):
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(bitsandbytes.nn, "Params4bit", fail)
    with pytest.raises(ModelError, match=r"base\.quantize = nf4 does not work here \(no kernel for this device\)"):
        quantized("nf4")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_base_stays_the_same_whatever_precision_comes_in(quantized, precision):
    """On a GPU norms give float32 under autocast, and half precision without."""
    base = quantized(precision=precision)
    digest = base.weights_sha256()
    layer = base.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_out[0]
    for dtype in (torch.float32, base.dtype):
        layer(torch.randn(2, 4, layer.in_features, dtype=dtype))
        assert base.weights_sha256() == digest

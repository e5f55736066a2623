"""Every kind of adapter beside every family's live layers, against the same update added to dense weights."""

from contextlib import nullcontext

import pytest
import torch
from adapter_kinds import EVERYWHERE, KINDS, LINEAR, TUCKER, random_layer
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import nn

from sdlora.adapters.branches import DenseBranch, attach, branch_of, detach, set_strengths
from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.inject import (
    adapters_off,
    add_adapter,
    has_float32_adapter,
    remove_adapter,
    set_adapter_weights,
)
from sdlora.adapters.layers import DoraLayer, LohaLayer, LokrLayer, LoraLayer
from sdlora.adapters.live import base_weight
from sdlora.adapters.trainable import new_adapter
from sdlora.adapters.write import write_adapter
from sdlora.config import AdapterSection, BaseSection
from sdlora.errors import ModelError
from sdlora.families.base import Conditioning, PictureSize, autocast
from sdlora.families.registry import load_base

# Linear layers of each sort, the two convolutions with strides and kernels, and a 1 x 1 one, of which sd1 has more.
PLACES = (
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "mid_block.resnets.0.time_emb_proj",
    "conv_in",
)


def places(base) -> list[str]:
    """Paths as files have them, in the UNet and in each text encoder."""
    unet = [place for place in PLACES if place in dict(base.unet.named_modules())]
    if base.family.name == "sdxl":  # its first block has no attention
        unet += [place.replace("down_blocks.0.attentions", "down_blocks.1.attentions") for place in PLACES[:4]]
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    return [*(f"unet.{place}" for place in unet), *(f"{name}.{text}" for name in base.text_encoders)]


def make_file(base, kind: str, seed: int = 0) -> AdapterFile:
    """An adapter of one kind, where Tucker forms are for convolutions only."""
    layers = {}
    for number, path in enumerate(places(base)):
        shape = tuple(base_weight(base, path).shape)
        if kind not in TUCKER or shape[2:]:
            layers[path] = random_layer(kind, shape, 100 * seed + number)
    return AdapterFile(layers, base.family.name)


def outputs(base) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 77, base.unet.config.cross_attention_dim, generator=generator)
    conditioning = Conditioning(states.to(base.dtype), torch.randn(2, 32, generator=generator).to(base.dtype))
    sizes = [PictureSize((64, 64), (0, 0), (64, 64))] * 2
    with torch.no_grad():
        text = base.family.encode_prompts(base, ["a red ball", ""]).states
        return [
            base.family.predict(base, latents.to(base.dtype), torch.tensor([10, 700]), conditioning, sizes).float(),
            text.float(),
        ]


def updates_of(base, adapter: AdapterFile) -> dict[str, torch.Tensor]:
    return {path: layer.update_of(base_weight(base, path)) for path, layer in adapter.layers.items()}


def add_to_weights(base, updates: dict[str, torch.Tensor], strength: float) -> None:
    modules = dict(base.components())
    for path, update in updates.items():
        component, inside = path.split(".", 1)
        live = inside if component == "unet" or hasattr(modules[component], "text_model") else inside[11:]
        with torch.no_grad():
            modules[component].get_submodule(live).weight += strength * update


def hooks_of(base) -> list[tuple[str, object]]:
    """Every forward hook and where it is; transformers has some of its own."""
    modules = {f"{name}.{path}": layer for name, module in base.components() for path, layer in module.named_modules()}
    return [(path, hook) for path, layer in modules.items() for hook in layer._forward_hooks.values()]


def assert_close(one, other, atol=2e-5) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=atol * max(1.0, float(b.abs().max())), rtol=1e-4)


def assert_same_bits(one, other) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("shape", "kind"), EVERYWHERE)
def test_every_kind_acts_as_its_update_added_to_the_weights(tiny_base, tmp_path, kind):
    base = tiny_base()
    digest, bare = base.weights_sha256(), outputs(base)
    adapter = make_file(base, kind)
    write_adapter(adapter, tmp_path / "a.safetensors")
    add_adapter(base, "one", read_adapter(tmp_path / "a.safetensors"))
    assert_same_bits(outputs(base), bare)  # in place, not yet active
    expected, added = tiny_base(), 0.0
    updates = updates_of(expected, adapter)
    for strength in (1.0, 0.5, -0.7):
        set_adapter_weights(base, {"one": strength})
        add_to_weights(expected, updates, strength - added)
        added = strength
        found = outputs(base)
        assert_close(found, outputs(expected))
        assert (found[0] - bare[0]).abs().max() > 1e-2
    set_adapter_weights(base, {"one": 0.0})
    assert_same_bits(outputs(base), bare)
    assert base.weights_sha256() == digest


def test_kinds_mix_with_each_other_and_with_a_trained_one(tiny_base):
    base, expected = tiny_base(), tiny_base()
    mixed = [make_file(base, kind, seed) for seed, kind in enumerate(("dora", "loha", "lokr pair", "dense"))]
    trained = new_adapter(base, "trained", AdapterSection(rank=2, alpha=2, targets=("attn1.to_q", "conv1")), seed=1)
    with torch.no_grad():
        for weight in trained.weights:
            weight.parameter.add_(torch.randn(weight.parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    for number, adapter in enumerate(mixed):
        add_adapter(base, f"file{number}", adapter)
    strengths = (0.6, -0.4, 0.5, 0.3)
    set_adapter_weights(base, {"trained": 0.8, **{f"file{number}": s for number, s in enumerate(strengths)}})
    bare = outputs(expected)
    # Each is measured at the bare base, so that their order does not matter.
    parts = [updates_of(expected, adapter) for adapter in (*mixed, AdapterFile(trained.layers(), ""))]
    for updates, strength in zip(parts, (*strengths, 0.8), strict=True):
        add_to_weights(expected, updates, strength)
    wanted = outputs(expected)
    assert_close(outputs(base), wanted, atol=5e-5)
    with adapters_off(base):
        assert_same_bits(outputs(base), bare)
    assert_close(outputs(base), wanted, atol=5e-5)


def test_removal_gives_every_layer_back_without_hooks(tiny_base):
    base = tiny_base()
    before = {name: dict(module.named_modules()) for name, module in base.components()}
    digest, bare = base.weights_sha256(), outputs(base)
    hooks = hooks_of(base)
    add_adapter(base, "one", make_file(base, "dora"))
    add_adapter(base, "two", make_file(base, "lokr"))
    assert len(hooks_of(base)) == len(hooks) + len(places(base))
    set_adapter_weights(base, {"one": 1.0, "two": 1.0})
    remove_adapter(base, "one")
    set_adapter_weights(base, {"two": 1.0})
    alone = tiny_base()
    add_to_weights(alone, updates_of(alone, make_file(alone, "lokr")), 1.0)
    assert_close(outputs(base), outputs(alone))
    remove_adapter(base, "two")
    for name, module in base.components():
        after = dict(module.named_modules())
        assert all(after[path] is layer for path, layer in before[name].items()) and list(after) == list(before[name])
    assert hooks_of(base) == hooks
    assert base.weights_sha256() == digest
    assert_same_bits(outputs(base), bare)


def test_a_removed_adapter_no_longer_acts_even_before_the_next_weights(tiny_base):
    base = tiny_base()
    bare = outputs(base)
    add_adapter(base, "one", make_file(base, "loha"))
    add_adapter(base, "two", make_file(base, "loha", 1))
    set_adapter_weights(base, {"one": 1.0})
    remove_adapter(base, "one")
    assert_same_bits(outputs(base), bare)


@pytest.mark.parametrize("shape", ["sd1"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_does_not_fit_is_refused_and_the_base_is_as_before(tiny_base, shape, kind):
    base = tiny_base()
    digest, hooks = base.weights_sha256(), hooks_of(base)
    good = make_file(base, kind)
    path = next(path for path in good.layers if path.endswith("conv1"))
    out, inside, *kernel = base_weight(base, path).shape
    for size in ((out + 4, inside, *kernel), (out, inside + 4, *kernel), (out, inside, 1, 1)):
        wrong = AdapterFile({**good.layers, path: random_layer(kind, size)}, good.family)
        with pytest.raises(
            ModelError, match=rf"such as {path} (is|has) .* in the file; it was trained on another base"
        ):
            add_adapter(base, "wrong", wrong)
    assert hooks_of(base) == hooks
    assert base.weights_sha256() == digest


@pytest.mark.parametrize("shape", ["sd1"])
@pytest.mark.parametrize("kind", LINEAR)
def test_weights_of_a_linear_layer_fit_a_one_by_one_convolution_and_back(tiny_base, shape, kind):
    base = tiny_base()
    linear, convolution = nn.Linear(8, 12), nn.Conv2d(8, 12, 1)
    base.text_encoders["text_encoder"].extra = nn.ModuleList([linear, convolution])
    inputs = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(1))
    for layer, values, others in ((linear, inputs.transpose(1, 3), (12, 8, 1, 1)), (convolution, inputs, (12, 8))):
        adapter = random_layer(kind, others)
        path = "text_encoder.extra.0" if layer is linear else "text_encoder.extra.1"
        with torch.no_grad():
            before = layer(values)
            update = adapter.update_of(layer.weight)
            added = nn.functional.linear(values, update) if layer is linear else torch.conv2d(values, update)
            add_adapter(base, "one", AdapterFile({path: adapter}, ""))
            set_adapter_weights(base, {"one": 0.5})
            torch.testing.assert_close(layer(values), before + 0.5 * added, atol=1e-5, rtol=1e-4)
            remove_adapter(base, "one")


@pytest.mark.parametrize("shape", ["sd1"])
def test_magnitudes_for_other_input_channels_are_refused(tiny_base, shape):
    base = tiny_base()
    out, inside, *kernel = base_weight(base, "unet.conv_in").shape
    layer = DoraLayer(random_layer("loha", (out, inside, *kernel)), torch.ones(1, 2, 1, 1))
    with pytest.raises(ModelError, match=r"unet\.conv_in has 4 input channels there and 2 magnitudes in the file"):
        add_adapter(base, "wrong", AdapterFile({"unet.conv_in": layer}, ""))


@pytest.mark.parametrize("shape", ["sd1"])
@pytest.mark.parametrize(
    ("kind", "precision"), [(kind, "bf16") for kind in LINEAR] + [(kind, "fp16") for kind in ("loha", "lokr", "dora")]
)
def test_in_half_precision_weights_are_half_and_the_effect_is_alike(tiny_folder, shape, kind, precision):
    def half():
        return load_base(BaseSection(path=str(tiny_folder(shape)), precision=precision), "cpu")

    base, expected = half(), half()
    digest = base.weights_sha256()
    adapter = make_file(base, kind)
    add_adapter(base, "one", adapter)
    assert not has_float32_adapter(base)
    set_adapter_weights(base, {"one": 0.5})
    add_to_weights(expected, updates_of(expected, adapter), 0.5)
    for context in (nullcontext(), autocast(base)):
        with context:
            found, wanted = outputs(base), outputs(expected)
        bound = {"bf16": 0.04, "fp16": 0.006}[precision]
        assert all((f - w).norm() < bound * w.norm() for f, w in zip(found, wanted, strict=True))
    assert base.weights_sha256() == digest


@pytest.mark.parametrize("shape", ["sd1"])
@pytest.mark.parametrize(
    ("kind", "quantize", "precision"),
    [(kind, "nf4", "fp32") for kind in LINEAR]
    + [(kind, *how) for kind in ("loha", "dora", "dora by column") for how in (("int8", "bf16"), ("nf4", "bf16"))],
)
def test_on_a_quantised_base_it_acts_on_the_weights_as_they_are_held(tiny_folder, shape, kind, quantize, precision):
    def quantised(how=quantize):
        return load_base(BaseSection(path=str(tiny_folder(shape)), precision=precision, quantize=how), "cpu")

    base, expected = quantised(), quantised("none")
    with torch.no_grad():
        for path in places(base):  # the plain base gets the weights that the quantised one has
            if path.startswith("unet."):
                expected.unet.get_submodule(path[5:]).weight.copy_(base_weight(base, path))
    digest, bare = base.weights_sha256(), outputs(base)
    adapter = make_file(base, kind)
    add_adapter(base, "one", adapter)
    set_adapter_weights(base, {"one": 0.5})
    for path in places(base)[:5]:
        component, inside = path.split(".", 1)
        if component != "unet":
            continue
        layer, plain = base.unet.get_submodule(inside), expected.unet.get_submodule(inside)
        size = (2, 5, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 8, 8)
        inputs = torch.randn(size, generator=torch.Generator().manual_seed(2)).to(base.dtype)
        update = 0.5 * adapter.layers[path].update_of(base_weight(base, path)).to(base.dtype)
        with torch.no_grad():
            found = layer(inputs).float()
            added = (
                plain._conv_forward(inputs, update, None) if update.ndim == 4 else nn.functional.linear(inputs, update)
            )
            with adapters_off(base):
                wanted = layer(inputs).float() + added.float()
        exact = quantize == "nf4" and precision == "fp32"  # int8 rounds the inputs too, of which DoRA sees something
        assert (found - wanted).norm() < (1e-5 if exact else 0.03) * wanted.norm()
    assert (outputs(base)[0] - bare[0]).abs().max() > 1e-2
    remove_adapter(base, "one")
    assert_same_bits(outputs(base), bare)
    assert base.weights_sha256() == digest


# --- against peft's own layers -----------------------------------------------------------------------


def from_peft(layer, kind: str):
    """The layer of a file that says what peft's live layer does."""

    def part(name):
        group = getattr(layer, name)
        if "default" not in group:
            return None
        found = group["default"]
        return (found.weight if isinstance(found, nn.Module) else found).detach()

    if kind == "loha":
        factors = [part(f"hada_w{i}_{x}") for i in (1, 2) for x in "ab"]
        return LohaLayer(*factors, float(layer.alpha["default"]), part("hada_t1"), part("hada_t2"))
    if kind == "lokr":
        w1, w2 = part("lokr_w1"), part("lokr_w2")
        # peft scales whole factors too, which no reader of the file does.
        whole = w1 is not None and w2 is not None
        w1 = (part("lokr_w1_a"), part("lokr_w1_b")) if w1 is None else w1 * layer.scaling["default"] if whole else w1
        w2 = (part("lokr_w2_a"), part("lokr_w2_b")) if w2 is None else w2
        return LokrLayer(w1, w2, float(layer.alpha["default"]), part("lokr_t2"))
    lora = LoraLayer(part("lora_A"), part("lora_B"), float(layer.lora_alpha["default"]))
    return DoraLayer(lora, part("lora_magnitude_vector").flatten()) if kind == "dora" else lora


@pytest.mark.parametrize(
    ("shape", "kind"),
    [("sd1", "lora"), ("sd1", "loha"), ("sd1", "lokr"), ("sd1", "dora"), ("sd2", "lora"), ("sdxl", "dora")],
)
def test_the_forward_pass_is_that_of_pefts_own_layers(tiny_base, kind):
    theirs, ours = tiny_base(), tiny_base()
    paths = [place.removeprefix("unet.") for place in places(theirs) if place.startswith("unet.")]
    config = {
        "lora": lambda: LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=paths),
        "dora": lambda: LoraConfig(r=2, lora_alpha=3, use_dora=True, init_lora_weights=False, target_modules=paths),
        "loha": lambda: LoHaConfig(r=2, alpha=3, init_weights=False, use_effective_conv2d=True, target_modules=paths),
        "lokr": lambda: LoKrConfig(r=2, alpha=3, init_weights=False, use_effective_conv2d=True, target_modules=paths),
    }[kind]()
    torch.manual_seed(0)
    inject_adapter_in_model(config, theirs.unet)
    layers = {}
    with torch.no_grad():
        for path in paths:
            layer = theirs.unet.get_submodule(path)
            if kind == "dora":
                layer.lora_magnitude_vector["default"].weight.mul_(1.3)
            layers[f"unet.{path}"] = from_peft(layer, kind)
    add_adapter(ours, "one", AdapterFile(layers, ""))
    set_adapter_weights(ours, {"one": 1.0})
    assert_close(outputs(ours), outputs(theirs))
    assert (outputs(ours)[0] - outputs(tiny_base())[0]).abs().max() > 1e-2


# --- the layers themselves ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["sd1"])
@pytest.mark.parametrize("kind", ["lora", "tucker", "loha", "lokr", "dense", "dora"])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": 2},
        {"groups": 2},
        {"bias": False},
        {"padding": 1, "padding_mode": "circular"},
    ],
)
def test_a_convolutions_geometry_is_kept(tiny_base, shape, kind, options):
    base = tiny_base()
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3, **options)
    base.text_encoders["text_encoder"].extra = layer  # any layer of the base will do
    adapter = random_layer(kind, tuple(layer.weight.shape))
    picture = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = layer(picture)
        expected = before + 0.7 * layer._conv_forward(picture, adapter.update_of(layer.weight), None)
        attach(layer, "one", branch_of(layer, adapter, base))
        assert torch.equal(layer(picture), before)
        set_strengths(base, {"one": 0.7})
        torch.testing.assert_close(layer(picture), expected, atol=1e-5, rtol=1e-4)
        detach(base, "one")
        assert torch.equal(layer(picture), before) and not layer._forward_hooks


@pytest.mark.parametrize("shape", ["sd1"])
def test_gradients_reach_a_dense_branch_that_is_trained(tiny_base, shape):
    base = tiny_base()
    layer = base.unet.conv_in
    delta = nn.Parameter(torch.zeros_like(layer.weight))
    attach(layer, "trained", DenseBranch(layer, delta))
    set_strengths(base, {"trained": 1.0})
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    layer(latents).square().sum().backward()
    output = layer(latents).detach()
    patches = nn.functional.unfold(latents, 3, padding=1)
    by_hand = torch.einsum("bop,bip->oi", 2 * output.flatten(2), patches).reshape(delta.shape)
    torch.testing.assert_close(delta.grad, by_hand, atol=1e-3, rtol=1e-4)
    assert layer.weight.grad is None and has_float32_adapter(base)

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.inject import (
    adapters_off,
    add_adapter,
    has_float32_adapter,
    remove_adapter,
    set_adapter_weights,
)
from sdlora.adapters.layers import DoraLayer, LoraLayer
from sdlora.adapters.live import base_weight
from sdlora.adapters.trainable import new_adapter
from sdlora.adapters.write import write_adapter
from sdlora.config import AdapterSection
from sdlora.errors import ModelError
from sdlora.families.base import Conditioning, PictureSize
from sdlora.families.words import start_vectors
from sdlora.headers import read_header

RANK4 = AdapterSection(rank=4, alpha=2.0, targets=("transformer",), text_encoder=True)


def unet_output(base) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 77, base.unet.config.cross_attention_dim, generator=generator)
    pooled = torch.randn(2, 32, generator=generator)
    sizes = [PictureSize((64, 64), (0, 0), (64, 64))] * 2
    with torch.no_grad():
        return base.family.predict(base, latents, torch.tensor([10, 700]), Conditioning(states, pooled), sizes)


def text_output(base) -> torch.Tensor:
    with torch.no_grad():
        return base.family.encode_prompts(base, ["a red ball", ""]).states


def outputs(base) -> tuple[torch.Tensor, torch.Tensor]:
    return unet_output(base), text_output(base)


def assert_same_bits(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def assert_close(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def assert_different(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() > 1e-2


def add_to_weights(base, adapter: AdapterFile, weight: float = 1.0) -> None:
    """What an adapter means: weight times delta-W is added to each base weight."""
    for path, layer in adapter.layers.items():
        component, inside = path.split(".", 1)
        module = dict(base.components())[component]
        flat = inside.removeprefix("text_model.")
        live = module.get_submodule(inside if component == "unet" or hasattr(module, "text_model") else flat)
        with torch.no_grad():
            live.weight += weight * layer.delta_weight()


# --- a file's adapter --------------------------------------------------------------------------------


def test_an_adapter_acts_as_its_delta_added_to_the_weights(tiny_base, make_adapter):
    base, dense = tiny_base(), tiny_base()
    adapter = make_adapter(base)
    bare = outputs(base)
    add_adapter(base, "one", adapter)
    assert_same_bits(outputs(base), bare)  # in place, not yet active
    for weight in (1.0, 0.5, -0.75):
        set_adapter_weights(base, {"one": weight})
        expected = tiny_base()
        add_to_weights(expected, adapter, weight)
        assert_close(outputs(base), outputs(expected))
    assert_different(outputs(base), bare)
    assert base.weights_sha256() == dense.weights_sha256()


def test_weight_zero_and_not_named_are_bit_identical_to_the_base(tiny_base, make_adapter):
    base = tiny_base()
    bare = outputs(base)
    add_adapter(base, "one", make_adapter(base))
    set_adapter_weights(base, {"one": 1.0})
    assert_different(outputs(base), bare)
    set_adapter_weights(base, {"one": 0.0})
    assert_same_bits(outputs(base), bare)
    set_adapter_weights(base, {})
    assert_same_bits(outputs(base), bare)


def test_two_adapters_act_as_the_sum_of_their_deltas(tiny_base, make_adapter):
    base, expected = tiny_base(), tiny_base()
    one = make_adapter(base, seed=1)
    two = make_adapter(base, patterns=("attn2.to_k", "ff.net.*", "conv_out"), rank=5, alpha=5.0, seed=2)
    add_adapter(base, "one", one)
    add_adapter(base, "two", two)
    set_adapter_weights(base, {"one": 0.8, "two": -0.3})
    add_to_weights(expected, one, 0.8)
    add_to_weights(expected, two, -0.3)
    assert_close(outputs(base), outputs(expected))
    set_adapter_weights(base, {"two": 1.0})
    alone = tiny_base()
    add_to_weights(alone, two)
    assert_close(outputs(base), outputs(alone))


def test_one_that_is_put_in_place_does_not_disturb_another(tiny_base, make_adapter):
    base = tiny_base()
    add_adapter(base, "one", make_adapter(base, seed=1))
    set_adapter_weights(base, {"one": 0.8})
    before = outputs(base)
    add_adapter(base, "two", make_adapter(base, seed=2))
    assert_same_bits(outputs(base), before)


def test_layers_may_have_ranks_of_their_own(tiny_base, make_adapter, shape):
    base, expected = tiny_base(), tiny_base()
    paths = list(make_adapter(base).layers)
    layers = {path: make_adapter(base, rank=1 + index % 3, seed=index).layers[path] for index, path in enumerate(paths)}
    adapter = AdapterFile(layers, shape)
    add_adapter(base, "one", adapter)
    set_adapter_weights(base, {"one": 1.0})
    add_to_weights(expected, adapter)
    assert_close(outputs(base), outputs(expected))


@pytest.mark.parametrize("shape", ["sd1", "sd2"])
def test_linear_weights_fit_a_one_by_one_convolution_and_back(tiny_base, make_adapter, shape):
    fold = {"sd1": lambda t: t.flatten(1), "sd2": lambda t: t[..., None, None]}[shape]
    base, expected = tiny_base(), tiny_base()
    adapter = make_adapter(base, patterns=("attentions.*.proj_in",), text_encoder=False)
    add_to_weights(expected, adapter)
    folded = {p: LoraLayer(fold(layer.down), fold(layer.up), layer.alpha) for p, layer in adapter.layers.items()}
    add_adapter(base, "one", replace(adapter, layers=folded))
    set_adapter_weights(base, {"one": 1.0})
    assert_close([unet_output(base)], [unet_output(expected)])


def test_remove_gives_the_very_module_objects_back(tiny_base, make_adapter):
    base = tiny_base()
    before = {name: dict(module.named_modules()) for name, module in base.components()}
    digest, bare = base.weights_sha256(), outputs(base)
    one, two = make_adapter(base, seed=1), make_adapter(base, seed=2, patterns=("attn2.to_k", "conv_in"))
    add_adapter(base, "one", one)
    add_adapter(base, "two", two)
    set_adapter_weights(base, {"one": 1.0, "two": 1.0})
    both = outputs(base)
    remove_adapter(base, "one")
    set_adapter_weights(base, {"two": 1.0})
    assert_different([outputs(base)[0]], [both[0]])
    remove_adapter(base, "two")
    for name, module in base.components():
        after = dict(module.named_modules())
        assert list(after) == list(before[name])
        assert all(after[path] is layer for path, layer in before[name].items())
        assert not hasattr(module, "peft_config")
    assert base.weights_sha256() == digest
    assert_same_bits(outputs(base), bare)


def test_an_adapter_can_be_added_again_after_it_was_removed(tiny_base, make_adapter):
    base = tiny_base()
    adapter = make_adapter(base)
    results = []
    for _ in range(2):
        add_adapter(base, "one", adapter)
        set_adapter_weights(base, {"one": 1.0})
        results.append(outputs(base))
        remove_adapter(base, "one")
    assert_same_bits(*results)


def changed(adapter: AdapterFile, path: str, layer: LoraLayer) -> AdapterFile:
    return replace(adapter, layers={**adapter.layers, path: layer})


def wrong_adapters(base, make_adapter):
    good = make_adapter(base)
    conv = next(path for path in good.layers if path.endswith("conv1"))
    linear = next(path for path in good.layers if path.endswith("to_q"))
    down, up = good.layers[conv].down, good.layers[conv].up
    yield "missing layer", changed(good, "unet.mid_block.attentions.7.proj_in", good.layers[linear])
    yield "missing component", changed(good, "text_encoder_3.encoder.layers.0.mlp.fc1", good.layers[linear])
    yield "wrong width", changed(good, linear, LoraLayer(torch.ones(2, 999), torch.ones(32, 2), 1.0))
    yield "wrong kernel", changed(good, conv, LoraLayer(down[..., :1, :1], up, 1.0))
    yield (
        "kernel on a linear layer",
        changed(good, linear, LoraLayer(good.layers[linear].down[..., None, None].repeat(1, 1, 3, 3), up[:32], 1.0)),
    )
    yield "no layer with a weight", changed(good, "unet.mid_block", good.layers[linear])
    norm = LoraLayer(torch.ones(1, 1), torch.ones(32, 1), 1.0)
    yield "a norm", changed(good, "unet.conv_norm_out", norm)
    vocabulary, width = base.text_encoders["text_encoder"].get_input_embeddings().weight.shape
    table = LoraLayer(torch.ones(2, width), torch.ones(vocabulary, 2), 1.0)
    yield "an embedding", changed(good, "text_encoder.text_model.embeddings.token_embedding", table)
    text = next(path for path in good.layers if path.startswith("text_encoder."))
    yield "named twice", changed(good, text.replace("text_model.", ""), good.layers[text])


def test_an_adapter_of_another_base_is_refused_and_the_base_is_as_before(tiny_base, make_adapter):
    base = tiny_base()
    digest, bare = base.weights_sha256(), outputs(base)
    modules = list(base.unet.modules())
    for reason, adapter in wrong_adapters(base, make_adapter):
        with pytest.raises(ModelError, match="the adapter does not fit the base") as caught:
            add_adapter(base, "wrong", adapter)
        assert "\n" not in str(caught.value), reason
        assert all(a is b for a, b in zip(base.unet.modules(), modules, strict=True)), reason
    assert base.weights_sha256() == digest
    assert_same_bits(outputs(base), bare)


def test_the_refusal_names_the_base_that_the_file_names(tiny_base, make_adapter):
    base = tiny_base()
    adapter = replace(make_adapter(base), metadata={"ss_sd_model_name": "dreamy-v5"})
    with pytest.raises(ModelError, match=r"Stable Diffusion .*layers differ.*the file says dreamy-v5"):
        add_adapter(
            base, "wrong", replace(adapter, layers={**adapter.layers, "unet.x": next(iter(adapter.layers.values()))})
        )


def test_an_adapter_of_another_family_is_refused_naming_both(tiny_base, make_adapter, shape):
    base = tiny_base()
    for other in {"sd1", "sd2", "sdxl"} - {shape}:
        theirs = tiny_base(other)
        with pytest.raises(ModelError) as caught:
            add_adapter(base, "wrong", make_adapter(theirs))
        assert f"the adapter is for {theirs.family.title}" in str(caught.value)
        assert f"is {base.family.title}" in str(caught.value)
    assert not hasattr(base.unet, "peft_config")


def test_an_adapter_of_unknown_family_is_tried_by_its_layers(tiny_base, make_adapter):
    base = tiny_base()
    add_adapter(base, "one", replace(make_adapter(base), family=""))
    set_adapter_weights(base, {"one": 1.0})
    assert_different(outputs(base), outputs(tiny_base()))


def loaded_by_diffusers(base, tiny_folder, weights):
    """The same base with an adapter that diffusers has read from a file or from tensors."""
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder(base.family.name))
    pipeline.load_lora_weights(weights)
    encoders = {name: getattr(pipeline, name) for name in base.text_encoders}
    return replace(base, unet=pipeline.unet, text_encoders=encoders)


def test_diffusers_own_loader_gives_the_same_output(tiny_base, tiny_folder, make_adapter, tmp_path):
    base = tiny_base()
    adapter = make_adapter(base, alpha=0.6)
    path = tmp_path / "a.safetensors"
    write_adapter(adapter, path)
    add_adapter(base, "one", read_adapter(path))
    set_adapter_weights(base, {"one": 1.0})
    theirs = loaded_by_diffusers(base, tiny_folder, str(path))
    for our, their in zip(outputs(base), outputs(theirs), strict=True):
        assert (our - their).abs().max() <= 1e-5
    assert_different(outputs(theirs), outputs(tiny_base()))


def with_magnitudes(base, adapter: AdapterFile) -> AdapterFile:
    """The same directions as DoRA, with each row 1.3 times as long as the base's."""
    return replace(
        adapter,
        layers={
            path: DoraLayer(layer, base_weight(base, path).flatten(1).norm(dim=1) * 1.3)
            for path, layer in adapter.layers.items()
        },
    )


@pytest.mark.parametrize(
    ("shape", "kind"),
    [*(("sd1", kind) for kind in ("lora", "mixed ranks", "dora")), ("sd2", "dora"), ("sdxl", "mixed ranks")],
)
def test_diffusers_reads_what_is_written_for_it_and_gives_the_same_output(
    tiny_base, tiny_folder, make_adapter, tmp_path, kind
):
    base = tiny_base()
    adapter = make_adapter(base, alpha=0.6)
    if kind == "mixed ranks":
        other = make_adapter(base, rank=5, alpha=2.0, seed=1).layers
        adapter = replace(adapter, layers={**adapter.layers, **{path: other[path] for path in list(other)[::3]}})
    elif kind == "dora":
        adapter = with_magnitudes(base, adapter)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_adapter(adapter, path, "diffusers")
    add_adapter(base, "one", adapter)
    set_adapter_weights(base, {"one": 1.0})
    for weights in (str(path), load_file(path)):  # with the header's alphas, and without them
        theirs = loaded_by_diffusers(base, tiny_folder, weights)
        for our, their in zip(outputs(base), outputs(theirs), strict=True):
            assert (our - their).abs().max() <= 1e-5
    assert_different(outputs(theirs), outputs(tiny_base()))


def test_of_a_kohya_file_diffusers_drops_the_magnitudes(tiny_base, tiny_folder, make_adapter, tmp_path):
    """As docs/formats.md says."""
    base = tiny_base()
    plain = make_adapter(base)
    path = tmp_path / "a.safetensors"
    write_adapter(with_magnitudes(base, plain), path)
    theirs = outputs(loaded_by_diffusers(base, tiny_folder, str(path)))
    add_adapter(base, "plain", plain)
    add_adapter(base, "dora", read_adapter(path))
    set_adapter_weights(base, {"plain": 1.0})
    assert_close(outputs(base), theirs)
    set_adapter_weights(base, {"dora": 1.0})
    assert_different(outputs(base), theirs)


# --- beside adapters that are trained, and words -------------------------------------------------------


def test_adapters_off_shows_the_bare_base_and_restores_also_after_an_exception(tiny_base, make_adapter):
    base = tiny_base()
    bare = outputs(base)
    add_adapter(base, "one", make_adapter(base))
    set_adapter_weights(base, {"one": 1.0})
    active = outputs(base)
    with adapters_off(base):
        assert_same_bits(outputs(base), bare)
    assert_same_bits(outputs(base), active)
    with pytest.raises(RuntimeError), adapters_off(base):
        raise RuntimeError
    assert_same_bits(outputs(base), active)
    set_adapter_weights(base, {})
    with adapters_off(base):
        pass
    assert_same_bits(outputs(base), bare)


def test_adapters_off_hides_new_words_too(tiny_base):
    base = tiny_base()
    bare = text_output(base)
    base.words = {"ball": {name: vectors + 1 for name, vectors in start_vectors(base, "red", 2).items()}}
    known = text_output(base)
    with adapters_off(base):
        assert torch.equal(text_output(base), bare)
    assert torch.equal(text_output(base), known) and not torch.equal(known, bare)


def test_a_trained_adapter_written_and_read_again_gives_its_very_output(tiny_base, tmp_path, shape):
    base = tiny_base()
    trained = new_adapter(base, "trained", RANK4, seed=7)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trained.weights:
            weight.parameter.add_(torch.randn(weight.parameter.shape, generator=generator) * 0.2)
            weight.parameter.requires_grad_(False)  # torch may multiply by other kernels where gradients are wanted
    live = outputs(base)
    path = tmp_path / "a.safetensors"
    write_adapter(AdapterFile(trained.layers(), shape), path)
    read = read_adapter(path)
    assert any(p.startswith("text_encoder.text_model.encoder.layers.0.self_attn") for p in read.layers)
    other = tiny_base()
    add_adapter(other, "file", read)
    set_adapter_weights(other, {"file": 1.0})
    assert_same_bits(outputs(other), live)
    assert_different(live, outputs(tiny_base()))


@pytest.mark.parametrize("shape", ["sdxl"])
def test_the_projection_behind_the_second_text_encoder_is_written_as_others_write_it(tiny_base, tmp_path):
    base = tiny_base()
    section = AdapterSection(rank=2, targets=("attn2.to_k",), text_encoder=True, text_encoder_targets=("*",))
    trained = new_adapter(base, "trained", section, seed=0)
    path = tmp_path / "a.safetensors"
    write_adapter(AdapterFile(trained.layers(), "sdxl"), path)
    assert "lora_te2_text_projection.lora_up.weight" in read_header(path).tensors
    read = read_adapter(path)
    assert "text_encoder_2.text_projection" in read.layers
    add_adapter(tiny_base(), "file", read)


def test_a_base_weight_is_seen_without_the_adapter(tiny_base, make_adapter):
    base = tiny_base()
    adapter = make_adapter(base)
    path = next(iter(adapter.layers))
    before = base_weight(base, path).clone()
    assert torch.equal(before, base.unet.get_submodule(path.removeprefix("unet.")).weight)
    add_adapter(base, "one", adapter)
    set_adapter_weights(base, {"one": 1.0})
    assert torch.equal(base_weight(base, path), before)


def test_has_float32_adapter(tiny_base, make_adapter):
    base = tiny_base()
    assert not has_float32_adapter(base)
    base.unet.to(torch.bfloat16)
    base.dtype = torch.bfloat16
    add_adapter(base, "file", make_adapter(base, text_encoder=False))
    assert not has_float32_adapter(base)
    new_adapter(base, "trained", AdapterSection(rank=1, targets=("ff.net.2",)), 0)
    assert has_float32_adapter(base)

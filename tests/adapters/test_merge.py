"""Merging: the weighted sum layer by layer, against deltas added by hand."""

from dataclasses import replace

import pytest
import torch
from adapter_kinds import KINDS, LINEAR, random_layer

from sdlora.adapters.algebra import Truncation
from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.layers import DenseLayer, LoraLayer
from sdlora.adapters.merge import MergePart, MergeSettings, merge
from sdlora.adapters.write import write_adapter
from sdlora.errors import ConfigError, FormatError

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.up_blocks.1.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
SHAPES = {Q: (64, 48), CONV: (32, 40, 3, 3), TEXT: (48, 48)}


def adapter(kind="lora", seed=0, paths=SHAPES, **more):
    layers = {path: random_layer(kind, SHAPES[path], seed + number) for number, path in enumerate(paths)}
    return AdapterFile(layers, "sd1", **more)


def updates(made):
    return {path: layer.delta_weight().flatten(1) for path, layer in made.layers.items()}


def assert_sum(made, *terms):
    for path, found in updates(made).items():
        expected = sum(weight * updates(part)[path] for weight, part in terms if path in part.layers)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_two_adapters_are_added_exactly_with_their_ranks_side_by_side():
    first, second = adapter(seed=1), adapter(seed=5, paths=[Q, CONV])
    merged = merge([MergePart("a", first, 0.8), MergePart("b", second, -0.5)], MergeSettings())
    assert merged.adapter.layers.keys() == SHAPES.keys()
    assert {path: layer.rank for path, layer in merged.adapter.layers.items()} == {Q: 6, CONV: 6, TEXT: 3}
    assert all(isinstance(layer, LoraLayer) for layer in merged.adapter.layers.values())
    assert merged.adapter.layers[CONV].shape == SHAPES[CONV]
    assert_sum(merged.adapter, (0.8, first), (-0.5, second))
    assert merged.error < 1e-6 and merged.worst_error < 1e-6


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("dora")])
def test_every_kind_can_be_a_part(kind):
    paths = list(SHAPES) if kind in LINEAR else [CONV]
    first, second = adapter("lora", 1, paths), adapter(kind, 5, paths)
    merged = merge([MergePart("a", first), MergePart("b", second, 0.5)], MergeSettings())
    assert_sum(merged.adapter, (1.0, first), (0.5, second))
    assert all(layer.shape == SHAPES[path] for path, layer in merged.adapter.layers.items())
    assert merged.error < 1e-5


def test_parts_and_blocks_have_weights_of_their_own():
    first, second = adapter(seed=1), adapter(seed=5)
    weights = {"text_encoder": 0.0, "unet.up_blocks.1": 2.0}
    merged = merge(
        [MergePart("a", first, 0.5, weights), MergePart("b", second, 1.0, {"text_encoder": 0.0})], MergeSettings()
    )
    assert merged.adapter.layers.keys() == {Q, CONV}
    found = updates(merged.adapter)
    torch.testing.assert_close(found[Q], 0.5 * updates(first)[Q] + updates(second)[Q], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found[CONV], 2 * updates(first)[CONV] + updates(second)[CONV], atol=2e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"a has no layer that begins with 'unet\.mid'; see sdlora adapter inspect"):
        merge([MergePart("a", first, 1.0, {"unet.mid": 1.0})], MergeSettings())


@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_cut_off_at_a_rank_the_error_is_what_the_cut_leaves(kind):
    first, second = adapter(kind, 1), adapter("lora", 5)
    merged = merge([MergePart("a", first), MergePart("b", second)], MergeSettings(keep=Truncation(rank=2)))
    assert {layer.rank for layer in merged.adapter.layers.values()} == {2}
    lost = total = 0.0
    for path, found in updates(merged.adapter).items():
        true = (updates(first)[path] + updates(second)[path]).double()
        values = torch.linalg.svdvals(true)
        best = float(values[2:].square().sum())
        assert float((found.double() - true).square().sum()) == pytest.approx(best, rel=2e-2)
        lost, total = lost + best, total + float(values.square().sum())
    assert merged.error == pytest.approx((lost / total) ** 0.5, rel=1e-2)
    assert merged.worst_error >= merged.error


def test_cut_off_at_a_share_of_energy():
    merged = merge(
        [MergePart("a", adapter(seed=1)), MergePart("b", adapter(seed=5))], MergeSettings(keep=Truncation(energy=0.9))
    )
    assert merged.error <= (1 - 0.9) ** 0.5 + 1e-6
    assert all(1 <= layer.rank < 6 for layer in merged.adapter.layers.values())


def test_ties_trims_elects_and_takes_the_mean_of_those_that_agree():
    one = torch.tensor([[5.0, -4.0, 0.1, 3.0], [0.2, 1.0, -6.0, 0.0]])
    two = torch.tensor([[-3.0, -2.0, 0.3, 5.0], [0.1, 0.1, -2.0, 4.0]])
    parts = [MergePart(name, AdapterFile({Q: DenseLayer(delta)}, "sd1")) for name, delta in (("a", one), ("b", two))]
    made = merge(parts, MergeSettings("ties", density=0.5)).adapter.layers[Q]
    # Kept of one: 5 -4 3 -6, of two: -3 5 4 and -2 twice, which tie for the fourth place.
    expected = torch.tensor([[5.0, -3.0, 0.0, 4.0], [0.0, 0.0, -4.0, 4.0]])
    assert isinstance(made, DenseLayer)
    torch.testing.assert_close(made.delta, expected)


def test_dare_drops_a_share_and_scales_the_others_up():
    delta = torch.ones(200, 300)
    part = MergePart("a", AdapterFile({Q: DenseLayer(delta)}, "sd1"))
    made = merge([part], MergeSettings("dare", drop=0.75, seed=3)).adapter.layers[Q].delta
    assert set(made.unique().tolist()) == {0.0, 4.0}
    assert float(made.mean()) == pytest.approx(1.0, abs=0.03)
    again = merge([part], MergeSettings("dare", drop=0.75, seed=3)).adapter.layers[Q].delta
    other = merge([part], MergeSettings("dare", drop=0.75, seed=4)).adapter.layers[Q].delta
    assert torch.equal(made, again) and not torch.equal(made, other)


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(FormatError, match=r"a is for Stable Diffusion 1\.x, b for Stable Diffusion XL; merge adapters"):
        merge([MergePart("a", adapter()), MergePart("b", replace(adapter(), family="sdxl"))], MergeSettings())
    with pytest.raises(FormatError, match="is DoRA, whose update depends on the base; merge it into a base instead"):
        merge([MergePart("a", adapter("dora"))], MergeSettings())
    other = AdapterFile({Q: random_layer("lora", (64, 40))}, "sd1")
    with pytest.raises(FormatError, match=r"for weights of the shapes \(64, 40\) and \(64, 48\)"):
        merge([MergePart("a", adapter()), MergePart("b", other)], MergeSettings())
    words = [{"zorb": {"text_encoder": torch.full((1, 4), value)}} for value in (1.0, 2.0)]
    with pytest.raises(FormatError, match="a and b know the word 'zorb' with different vectors; rename one"):
        merge([MergePart(name, adapter(tokens=own)) for name, own in zip("ab", words, strict=True)], MergeSettings())


def test_words_and_text_come_along(tmp_path):
    tags = ['{"a": {"zorb": 3}}', '{"b": {"blick": 4}}']
    texts = [
        {"ss_base_model_version": "sd_v1", "ss_seed": "1", "modelspec.trigger_phrase": phrase, "ss_tag_frequency": tag}
        for phrase, tag in zip(("zorb", "blick, zorb"), tags, strict=True)
    ]
    words = {"zorb": {"text_encoder": torch.ones(1, 4)}}
    parts = [
        MergePart("one", adapter(seed=1, metadata=texts[0], tokens=words), 0.8),
        MergePart("two", adapter(metadata=texts[1])),
    ]
    merged = merge(parts, MergeSettings()).adapter
    write_adapter(merged, tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors")
    assert read.tokens.keys() == {"zorb"}
    assert read.metadata["modelspec.merged_from"] == "one 0.8, two 1"
    assert read.metadata["modelspec.trigger_phrase"] == "zorb, blick"
    assert read.metadata["ss_tag_frequency"] == '{"a": {"zorb": 3}, "b": {"blick": 4}}'
    assert read.metadata["ss_base_model_version"] == "sd_v1" and "ss_seed" not in read.metadata
    assert (read.metadata["ss_network_dim"], read.metadata["ss_network_alpha"]) == ("6", "6")


def test_halves_are_rounded_once():
    halves = [replace(adapter(seed=seed), layers={Q: random_layer("lora", SHAPES[Q], seed)}) for seed in (1, 2)]
    halves = [
        replace(part, layers={Q: LoraLayer(part.layers[Q].down.half(), part.layers[Q].up.half(), 2.0)})
        for part in halves
    ]
    merged = merge([MergePart("a", halves[0], 0.7), MergePart("b", halves[1], 0.3)], MergeSettings())
    assert merged.adapter.layers[Q].up.dtype == torch.float16
    assert 0 < merged.error < 1e-3

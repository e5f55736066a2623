"""Each row of a batch with adapters of its own, against the same rows made one by one."""

from functools import partial

import pytest
import torch
from adapter_kinds import EVERYWHERE, TUCKER, random_layer
from every_family import one_family

from sdlora.adapters.blocks import parse_block_weights
from sdlora.adapters.file import AdapterFile
from sdlora.adapters.inject import act_in_rows, adapters_off, add_adapter, remove_adapter, set_adapter_weights
from sdlora.adapters.live import base_weight
from sdlora.adapters.side_by_side import Factors, SideBySide
from sdlora.config import BaseSection
from sdlora.families.base import Conditioning, PictureSize
from sdlora.families.registry import load_base

PLACES = (
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "mid_block.resnets.0.time_emb_proj",
    "up_blocks.0.resnets.0.conv1",
    "conv_in",
)


def make_file(base, kind: str, seed: int) -> AdapterFile:
    layers = {}
    for number, place in enumerate(PLACES):
        shape = tuple(base_weight(base, f"unet.{place}").shape)
        if kind not in TUCKER or shape[2:]:
            layers[f"unet.{place}"] = random_layer(kind, shape, 100 * seed + number)
    return AdapterFile(layers, base.family.name)


def predict(base, rows: slice) -> torch.Tensor:
    """What the UNet says of those of five rows."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(5, 4, 8, 8, generator=generator)[rows]
    states = torch.randn(5, 77, base.unet.config.cross_attention_dim, generator=generator)[rows]
    conditioning = Conditioning(states, torch.randn(5, 32, generator=generator)[rows])
    sizes = [PictureSize((64, 64), (0, 0), (64, 64))] * len(latents)
    with torch.no_grad():
        return base.family.predict(base, latents, torch.tensor(500), conditioning, sizes)


def same_everywhere(weight: float, block: str) -> float:
    return weight


def act(base, *rows: dict[str, float]) -> None:
    act_in_rows(base, [{name: partial(same_everywhere, weight) for name, weight in row.items()} for row in rows])


@pytest.mark.parametrize(("shape", "kind"), EVERYWHERE)
def test_each_row_equals_the_row_alone(tiny_base, shape, kind):
    base = tiny_base(shape)
    for seed, name in enumerate("ab"):
        add_adapter(base, name, make_file(base, kind, seed))
    mixes = [{"a": 1.0}, {"a": 0.5, "b": -0.7}, {}, {"b": 1.0}, {"b": 1.0}]
    alone = []
    for number, mix in enumerate(mixes):
        set_adapter_weights(base, mix)
        alone.append(predict(base, slice(number, number + 1)))
    act(base, *mixes)
    together = predict(base, slice(5))
    scale = max(1.0, float(torch.cat(alone).abs().max()))
    assert (together - torch.cat(alone)).abs().max() < 1e-5 * scale
    # and the adapters do something there that the bare base does not
    set_adapter_weights(base, {})
    changed = (together - predict(base, slice(5))).abs().amax((1, 2, 3)) > 1e-3
    assert changed.tolist() == [True, True, False, True, True]


def test_several_kinds_act_in_one_layer_and_one_may_go(tiny_base, shape):
    base = tiny_base(shape)
    kinds = {"a": "lora", "b": "lora", "c": "loha", "d": "dora"}
    for seed, (name, kind) in enumerate(kinds.items()):
        add_adapter(base, name, make_file(base, kind, seed))
    mixes = [{"a": 1.0, "c": 0.5}, {"b": 0.5}, {"a": -0.5, "b": 0.7, "d": 1.0}, {"d": 1.0}, {"a": 0.3, "b": 0.3}]

    def alone(mixes):
        for number, mix in enumerate(mixes):
            set_adapter_weights(base, mix)
            yield predict(base, slice(number, number + 1))

    expected = torch.cat(list(alone(mixes)))
    act(base, *mixes)
    assert (predict(base, slice(5)) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    remove_adapter(base, "b")
    found = predict(base, slice(5))
    expected = torch.cat(list(alone([{name: mix[name] for name in mix if name != "b"} for mix in mixes])))
    assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


@one_family
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "loha", "dora"])
def test_rows_of_a_quantised_base_equal_the_rows_alone(tiny_folder, shape, kind, quantize):
    base = load_base(BaseSection(path=str(tiny_folder(shape)), precision="fp32", quantize=quantize), "cpu")
    for seed, name in enumerate("ab"):
        add_adapter(base, name, make_file(base, kind, seed))
    mixes = [{"a": 1.0}, {"a": 0.5, "b": -0.7}, {}, {"b": 1.0}, {"b": 1.0}]
    act(base, *mixes)
    together = predict(base, slice(5))
    for number, mix in enumerate(mixes):
        set_adapter_weights(base, mix)
        torch.testing.assert_close(together[number : number + 1], predict(base, slice(number, number + 1)))


def test_rows_end_with_the_next_weights_and_are_off_where_adapters_are(tiny_base):
    base = tiny_base()
    for seed, name in enumerate("ab"):
        add_adapter(base, name, make_file(base, "lora", seed))
    bare = predict(base, slice(2))
    act(base, {"a": 1.0}, {"b": 1.0})
    mixed = predict(base, slice(2))
    with adapters_off(base):
        assert torch.equal(predict(base, slice(2)), bare)
    assert torch.equal(predict(base, slice(2)), mixed)
    remove_adapter(base, "b")
    assert torch.equal(predict(base, slice(2))[1], bare[1])
    set_adapter_weights(base, {})
    assert torch.equal(predict(base, slice(2)), bare)


def test_a_weight_by_block_equals_an_adapter_without_the_layers_of_the_others(tiny_base, shape):
    base = tiny_base(shape)
    whole = make_file(base, "lora", 0)
    mid = AdapterFile({path: layer for path, layer in whole.layers.items() if "mid_block" in path}, whole.family)
    add_adapter(base, "whole", whole)
    add_adapter(base, "mid", mid)
    act_in_rows(base, [{"whole": parse_block_weights("IN=0, MID=1, OUT=0").of}])
    by_block = predict(base, slice(1))
    act(base, {"mid": 1.0})
    assert torch.equal(by_block, predict(base, slice(1)))


@pytest.mark.parametrize(
    "strengths",
    [
        ((1.0, 1.0, 0.0, 0.0), (0.0, 0.0, -0.5, -0.5)),  # two parts of two rows
        ((1.0, 0.0, 0.0, 0.5), (0.0, 2.0, 2.0, 0.5)),  # parts of one and of two
        ((1.0, 0.3, 0.0, 0.0), (0.0, 0.7, 0.0, 1.0)),  # both in one row, none in another
    ],
)
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 2, 3, 6)], ids=str)
def test_side_by_side_is_the_sum_of_the_products(strengths, shape):
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    loras = [Factors(draw(rank, 6), draw(5, rank), scale) for rank, scale in ((2, 0.5), (3, 1.5))]
    inputs = draw(*shape)
    output = draw(*shape[:-1], 5)
    result = SideBySide(list(zip(loras, strengths, strict=True))).add_to(output, inputs)
    for row in range(4):
        update = sum(
            column[row] * lora.scale * lora.up @ lora.down for lora, column in zip(loras, strengths, strict=True)
        )
        torch.testing.assert_close(result[row], output[row] + inputs[row] @ update.T)


def test_strengths_are_not_rounded_to_the_weights_type():
    lora = Factors(torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16), 1.0)
    beside = SideBySide([(lora, (0.35, 0.0)), (lora, (0.0, 0.35))])
    result = beside.add_to(torch.zeros(2, 1, 1), torch.full((2, 1, 1), 13.0, dtype=torch.bfloat16))
    # 0.35 * 13 = 4.55, which bfloat16 has as 4.5625; with 0.35 as bfloat16 has it, it would be 4.53125.
    assert result.flatten().tolist() == [4.5625] * 2


def test_a_result_of_another_type_than_the_weights_keeps_its_own():
    lora = Factors(torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16), 1.0)
    output = torch.full((2, 1, 1), 1 + 2**-12)  # which bfloat16 rounds to 1
    result = SideBySide([(lora, (1.0, 0.0)), (lora, (0.0, 2.0))]).add_to(output, torch.ones(2, 1, 1))
    assert result.flatten().tolist() == [2 + 2**-12, 3 + 2**-12]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_rows_are_what_each_adapter_gives_alone(dtype):
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    loras = [Factors(draw(4, 32).to(dtype), draw(24, 4).to(dtype), 0.3) for _ in range(3)]
    inputs, output = draw(3, 50, 32).to(dtype), draw(3, 50, 24).to(dtype)
    columns = [tuple(0.7 * (row == number) for row in range(3)) for number in range(3)]
    result = SideBySide(list(zip(loras, columns, strict=True))).add_to(output, inputs)
    for row, lora in enumerate(loras):
        alone = output[row] + ((inputs[row] @ lora.down.T) * (0.7 * lora.scale)) @ lora.up.T
        assert (result[row] != alone).float().mean() < 0.002  # products may be summed in another order


def test_rows_that_would_copy_an_adapter_often_are_not_laid_out():
    lora = Factors(torch.ones(4, 6), torch.ones(5, 4), 1.0)

    def small(*columns):
        return SideBySide([(lora, column) for column in columns]).is_small

    assert small((1, 1, 0, 0), (0, 0, 1, 1))
    assert small((1, 1, 1, 1, 1, 1, 0, 0), (0, 0, 0, 0, 0, 0, 1, 1))
    assert not small((1,) * 14 + (0, 0), (0,) * 14 + (1, 1))

from itertools import product

import pytest
import torch
from adapter_kinds import ALPHA, KINDS, RANK, random_layer
from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model

from sdlora.adapters.layers import DenseLayer, DoraLayer, LohaLayer, LokrLayer, LoraLayer


def lora_layer(*kernel: int, rank: int = 3, alpha: float = 1.5) -> LoraLayer:
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(rank, 7, *kernel, generator=generator)
    up = torch.randn(5, rank, *(1 for _ in kernel), generator=generator)
    return LoraLayer(down, up, alpha)


def test_a_linear_layer_by_hand():
    layer = LoraLayer(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, 1.0]]), alpha=4.0)
    assert layer.rank == 2
    assert layer.scale == 2.0
    assert layer.delta_weight().tolist() == [[6.0, 14.0]]  # 2 * [3 * 1 + 0, 3 * 2 + 1]
    assert layer.delta_norm() == pytest.approx((36 + 196) ** 0.5)


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3), (3, 1)])
def test_delta_weight_is_the_dense_product(kernel):
    layer = lora_layer(*kernel)
    dense = torch.einsum("or,ri...->oi...", layer.up.flatten(1).double(), layer.down.double()) * 0.5
    assert layer.delta_weight().shape == (5, 7, *kernel)
    torch.testing.assert_close(layer.delta_weight().double(), dense, atol=1e-5, rtol=1e-5)
    assert layer.delta_norm() == pytest.approx(dense.norm().item(), rel=1e-9)


def test_delta_weight_of_a_convolution_is_what_two_convolutions_do():
    layer = lora_layer(3, 3)
    picture = torch.randn(2, 7, 6, 6, generator=torch.Generator().manual_seed(2))
    two = torch.conv2d(torch.conv2d(picture, layer.down, padding=1), layer.up) * layer.scale
    torch.testing.assert_close(torch.conv2d(picture, layer.delta_weight(), padding=1), two, atol=1e-4, rtol=1e-4)


def test_half_precision_weights_are_multiplied_in_float32():
    layer = lora_layer()
    half = LoraLayer(layer.down.half(), layer.up.half(), layer.alpha)
    assert half.delta_weight().dtype == torch.float32
    expected = layer.scale * layer.up.half().float() @ layer.down.half().float()
    torch.testing.assert_close(half.delta_weight(), expected)
    assert half.delta_norm() == pytest.approx(expected.norm().item(), rel=1e-5)


def test_zero_and_negative_scale():
    zero = LoraLayer(torch.ones(2, 3), torch.zeros(4, 2), 2.0)
    assert zero.delta_norm() == 0.0
    negative = lora_layer(alpha=-1.5)
    assert negative.delta_norm() == pytest.approx(lora_layer().delta_norm())
    assert torch.equal(negative.delta_weight(), -lora_layer().delta_weight())


# --- other kinds -------------------------------------------------------------------------------------


def by_loops(layer, shape: tuple[int, ...]) -> torch.Tensor:
    """delta-W of LoHa and LoKr by their definition, number by number, in float64."""
    out, inside, *kernel = shape
    delta = torch.zeros(shape, dtype=torch.float64)
    for o, i, *k in product(*(range(size) for size in shape)):
        position = k[0] * kernel[1] + k[1] if kernel else 0
        column = i * (kernel[0] * kernel[1] if kernel else 1) + position
        if isinstance(layer, LohaLayer):
            halves = ((layer.w1_a, layer.w1_b, layer.t1), (layer.w2_a, layer.w2_b, layer.t2))
            first, second = (entry(a, b, core, (o, i, column), k) for a, b, core in halves)
            value = first * second
        else:
            (out_2, in_2) = (out // left_size(layer.w1, 0), inside // left_size(layer.w1, 1))
            left = layer.w1 if torch.is_tensor(layer.w1) else layer.w1[0] @ layer.w1[1]
            value = float(left[o // out_2, i // in_2])
            o2, i2 = o % out_2, i % in_2
            if torch.is_tensor(layer.w2):
                value *= float(layer.w2[(o2, i2, *k)])
            else:
                column = i2 * (kernel[0] * kernel[1] if kernel else 1) + position
                value *= entry(*layer.w2, layer.t2, (o2, i2, column), k)
        delta[(o, i, *k)] = value
    return delta


def left_size(factor, dim: int) -> int:
    return factor.shape[dim] if torch.is_tensor(factor) else factor[dim].shape[dim]


def entry(a, b, core, place, k) -> float:
    o, i, column = place
    a, b = a.double(), b.double()
    if core is None:
        return float(sum(a[o, r] * b[r, column] for r in range(a.shape[1])))
    ranks = range(core.shape[0])
    return float(sum(core[(r, s, *k)].double() * a[r, o] * b[s, i] for r in ranks for s in ranks))


@pytest.mark.parametrize(
    ("kind", "shape", "scale"),
    [
        ("loha", (6, 4), ALPHA / RANK),
        ("loha", (6, 4, 3, 2), ALPHA / RANK),
        ("loha tucker", (6, 4, 3, 2), ALPHA / RANK),
        ("lokr", (6, 4), 1.0),  # nothing is decomposed: readers take scale 1
        ("lokr", (6, 4, 3, 2), 1.0),
        ("lokr pair", (6, 4), ALPHA / RANK),
        ("lokr pair", (6, 4, 3, 2), ALPHA / RANK),
        ("lokr pairs", (6, 4), ALPHA / RANK),
        ("lokr tucker", (6, 4, 3, 2), ALPHA / RANK),
    ],
)
def test_loha_and_lokr_number_by_number(kind, shape, scale):
    layer = random_layer(kind, shape)
    expected = scale * by_loops(layer, shape)
    update = layer.update_of(torch.zeros(shape))
    assert update.dtype == torch.float32
    assert update.shape == shape
    torch.testing.assert_close(update.double(), expected, atol=1e-6, rtol=1e-5)
    assert float(layer.update_of(torch.zeros(shape)).norm()) == pytest.approx(float(expected.norm()), rel=1e-5)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("effective", [False, True])
def test_loha_and_lokr_are_what_peft_makes_of_the_same_factors(kind, convolution, effective):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 12, 3) if convolution else torch.nn.Linear(8, 12))
    options = {"use_effective_conv2d": effective, "init_weights": False, "target_modules": ["0"]}
    config = {"loha": LoHaConfig, "lokr": LoKrConfig}[kind](r=1, alpha=3.0, **options)
    theirs = inject_adapter_in_model(config, model)[0]

    def part(name):
        return getattr(theirs, name)["default"].detach()

    def has(name):
        return "default" in getattr(theirs, name)

    if kind == "loha":
        cores = [part(f"hada_t{i}") if has(f"hada_t{i}") else None for i in (1, 2)]
        layer = LohaLayer(*(part(f"hada_w{i}_{x}") for i in (1, 2) for x in "ab"), 3.0, *cores)
    else:
        factors = [
            part(f"lokr_w{i}") if has(f"lokr_w{i}") else (part(f"lokr_w{i}_a"), part(f"lokr_w{i}_b")) for i in (1, 2)
        ]
        assert isinstance(factors[1], tuple)  # of whole factors peft takes another scale than readers do
        layer = LokrLayer(*factors, 3.0, part("lokr_t2") if has("lokr_t2") else None)
    expected = theirs.get_delta_weight("default").detach()
    torch.testing.assert_close(layer.update_of(theirs.base_layer.weight), expected, atol=1e-6, rtol=1e-5)


def test_a_tucker_core_lies_between_down_and_up():
    shape = (5, 4, 3, 2)
    layer = random_layer("tucker", shape)
    expected = torch.zeros(shape, dtype=torch.float64)
    for o, i, n, m in product(range(5), range(4), range(RANK), range(RANK)):
        expected[o, i] += layer.up[o, n, 0, 0].double() * layer.mid[n, m].double() * layer.down[m, i, 0, 0].double()
    expected *= ALPHA / RANK
    torch.testing.assert_close(layer.delta_weight().double(), expected, atol=1e-6, rtol=1e-5)
    assert layer.delta_norm() == pytest.approx(float(expected.norm()), rel=1e-5)
    picture = torch.randn(1, 4, 7, 7, generator=torch.Generator().manual_seed(1))
    three = torch.conv2d(torch.conv2d(torch.conv2d(picture, layer.down), layer.mid, stride=2), layer.up) * layer.scale
    torch.testing.assert_close(torch.conv2d(picture, layer.delta_weight(), stride=2), three, atol=1e-5, rtol=1e-4)


def test_dora_by_hand():
    weight = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    lora = LoraLayer(torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0], [0.0]]), alpha=1.0)  # adds [[0, 4], [0, 0]]
    rows = DoraLayer(lora, torch.tensor([10.0, 1.0]))
    # Rows of W + delta-W are [3, 4] and [0, 2], of lengths 5 and 2.
    assert (weight + rows.update_of(weight)).tolist() == [[6.0, 8.0], [0.0, 1.0]]
    assert rows.gain(weight).tolist() == [[2.0], [0.5]]
    assert float(rows.update_of(weight).norm()) == pytest.approx((3**2 + 8**2 + 1) ** 0.5)
    columns = DoraLayer(lora, torch.tensor([[6.0, 20.0**0.5]]))
    # Its columns are [3, 0] and [4, 2], of lengths 3 and sqrt(20).
    torch.testing.assert_close(weight + columns.update_of(weight), torch.tensor([[6.0, 4.0], [0.0, 2.0]]))
    assert columns.by_column and not rows.by_column


@pytest.mark.parametrize("kind", ["dora", "dora by column", "dora of loha"])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 2)])
def test_dora_gives_each_row_or_column_its_magnitude_and_keeps_the_direction(kind, shape):
    layer = random_layer(kind, shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    merged = (weight + layer.update_of(weight)).double()
    changed = weight.double() + layer.lora.delta_weight().reshape(shape).double()
    dim = 1 if kind == "dora by column" else 0
    for index in range(shape[dim]):
        got, before = merged.select(dim, index).flatten(), changed.select(dim, index).flatten()
        assert float(got.norm()) == pytest.approx(float(layer.magnitude.flatten()[index]), rel=1e-5)
        torch.testing.assert_close(got / got.norm(), before / before.norm(), atol=1e-6, rtol=1e-5)


def test_dora_with_the_weights_own_lengths_and_no_update_changes_nothing():
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    still = LoraLayer(torch.ones(2, 4), torch.zeros(6, 2), 1.0)
    assert DoraLayer(still, weight.norm(dim=1)).update_of(weight).abs().max() < 1e-6


def test_a_row_of_zeros_stays_zero_under_dora():
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    still = LoraLayer(torch.ones(1, 2), torch.zeros(2, 1), 1.0)
    assert DoraLayer(still, torch.tensor([7.0, 10.0])).update_of(weight).tolist() == [[0.0, 0.0], [3.0, 4.0]]


def test_a_dense_difference_is_what_it_is():
    delta = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    layer = DenseLayer(delta.half())
    assert torch.equal(layer.update_of(torch.zeros(6, 4, 3, 3)), delta.half().float())
    assert float(layer.update_of(delta).norm()) == pytest.approx(float(delta.norm()), rel=1e-3)
    assert (layer.rank, DenseLayer(delta[:, :, 0, 0]).rank) == (6, 4)


@pytest.mark.parametrize(
    ("kind", "ranks", "shape"),
    [
        ("lora", RANK, (8, 6, 3, 3)),
        ("tucker", RANK, (8, 6, 3, 3)),
        ("loha", RANK, (8, 54)),
        ("loha tucker", RANK, (8, 6, 3, 3)),
        ("lokr", 2, (8, 6, 3, 3)),
        ("lokr pair", RANK, (8, 54)),
        ("lokr tucker", RANK, (8, 6, 3, 3)),
        ("dense", 8, (8, 6, 3, 3)),
        ("dora", RANK, (8, 6, 3, 3)),
        ("dora of loha", RANK, (8, 54)),
    ],
)
def test_rank_shape_and_tensors_of_a_convolutions_layer(kind, ranks, shape):
    layer = random_layer(kind, (8, 6, 3, 3))
    assert (layer.rank, layer.shape) == (ranks, shape)
    assert all(torch.is_tensor(tensor) for tensor in layer.tensors())


def test_tensors_are_all_of_them():
    counts = {kind: len(random_layer(kind, (8, 6, 3, 3)).tensors()) for kind in KINDS}
    assert counts == {
        "lora": 2, "tucker": 3, "loha": 4, "loha tucker": 6, "lokr": 2, "lokr pair": 3, "lokr pairs": 4,
        "lokr tucker": 4, "dense": 1, "dora": 3, "dora by column": 3, "dora of loha": 5,
    }  # fmt: skip

import pytest
import torch

from sdlora.adapters.layers import LoraLayer


def random_layer(*kernel: int, rank: int = 3, alpha: float = 1.5) -> LoraLayer:
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
    layer = random_layer(*kernel)
    dense = torch.einsum("or,ri...->oi...", layer.up.flatten(1).double(), layer.down.double()) * 0.5
    assert layer.delta_weight().shape == (5, 7, *kernel)
    torch.testing.assert_close(layer.delta_weight().double(), dense, atol=1e-5, rtol=1e-5)
    assert layer.delta_norm() == pytest.approx(dense.norm().item(), rel=1e-9)


def test_delta_weight_of_a_convolution_is_what_two_convolutions_do():
    layer = random_layer(3, 3)
    picture = torch.randn(2, 7, 6, 6, generator=torch.Generator().manual_seed(2))
    two = torch.conv2d(torch.conv2d(picture, layer.down, padding=1), layer.up) * layer.scale
    torch.testing.assert_close(torch.conv2d(picture, layer.delta_weight(), padding=1), two, atol=1e-4, rtol=1e-4)


def test_half_precision_weights_are_multiplied_in_float32():
    layer = random_layer()
    half = LoraLayer(layer.down.half(), layer.up.half(), layer.alpha)
    assert half.delta_weight().dtype == torch.float32
    expected = layer.scale * layer.up.half().float() @ layer.down.half().float()
    torch.testing.assert_close(half.delta_weight(), expected)
    assert half.delta_norm() == pytest.approx(expected.norm().item(), rel=1e-5)


def test_zero_and_negative_scale():
    zero = LoraLayer(torch.ones(2, 3), torch.zeros(4, 2), 2.0)
    assert zero.delta_norm() == 0.0
    negative = random_layer(alpha=-1.5)
    assert negative.delta_norm() == pytest.approx(random_layer().delta_norm())
    assert torch.equal(negative.delta_weight(), -random_layer().delta_weight())

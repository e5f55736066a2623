"""Products and singular values of updates, checked against whole weights and whole SVDs."""

import math

import pytest
import torch
from adapter_kinds import KINDS, TUCKER, random_layer

from sdlora.adapters.algebra import (
    Truncation,
    product_of,
    spectrum_of,
    spectrum_of_matrix,
    spectrum_of_product,
    sum_of,
    weight_shape,
)

PLAIN = [kind for kind in KINDS if not kind.startswith("dora")]
CONV, LINEAR = (24, 18, 3, 3), (24, 18)


def update(layer):
    return layer.delta_weight().flatten(1)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_a_product_is_the_update(kind, shape):
    if kind in TUCKER and shape == LINEAR:
        pytest.skip("no such layer")
    layer = random_layer(kind, shape)
    product = product_of(layer)
    if product is None:
        assert kind == "dense" or kind in TUCKER or kind.startswith(("loha", "lokr"))
    else:
        torch.testing.assert_close(product.matrix(), update(layer), atol=1e-5, rtol=1e-5)
        assert product.width < 24


def test_wide_factors_are_products_where_they_are_smaller_than_the_weight():
    assert product_of(random_layer("loha", (64, 48))).width == 9
    assert product_of(random_layer("lokr pairs", (64, 48))).width == 9
    assert product_of(random_layer("loha", (8, 8))) is None


def test_sums_are_exact():
    layers = [random_layer(kind, (64, 48), seed) for seed, kind in enumerate(("lora", "loha", "lokr pairs"))]
    total = sum_of([product_of(layer) for layer in layers])
    torch.testing.assert_close(total.matrix(), sum(update(layer) for layer in layers), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PLAIN)
def test_singular_values_are_those_of_the_whole_weight(kind):
    shape = CONV if kind in TUCKER else LINEAR
    layer = random_layer(kind, shape)
    spectrum = spectrum_of(layer, shape, Truncation())
    values = torch.linalg.svdvals(update(layer).double())
    count = min(len(values), len(spectrum.values))
    torch.testing.assert_close(spectrum.values[:count].double(), values[:count], atol=1e-5, rtol=1e-5)
    assert spectrum.total == pytest.approx(float(values.square().sum()), rel=1e-5)
    full = spectrum.layer(count, torch.float32)
    assert full.scale == 1.0 and full.shape == shape
    torch.testing.assert_close(update(full), update(layer), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_cut_off_it_is_the_best_update_of_that_rank(rank):
    layer = random_layer("lora", LINEAR)
    spectrum = spectrum_of(layer, LINEAR, Truncation())
    made = update(spectrum.layer(rank, torch.float32))
    u, values, v = torch.linalg.svd(update(layer).double(), full_matrices=False)
    best = (u[:, :rank] * values[:rank]) @ v[:rank]
    torch.testing.assert_close(made.double(), best, atol=1e-5, rtol=1e-4)
    lost = float((made - update(layer)).norm() / update(layer).norm())
    assert math.sqrt(1 - spectrum.energy(rank)) == pytest.approx(lost, abs=1e-3)


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.74, 2), (0.76, 3), (0.9999, 4), (1.0, 4)])
def test_a_share_of_energy_chooses_the_rank(energy, rank):
    values = torch.diag(torch.tensor([5.0**0.5, 2.5**0.5, 1.5**0.5, 1.0]))  # energies 5, 2.5, 1.5, 1 of 10
    spectrum = spectrum_of_matrix(values, (4, 4), Truncation(energy=energy))
    assert Truncation(energy=energy).rank_of(spectrum) == rank
    assert Truncation(energy=energy, rank=2).rank_of(spectrum) == min(rank, 2)


def decaying(out=200, inside=150, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(out, out, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(inside, inside, generator=generator))
    values = 0.8 ** torch.arange(inside)
    return (u[:, :inside] * values) @ v.T, values


@pytest.mark.parametrize("wanted", [Truncation(rank=8), Truncation(energy=0.999), Truncation(rank=20, energy=0.9)])
def test_randomised_svd_finds_the_same_as_a_whole_one(wanted):
    matrix, values = decaying()
    state = torch.get_rng_state()
    spectrum = spectrum_of_matrix(matrix, (200, 150), wanted)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(spectrum.values) < 150
    rank = wanted.rank_of(spectrum)
    torch.testing.assert_close(spectrum.values[:rank], values[:rank], atol=1e-4, rtol=1e-3)
    exact = float(values[:rank].square().sum() / values.square().sum())
    assert spectrum.energy(rank) == pytest.approx(exact, abs=1e-3)
    assert not wanted.energy < 1 or rank == wanted.rank or spectrum.energy(rank) >= wanted.energy


def test_it_is_deterministic():
    matrix, _ = decaying()
    one, other = (spectrum_of_matrix(matrix, (200, 150), Truncation(rank=8)) for _ in range(2))
    assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right)
    assert (one.left.gather(0, one.left.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_nothing_stays_nothing():
    layer = random_layer("lora", LINEAR)
    zero = type(layer)(layer.down, torch.zeros_like(layer.up), 1.0)
    spectrum = spectrum_of(zero, LINEAR, Truncation(energy=0.9))
    assert spectrum.energy(1) == 1.0
    assert not spectrum.layer(Truncation(energy=0.9).rank_of(spectrum), torch.float32).delta_weight().any()
    assert not spectrum_of_matrix(torch.zeros(60, 60), (60, 60), Truncation(energy=0.9)).values.any()


@pytest.mark.parametrize(
    ("path", "family", "shape", "expected"),
    [
        ("unet.down_blocks.0.resnets.0.conv1", "sd1", (8, 54), (8, 6, 3, 3)),
        ("unet.conv_in", "sdxl", (8, 36), (8, 4, 3, 3)),
        ("unet.down_blocks.0.downsamplers.0.conv", "sd2", (8, 54), (8, 6, 3, 3)),
        ("unet.down_blocks.0.resnets.0.conv_shortcut", "sdxl", (8, 6), (8, 6, 1, 1)),
        ("unet.mid_block.attentions.0.proj_in", "sd1", (8, 6), (8, 6, 1, 1)),
        ("unet.mid_block.attentions.0.proj_in", "sdxl", (8, 6), (8, 6)),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "sd1", (8, 9), (8, 9)),
        ("unet.down_blocks.0.resnets.0.time_emb_proj", "sd1", (8, 9), (8, 9)),
    ],
)
def test_the_shape_of_a_flattened_weight_follows_from_its_path(path, family, shape, expected):
    assert weight_shape(path, family, random_layer("loha", shape)) == expected


def test_two_factors_need_no_whole_weight():
    layer = random_layer("lora", (3000, 2000))
    product = product_of(layer)
    assert spectrum_of_product(product).left.shape == (3000, 3)

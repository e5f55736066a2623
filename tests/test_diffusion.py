import math

import pytest
import torch

from sdlora.diffusion import (
    add_noise,
    debiased_weights,
    draw_timesteps,
    huber_loss,
    latents_from_posterior,
    logit_normal_density,
    min_snr_weights,
    offset_noise,
    opposite_pairs,
    p2_weights,
    pyramid_noise,
    seed_from,
    signal_to_noise,
    snr_huber_c,
    step_generator,
    training_target,
)

ALPHAS = torch.tensor([0.9, 0.64, 0.36, 0.1])


def test_add_noise_against_numbers_worked_out_by_hand():
    latents = torch.tensor([2.0, 2.0]).view(2, 1, 1, 1)
    noise = torch.tensor([-1.0, 0.5]).view(2, 1, 1, 1)
    noisy = add_noise(latents, noise, torch.tensor([1, 2]), ALPHAS)
    # 0.8 * 2 + 0.6 * -1 = 1.0; 0.6 * 2 + 0.8 * 0.5 = 1.6
    torch.testing.assert_close(noisy.flatten(), torch.tensor([1.0, 1.6]))


def test_epsilon_target_is_the_noise_in_float32():
    noise = torch.tensor([-1.0, 0.5], dtype=torch.bfloat16).view(2, 1, 1, 1)
    target = training_target(torch.zeros(2, 1, 1, 1), noise, torch.tensor([0, 3]), ALPHAS, "epsilon")
    assert target.dtype == torch.float32
    assert target.flatten().tolist() == [-1.0, 0.5]


def test_v_target_against_numbers_worked_out_by_hand():
    latents = torch.tensor([2.0, 2.0]).view(2, 1, 1, 1)
    noise = torch.tensor([-1.0, 0.5]).view(2, 1, 1, 1)
    target = training_target(latents, noise, torch.tensor([1, 2]), ALPHAS, "v")
    # 0.8 * -1 - 0.6 * 2 = -2.0; 0.6 * 0.5 - 0.8 * 2 = -1.3
    torch.testing.assert_close(target.flatten(), torch.tensor([-2.0, -1.3]))


def test_v_and_the_noisy_latents_give_latents_and_noise_back():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 3, 3, generator=generator, dtype=torch.float64)
    timesteps = torch.arange(4)
    noisy = add_noise(latents, noise, timesteps, ALPHAS)
    target = training_target(latents, noise, timesteps, ALPHAS, "v")
    alpha = ALPHAS.view(-1, 1, 1, 1)
    torch.testing.assert_close(alpha.sqrt() * noisy - (1 - alpha).sqrt() * target, latents, atol=1e-6, rtol=0)
    torch.testing.assert_close((1 - alpha).sqrt() * noisy + alpha.sqrt() * target, noise, atol=1e-6, rtol=0)


def test_signal_to_noise():
    snr = signal_to_noise(torch.tensor([0, 1, 3]), ALPHAS)
    torch.testing.assert_close(snr, torch.tensor([9.0, 1.7777778, 0.1111111]))


def test_min_snr_weights_of_both_targets():
    snr = torch.tensor([10.0, 5.0, 0.25])
    torch.testing.assert_close(min_snr_weights(snr, 5.0, "epsilon"), torch.tensor([0.5, 1.0, 1.0]))
    torch.testing.assert_close(min_snr_weights(snr, 5.0, "v"), torch.tensor([5 / 11, 5 / 6, 0.2]))


def test_min_snr_weights_weigh_both_targets_alike():
    """The error of v is snr + 1 times, that of epsilon snr times the error of the latents."""
    snr = torch.tensor([30.0, 1.0, 0.01], dtype=torch.float64)
    torch.testing.assert_close(min_snr_weights(snr, 5.0, "epsilon") * snr, min_snr_weights(snr, 5.0, "v") * (snr + 1))


def test_min_snr_weights_at_pure_noise():
    snr = torch.tensor([0.0, 0.05])
    assert min_snr_weights(snr, 5.0, "epsilon").tolist() == [1.0, 1.0]
    assert min_snr_weights(snr, 5.0, "v")[0] == 0.0
    torch.testing.assert_close(min_snr_weights(snr, 5.0, "v", floor=0.1), torch.tensor([0.1, 0.1 / 1.05]))


def test_debiased_weights_of_both_targets():
    snr = torch.tensor([4.0, 0.25, 4000.0])
    torch.testing.assert_close(debiased_weights(snr, "epsilon"), torch.tensor([0.5, 2.0, 1000**-0.5]))
    torch.testing.assert_close(debiased_weights(snr, "v"), torch.tensor([2 / 5, 0.5 / 1.25, 1000**0.5 / 1001]))


def test_debiased_weights_weigh_both_targets_alike():
    snr = torch.tensor([900.0, 1.0, 0.01], dtype=torch.float64)
    torch.testing.assert_close(debiased_weights(snr, "epsilon") * snr, debiased_weights(snr, "v") * (snr + 1))


def test_debiased_weights_at_pure_noise():
    snr = torch.zeros(1)
    assert debiased_weights(snr, "epsilon").item() == math.inf
    assert debiased_weights(snr, "v").item() == 0.0
    assert debiased_weights(snr, "v", floor=0.1).item() == pytest.approx(0.1)


def test_p2_weights_of_both_targets():
    snr = torch.tensor([3.0, 0.0])
    torch.testing.assert_close(p2_weights(snr, 1.0, "epsilon"), torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(p2_weights(snr, 0.5, "epsilon"), torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(p2_weights(snr, 2.0, "v"), torch.tensor([0.04, 0.25]))


def test_huber_loss_and_its_slope_against_numbers_worked_out_by_hand():
    difference = torch.tensor([3.0, -3.0, 0.0], requires_grad=True)
    lost = huber_loss(difference, torch.tensor(4.0))
    # 2 * 4 * (sqrt(9 + 16) - 4) = 8; its slope 2 * 4 * 3 / 5 = 4.8
    assert lost.tolist() == [8.0, 8.0, 0.0]
    lost.sum().backward()
    torch.testing.assert_close(difference.grad, torch.tensor([4.8, -4.8, 0.0]))


def test_huber_loss_is_exact_near_zero_and_straight_far_out():
    small, large = torch.tensor(1e-4), torch.tensor(1e4)
    assert huber_loss(small, torch.tensor(1.0)).item() == pytest.approx(
        1e-8, rel=1e-6
    )  # sqrt(1 + 1e-8) is 1 in float32
    assert huber_loss(large, torch.tensor(0.1)).item() == pytest.approx(2 * 0.1 * (1e4 - 0.1), rel=1e-6)


def test_snr_huber_c_falls_from_1_to_c():
    snr = torch.tensor([math.inf, 1.0, 0.25, 0.0])
    # sigma is 0, 1, 2 and infinite; 0.9 / 4 + 0.1 and 0.9 / 9 + 0.1
    torch.testing.assert_close(snr_huber_c(snr, 0.1), torch.tensor([1.0, 0.325, 0.2, 0.1]))


def test_offset_noise_adds_one_number_to_each_channel():
    added = offset_noise(torch.zeros(200, 4, 3, 2), 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(added, added[..., :1, :1].expand_as(added))
    assert added[..., 0, 0].std().item() == pytest.approx(0.5, rel=0.1)
    torch.testing.assert_close(offset_noise(torch.ones(200, 4, 3, 2), 0.5, torch.Generator().manual_seed(0)), added + 1)


def test_pyramid_noise_against_its_levels_added_by_hand():
    """A side of 2 becomes one of 4 by this matrix, pixel centres at a quarter and three quarters."""
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    half, one = (torch.randn((3, 4, side, side), generator=generator) for side in (2, 1))
    enlarge = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]])
    expected = noise + 0.3 * (enlarge @ half @ enlarge.T) + 0.09 * one
    expected /= expected.flatten(1).std(dim=1).view(3, 1, 1, 1)
    torch.testing.assert_close(pyramid_noise(noise, 0.3, torch.Generator().manual_seed(2)), expected)


@pytest.mark.parametrize("shape", [(2, 4, 9, 5), (2, 4, 1, 8), (2, 4, 64, 96)])
def test_pyramid_noise_has_the_variance_of_white_noise_in_every_shape(shape):
    noise = pyramid_noise(torch.randn(shape), 0.9, torch.Generator().manual_seed(0))
    assert noise.shape == shape
    torch.testing.assert_close(noise.flatten(1).std(dim=1), torch.ones(2))


def test_the_schedule_of_stable_diffusion_at_its_ends():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    table = (1 - betas).cumprod(0)
    snr = signal_to_noise(torch.tensor([0, 999]), table)
    assert snr[0].item() == pytest.approx((1 - 0.00085) / 0.00085, rel=1e-4)
    assert snr[1].item() == pytest.approx(0.0046817, rel=1e-3)


def test_seed_from_is_fixed_and_tells_its_parts_apart():
    assert seed_from(0, "order", 3) == 5486038029339273987
    seeds = {seed_from(*parts) for parts in [(1, 2), (12,), (2, 1), ("a", 1), (1, 2, 0), ("order", 1), (1, "order")]}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_step_generator_depends_on_its_arguments_alone():
    def draw(*parts):
        torch.rand(3)  # the global generator must not matter
        return torch.randn(4, generator=step_generator(*parts))

    assert torch.equal(draw(1, 0, 16), draw(1, 0, 16))
    for other in ((2, 0, 16), (1, 1, 16), (1, 0, 17)):
        assert not torch.equal(draw(1, 0, 16), draw(*other))


def test_opposite_pairs_and_the_one_left_over():
    noise = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert opposite_pairs(noise).tolist() == [1, -1, 3, -3, 5]
    assert opposite_pairs(noise[:4]).tolist() == [1, -1, 3, -3]
    assert opposite_pairs(noise[:1]).tolist() == [1]
    assert noise.tolist() == [1, 2, 3, 4, 5]


UNIFORM = torch.ones(1000)


def test_uniform_timesteps_are_these_ones():
    """Recorded when the objective had no settings but min-SNR: runs of then can be repeated."""
    generator = torch.Generator().manual_seed(0)
    assert draw_timesteps(8, UNIFORM, generator).tolist() == [521, 7, 901, 418, 268, 675, 157, 790]
    assert draw_timesteps(3, UNIFORM, generator).tolist() == [807, 429, 329]
    assert draw_timesteps(1, UNIFORM, generator).tolist() == [456]


def test_draw_timesteps_takes_one_from_each_part_of_the_schedule():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        drawn = draw_timesteps(8, UNIFORM, generator)
        assert drawn.dtype == torch.int64
        assert sorted((drawn // 125).tolist()) == list(range(8))


def test_draw_timesteps_is_uniform_over_the_schedule_in_every_place_of_the_batch():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_timesteps(3, torch.ones(50), generator) for _ in range(4000)])
    assert drawn.min() == 0
    assert drawn.max() == 49
    for place in range(3):
        counts = torch.bincount(drawn[:, place], minlength=50).double()
        chi_squared = ((counts - 80) ** 2 / 80).sum().item()
        assert chi_squared < 100  # 49 degrees of freedom: mean 49, the 99.99 % point is 97


def test_draw_timesteps_follows_the_density_in_every_place_of_the_batch():
    generator = torch.Generator().manual_seed(0)
    density = torch.tensor([0.0, 1.0, 0.0, 4.0, 0.5, 2.5, 0.0])
    drawn = torch.stack([draw_timesteps(3, density, generator) for _ in range(4000)])
    expected = density.double()[[1, 3, 4, 5]] / 8 * 4000
    for place in range(3):
        counts = torch.bincount(drawn[:, place], minlength=7).double()
        assert counts[[0, 2, 6]].sum() == 0
        chi_squared = ((counts[[1, 3, 4, 5]] - expected) ** 2 / expected).sum().item()
        assert chi_squared < 21  # 3 degrees of freedom: the 99.99 % point is 21


def test_a_batch_drawn_by_density_is_stratified():
    """Each of 8 equal parts of the density gets one: of 4 parts of weight, timestep 1 always gets exactly 4."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        drawn = draw_timesteps(8, torch.tensor([2.0, 4.0, 2.0]), generator)
        assert torch.bincount(drawn).tolist() == [2, 4, 2]


def test_one_timestep_varies_and_more_than_the_schedule_holds_stay_in_range():
    generator = torch.Generator().manual_seed(0)
    assert len({draw_timesteps(1, UNIFORM, generator).item() for _ in range(100)}) > 80
    drawn = draw_timesteps(64, torch.ones(10), generator)
    counts = torch.bincount(drawn, minlength=10)
    assert counts.min() >= 5 and counts.max() <= 8


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.5, 0.5), (0.7, 2.0)])
def test_logit_normal_density_is_the_area_under_its_formula(mean, std):
    """exp(-(logit(x) - mean)^2 / 2 std^2) / (std sqrt(2 pi) x (1 - x)), summed finely over each tenth."""
    x = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    formula = (-((x.logit() - mean) ** 2) / (2 * std**2)).exp() / (std * math.sqrt(2 * math.pi) * x * (1 - x))
    tenths = formula.view(10, -1).mean(dim=1) / 10
    torch.testing.assert_close(logit_normal_density(10, mean, std), tenths, atol=1e-6, rtol=1e-5)


def test_logit_normal_density_sums_to_1_however_extreme():
    for mean, std in [(0.0, 1.0), (10.0, 0.01), (-10.0, 0.01), (0.0, 10.0)]:
        assert logit_normal_density(1000, mean, std).sum().item() == pytest.approx(1.0)
    assert logit_normal_density(1, 3.0, 1.0).tolist() == [1.0]


def test_latents_from_posterior():
    mean, std, noise = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0]), torch.tensor([2.0, -1.0])
    assert latents_from_posterior(mean, std, noise).tolist() == [2.0, -3.0]
    assert math.isfinite(latents_from_posterior(mean, std, noise).sum())

import math

import pytest
import torch

from sdlora.diffusion import (
    add_noise,
    draw_timesteps,
    latents_from_posterior,
    min_snr_weights,
    seed_from,
    signal_to_noise,
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


def test_draw_timesteps_takes_one_from_each_part_of_the_schedule():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        drawn = draw_timesteps(8, 1000, generator)
        assert drawn.dtype == torch.int64
        assert sorted((drawn // 125).tolist()) == list(range(8))


def test_draw_timesteps_is_uniform_over_the_schedule_in_every_place_of_the_batch():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_timesteps(3, 50, generator) for _ in range(4000)])
    assert drawn.min() == 0
    assert drawn.max() == 49
    for place in range(3):
        counts = torch.bincount(drawn[:, place], minlength=50).double()
        chi_squared = ((counts - 80) ** 2 / 80).sum().item()
        assert chi_squared < 100  # 49 degrees of freedom: mean 49, the 99.99 % point is 97


def test_one_timestep_varies_and_more_than_the_schedule_holds_stay_in_range():
    generator = torch.Generator().manual_seed(0)
    assert len({draw_timesteps(1, 1000, generator).item() for _ in range(100)}) > 80
    drawn = draw_timesteps(64, 10, generator)
    counts = torch.bincount(drawn, minlength=10)
    assert counts.min() >= 5 and counts.max() <= 8


def test_latents_from_posterior():
    mean, std, noise = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0]), torch.tensor([2.0, -1.0])
    assert latents_from_posterior(mean, std, noise).tolist() == [2.0, -3.0]
    assert math.isfinite(latents_from_posterior(mean, std, noise).sum())

"""The pieces of the loop, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sdlora.adapters.inject import adapters_off, new_adapter
from sdlora.config import OptimizerSection, parse_config
from sdlora.data.cache import encode_captions, encode_pictures
from sdlora.data.source import open_dataset
from sdlora.diffusion import add_noise, draw_timesteps, min_snr_weights, signal_to_noise, step_generator
from sdlora.training import optim
from sdlora.training.objective import batch_loss, validation_loss
from sdlora.training.optim import clip_gradients, make_optimizer, rate_factor, set_rate


def test_rate_rises_then_follows_the_schedule() -> None:
    section = OptimizerSection(warmup_steps=3, schedule="linear")
    factors = [rate_factor(section, step, 7) for step in range(7)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25])
    cosine = OptimizerSection(warmup_steps=0, schedule="cosine")
    assert rate_factor(cosine, 5, 10) == pytest.approx(0.5)
    assert rate_factor(cosine, 9, 10) == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))
    assert rate_factor(OptimizerSection(warmup_steps=0, schedule="constant"), 99, 100) == 1.0


def test_each_group_keeps_its_own_full_rate() -> None:
    section = OptimizerSection(kind="adamw", learning_rate=1e-3, text_encoder_learning_rate=1e-4)
    optimizer, note = make_optimizer(section, {"unet": [nn.Parameter(torch.zeros(2))], "text_encoder": [
        nn.Parameter(torch.zeros(2))]})  # fmt: skip
    set_rate(optimizer, 0.5)
    assert note == "" and [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-5]


def test_default_optimizer_keeps_its_state_in_8_bits() -> None:
    parameter = nn.Parameter(torch.ones(64, 128))
    optimizer, note = make_optimizer(OptimizerSection(), {"unet": [parameter]})
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert note == ""
    assert optimizer.state[parameter]["state1"].dtype == torch.uint8


def test_8bit_falls_back_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "why_no_8bit", lambda device: "no library for this device")
    optimizer, note = make_optimizer(OptimizerSection(), {"unet": [nn.Parameter(torch.zeros(2))]})
    assert type(optimizer) is torch.optim.AdamW
    assert "no library for this device" in note and "\n" not in note


def test_clip_returns_the_norm_before_and_zero_means_no_bound() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], 1.0) == pytest.approx(5.0)
    assert parameter.grad.norm() == pytest.approx(1.0, rel=1e-4)
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], 0.0) == pytest.approx(5.0)
    assert parameter.grad.tolist() == [3.0, 4.0]


@pytest.fixture
def prepared(settings: dict[str, Any], tiny_base: Any) -> Any:
    config = parse_config({**settings, "data": {**settings["data"], "buckets": False}})
    base = tiny_base("sd1")
    examples = encode_pictures(base, open_dataset(config.data).samples, 64, buckets=False)
    captions = encode_captions(base, [example.sample.caption for example in examples])
    return config, base, examples[:2], captions


def test_batch_loss_is_the_formula(prepared: Any) -> None:
    """The whole way from the cached posterior to the number, done again by hand from the same draws."""
    config, base, examples, captions = prepared
    with torch.no_grad():
        loss = float(batch_loss(base, examples, captions, config, step_generator(3, 0, 0)))

        generator = step_generator(3, 0, 0)
        posterior_noise = torch.randn((2, 4, 8, 8), generator=generator)
        noise = torch.randn((2, 4, 8, 8), generator=generator)
        timesteps = draw_timesteps(2, 1000, generator)
        expected = 0.0
        for row, example in enumerate(examples):
            latents = example.mean[:1] + example.std[:1] * posterior_noise[row]
            t = timesteps[row : row + 1]
            noisy = add_noise(latents, noise[row : row + 1], t, base.alphas_cumprod)
            states = captions[example.sample.caption].states
            predicted = base.unet(noisy, t, encoder_hidden_states=states).sample
            weight = min_snr_weights(signal_to_noise(t, base.alphas_cumprod), 5.0, "epsilon")
            expected += float(weight * (predicted - noise[row : row + 1]).square().mean()) / 2
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_short_batch_counts_its_examples_not_itself(prepared: Any) -> None:
    config, base, examples, captions = prepared
    with torch.no_grad():
        alone = float(batch_loss(base, examples[:1], captions, config, step_generator(0, 0, 0)))
        one = config.model_copy(update={"training": config.training.model_copy(update={"batch_size": 1})})
        full = float(batch_loss(base, examples[:1], captions, one, step_generator(0, 0, 0)))
    assert alone == pytest.approx(full / 2, rel=1e-6)


def test_validation_loss_is_the_same_every_time(prepared: Any) -> None:
    _, base, examples, captions = prepared
    losses = {validation_loss(base, examples, captions, 4) for _ in range(3)}
    assert len(losses) == 1


def test_dropped_captions_train_what_no_prompt_gives(prepared: Any) -> None:
    config, base, examples, captions = prepared
    always = config.model_copy(update={"data": config.data.model_copy(update={"caption_dropout": 1.0})})
    empty = dict.fromkeys(captions, captions[None])
    with torch.no_grad():
        dropped = float(batch_loss(base, examples, captions, always, step_generator(0, 0, 0)))
        same = float(batch_loss(base, examples, empty, config, step_generator(0, 0, 0)))
        other = float(batch_loss(base, examples, captions, config, step_generator(0, 0, 0)))
    assert dropped == same != other


def test_prior_samples_are_held_to_what_the_base_predicts(prepared: Any) -> None:
    """Nothing to learn from them while the adapter does nothing; then the formula, the bare output as the target."""
    config, base, examples, captions = prepared
    marked = [replace(example, sample=replace(example.sample, prior=True)) for example in examples]
    parameters = new_adapter(base, "live", config.adapter, seed=1)["unet"]
    assert float(batch_loss(base, marked, captions, config, step_generator(3, 0, 0)).detach()) == 0.0

    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    plain = config.model_copy(update={"training": config.training.model_copy(update={"min_snr_gamma": 0.0})})
    loss = batch_loss(base, marked, captions, plain, step_generator(3, 0, 0))
    loss.backward()
    assert all(parameter.grad is not None for parameter in parameters)
    generator = step_generator(3, 0, 0)
    posterior_noise, noise = (torch.randn((2, 4, 8, 8), generator=generator) for _ in range(2))
    timesteps = draw_timesteps(2, 1000, generator)
    latents = torch.cat([e.mean[:1] + e.std[:1] * n for e, n in zip(examples, posterior_noise, strict=True)])
    noisy = add_noise(latents, noise, timesteps, base.alphas_cumprod)
    states = torch.cat([captions[example.sample.caption].states for example in examples])
    with torch.no_grad():
        adapted = base.unet(noisy, timesteps, encoder_hidden_states=states).sample
        with adapters_off(base):
            bare = base.unet(noisy, timesteps, encoder_hidden_states=states).sample
    assert float(loss.detach()) == pytest.approx(float((adapted - bare).square().mean()), rel=1e-5)

    half = plain.model_copy(update={"training": plain.training.model_copy(update={"prior_weight": 0.5})})
    halved = batch_loss(base, marked, captions, half, step_generator(3, 0, 0))
    assert float(halved.detach()) == pytest.approx(float(loss.detach()) / 2)

"""Whole steps: rates, spans, clipping, averages and resuming, for every kind of optimizer."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from sdlora.adapters.trainable import new_adapter
from sdlora.adapters.weights import TrainedWeight
from sdlora.config import OPTIMIZERS, AdapterSection, OptimizerSection, TokensSection
from sdlora.errors import ConfigError
from sdlora.families.words import clamp_norms
from sdlora.training.optim import MovingAverage, Optimization

NO_TOKENS = TokensSection()
CLASSES = ("torch.optim.NAdam", "schedulefree.RAdamScheduleFree", "prodigyopt.Prodigy")


def make_weights() -> list[TrainedWeight]:
    """Trained weights of every part, large enough that 8-bit optimizers use 8 bits; up is zero as in LoRA."""
    generator = torch.Generator().manual_seed(0)

    def weight(path: str, role: str, *size: int, scale: float = 0.1) -> TrainedWeight:
        return TrainedWeight(path, role, nn.Parameter(torch.randn(*size, generator=generator) * scale))

    return [
        weight("unet.mid.to_q", "down", 32, 160),
        weight("unet.mid.to_q", "up", 160, 32, scale=0.0),
        weight("text_encoder.text_model.q_proj", "down", 4, 16),
        weight("tokens.text_encoder.zorb", "vectors", 2, 32),
    ]


def make(weights, steps=12, tokens=NO_TOKENS, ema=0.0, **section) -> Optimization:
    return Optimization(OptimizerSection(**{"warmup_steps": 2, **section}), tokens, ema, weights, steps)


def off() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


def backward(weights, step: int) -> None:
    """Gradients that depend on the weights as they are and on the step."""
    loss = sum(
        ((weight.parameter - math.sin(number + step)) ** 2 * (number + 1)).mean()
        for number, weight in enumerate(weights)
        if weight.parameter.requires_grad
    )
    loss.backward()


def train(optimization: Optimization, weights, first: int, last: int, look=()) -> list[float]:
    """Take the steps and return the gradient norms; in the steps `look` the averaged weights are looked at."""
    norms = []
    for step in range(first, last):
        optimization.begin(step)
        if step in look:
            with optimization.averaged():
                pass
        backward(weights, step)
        norms.append(optimization.clip(off()))
        optimization.apply(off())
        optimization.end(off())
    return norms


def values(weights) -> list[torch.Tensor]:
    return [weight.parameter.detach().clone() for weight in weights]


def equal(left, right) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("kind", ["adamw8bit", "adamw"])
def test_default_training_is_the_plain_loop_to_the_bit(kind):
    import bitsandbytes

    weights, plain = make_weights()[:3], make_weights()[:3]
    section = OptimizerSection(kind=kind)
    norms = train(Optimization(section, NO_TOKENS, 0.0, weights, 30), weights, 0, 30)

    parameters = [weight.parameter for weight in plain]
    groups = [
        {"params": parameters[:2], "lr": 2e-4, "base_lr": 2e-4},
        {"params": parameters[2:], "lr": 5e-5, "base_lr": 5e-5},
    ]
    maker = bitsandbytes.optim.AdamW8bit if kind == "adamw8bit" else torch.optim.AdamW
    optimizer = maker(groups, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    expected = []
    for step in range(30):
        factor = (step + 1) / 11 if step < 10 else 0.5 * (1 + math.cos(math.pi * ((step - 10) / 20)))
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        backward(plain, step)
        expected.append(float(nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert norms == expected and equal(values(weights), values(plain))
    assert not equal(values(weights), values(make_weights()[:3]))


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("kind", [*OPTIMIZERS, *CLASSES])
def test_resuming_gives_the_uninterrupted_run_to_the_bit(kind, ema):
    tokens = TokensSection(train="together", handover=0.5)
    rates = {"learning_rate": 0.01, "text_encoder_learning_rate": 0.02}
    if "prodigy" in kind:
        tokens, rates = tokens.model_copy(update={"learning_rate": 1.0}), dict.fromkeys(rates, 1.0)
    options = {"kind": kind, "tokens": tokens, "ema": ema, **rates}
    whole = make_weights()
    uninterrupted = make(whole, **options)
    train(uninterrupted, whole, 0, 12)

    for stop in (4, 6, 8):  # before, at and after the words' handover
        weights = make_weights()
        first = make(weights, **options)
        train(first, weights, 0, stop, look=(1, 3))
        with first.averaged():
            pass  # the adapter is saved
        saved = io.BytesIO()
        torch.save({"weights": values(weights), "optimizer": first.state_dict()}, saved)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)

        weights = make_weights()
        second = make(weights, **options)
        for weight, value in zip(weights, state["weights"], strict=True):
            weight.parameter.data.copy_(value)
        second.load_state_dict(state["optimizer"])
        with second.averaged():
            pass  # before any step
        train(second, weights, stop, 12, look=(9,))
        assert equal(values(weights), values(whole))
        with second.averaged(), uninterrupted.averaged():
            assert equal(values(weights), values(whole))
    assert all(value.isfinite().all() for value in values(whole))


def test_a_state_of_another_optimizer_is_refused():
    weights = make_weights()
    state = make(weights, kind="adamw").state_dict()
    with pytest.raises(ConfigError, match="holds the state of AdamW, but here Lion is used"):
        make(weights, kind="lion").load_state_dict(state)


def test_the_words_train_first_then_the_adapter_each_with_its_own_course():
    weights = make_weights()
    tokens = TokensSection(train="first", handover=0.5, learning_rate=0.5)
    optimization = make(weights, steps=8, tokens=tokens, kind="adamw", warmup_steps=1, schedule="linear")
    start = values(weights)
    assert [optimization.learning_rate(step) for step in range(8)] == pytest.approx(
        [0.25, 0.5, 0.5 * 2 / 3, 0.5 / 3, 1e-4, 2e-4, 2e-4 * 2 / 3, 2e-4 / 3]
    )
    train(optimization, weights, 0, 4)
    assert equal(values(weights[:3]), start[:3]) and not torch.equal(weights[3].parameter, start[3])
    assert [weight.parameter.requires_grad for weight in weights] == [False, False, False, True]
    handed_over = values(weights)
    optimization.begin(3)
    backward(weights, 3)
    optimization.begin(4)
    assert weights[3].parameter.grad is None
    train(optimization, weights, 4, 8)
    assert torch.equal(weights[3].parameter, handed_over[3])
    assert not any(torch.equal(now, then) for now, then in zip(values(weights[:3]), handed_over[:3], strict=True))


def test_only_words_train_alone():
    weights = make_weights()
    start = values(weights)
    optimization = make(weights, tokens=TokensSection(train="alone"), kind="adamw")
    assert optimization.parameters == [weights[3].parameter]
    train(optimization, weights, 0, 12)
    assert equal(values(weights[:3]), start[:3]) and not torch.equal(weights[3].parameter, start[3])


def test_layers_of_rate_zero_stay_as_they_are_and_are_not_clipped():
    weights = make_weights()[:3]
    start = values(weights)
    optimization = make(weights, kind="adamw", learning_rates={"text_encoder.*": 0.0})
    assert not weights[2].parameter.requires_grad
    train(optimization, weights, 0, 3)
    assert torch.equal(weights[2].parameter, start[2]) and not torch.equal(weights[0].parameter, start[0])


def test_training_nothing_is_refused():
    with pytest.raises(ConfigError, match="from step 0 on nothing is trained"):
        make(make_weights()[:2], learning_rates={"unet.*": 0.0})
    with pytest.raises(ConfigError, match="from step 6 on nothing is trained"):
        tokens = TokensSection(train="first")
        make(make_weights(), tokens=tokens, learning_rates={"unet.*": 0.0, "text_encoder.*": 0.0})


def test_words_magnitudes_and_started_factors_do_not_decay():
    weights = [
        *make_weights()[2:],
        TrainedWeight("unet.mid.to_q", "magnitude", nn.Parameter(torch.ones(4))),
        TrainedWeight("unet.mid.to_v", "down", nn.Parameter(torch.ones(4)), started=True),
    ]
    start = values(weights)
    tokens = TokensSection(train="together", handover=1.0)
    optimization = make(weights, tokens=tokens, kind="adamw", weight_decay=0.5, warmup_steps=0, schedule="constant")
    for weight in weights:
        weight.parameter.grad = torch.zeros_like(weight.parameter)
    optimization.clip(off())
    optimization.apply(off())
    assert equal(values(weights[1:]), start[1:])
    torch.testing.assert_close(weights[0].parameter.detach(), start[0] * (1 - 5e-5 * 0.5))


@pytest.mark.parametrize("shape", ["sd1"])
@pytest.mark.parametrize(("start", "stays"), [("pissa", True), ("olora", True), ("zero", False)])
def test_weight_decay_leaves_a_started_adapter_where_it_changes_nothing(tiny_base, start, stays):
    section = AdapterSection(rank=4, start=start, targets=("attn2.to_k", "resnets.*.conv1"))
    weights = new_adapter(tiny_base(), "it", section, 0).weights
    before = values(weights)
    optimization = make(weights, kind="adamw", weight_decay=0.5)
    for weight in weights:
        weight.parameter.grad = torch.zeros_like(weight.parameter)
    optimization.apply(off())
    assert equal(values(weights), before) is stays


def test_lora_plus_moves_the_up_matrix_by_its_ratio():
    weights = make_weights()[:2]
    start = values(weights)
    optimization = make(weights, kind="adamw", lora_plus_ratio=8, weight_decay=0, warmup_steps=0, schedule="constant")
    for weight in weights:
        weight.parameter.grad = torch.ones_like(weight.parameter)
    optimization.apply(off())
    moved = [float((now - then).abs().mean()) for now, then in zip(values(weights), start, strict=True)]
    assert moved == pytest.approx([2e-4, 16e-4], rel=1e-3)
    assert optimization.learning_rate(0) == 2e-4


def test_clip_returns_the_norm_before_and_zero_means_no_bound():
    weights = [TrainedWeight("unet.a", "down", nn.Parameter(torch.zeros(2)))]
    for bound, after in ((1.0, 1.0), (0.0, 5.0)):
        optimization = make(weights, kind="adamw", clip_norm=bound)
        weights[0].parameter.grad = torch.tensor([3.0, 4.0])
        assert optimization.clip(off()) == pytest.approx(5.0)
        assert float(weights[0].parameter.grad.norm()) == pytest.approx(after, rel=1e-4)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_told(bad):
    weights = make_weights()[:2]
    optimization = make(weights)
    weights[0].parameter.grad = torch.full((32, 160), bad)
    assert not math.isfinite(optimization.clip(off()))


def test_a_loss_scale_changes_nothing():
    scaled, plain = make_weights(), make_weights()
    tokens = TokensSection(train="first", handover=0.5)
    optimization, scaler = make(scaled, tokens=tokens, kind="adamw"), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(12):
        optimization.begin(step)
        backward(scaled, step)
        for weight in scaled:
            if weight.parameter.grad is not None:
                weight.parameter.grad *= scaler.scale(torch.ones(()))
        optimization.clip(scaler)
        optimization.apply(scaler)
        optimization.end(scaler)
    train(make(plain, tokens=tokens, kind="adamw"), plain, 0, 12)
    assert equal(values(scaled), values(plain))


@pytest.mark.parametrize("scale_made", [True, False])
def test_a_step_without_any_gradient_changes_nothing_with_a_loss_scale_too(scale_made):
    """As while words alone train and no caption of the step holds one."""
    weights = make_weights()
    start = values(weights)
    optimization = make(weights, tokens=TokensSection(train="first"), kind="adamw")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    if scale_made:
        scaler.scale(torch.zeros(()))
    optimization.begin(0)
    assert optimization.clip(scaler) == 0.0
    optimization.apply(scaler)
    optimization.end(scaler)
    assert equal(values(weights), start) and scaler.get_scale() == 1024.0
    weights[3].parameter.grad = scaler.scale(torch.ones(2, 32))
    assert optimization.clip(scaler) == pytest.approx(8.0)
    optimization.apply(scaler)
    optimization.end(scaler)
    assert not torch.equal(weights[3].parameter, start[3]) and scaler.get_scale() == 2048.0


def test_gradients_are_averaged_over_processes_and_missing_ones_count_as_zero():
    class Accelerator:
        num_processes = 2

        def reduce(self, flat, reduction):
            assert reduction == "mean"
            return (flat + torch.arange(len(flat))) / 2  # the other process has 0, 1, 2, ...

    weights = [TrainedWeight("unet.a", role, nn.Parameter(torch.zeros(2))) for role in ("down", "up")]
    optimization = make(weights, kind="adamw")
    weights[0].parameter.grad = torch.tensor([8.0, 9.0])
    optimization.average_gradients(Accelerator())
    assert weights[0].parameter.grad.tolist() == [4.0, 5.0] and weights[1].parameter.grad.tolist() == [1.0, 1.5]


def test_the_moving_average_is_the_formula():
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    average = MovingAverage([parameter], 0.3)
    expected = parameter.detach().double()
    for n, decay in enumerate([0.1, 2 / 11, 0.25, 0.3, 0.3]):
        parameter.data += n + 1.0
        average.update([parameter])
        expected = decay * expected + (1 - decay) * parameter.detach().double()
    torch.testing.assert_close(average.values[0].double(), expected, rtol=1e-6, atol=0)


def test_inside_averaged_the_weights_are_the_average_and_afterwards_their_own():
    weights = make_weights()[:2]
    optimization = make(weights, ema=0.5, kind="adamw", learning_rate=0.1)
    expected = values(weights)
    for step in range(4):
        train(optimization, weights, step, step + 1)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, values(weights), strict=True)]
    own = values(weights)
    with pytest.raises(KeyError), optimization.averaged():
        for value, wanted in zip(values(weights), expected, strict=True):
            torch.testing.assert_close(value, wanted)
        assert not equal(values(weights), own)
        raise KeyError
    assert equal(values(weights), own)


def test_limits_act_before_the_average():
    weights = make_weights()[:2]
    optimization = make(weights, ema=0.9, kind="adamw")
    limited = []

    def limit() -> None:
        limited.append(values(weights))
        if len(limited) <= 3:
            for weight in weights:
                weight.parameter.data.zero_()

    optimization.limit = limit
    for step in range(3):
        optimization.begin(step)
        backward(weights, step)
        optimization.apply(off())
    with optimization.averaged():
        decays = 0.1 * 2 / 11 * 0.25
        torch.testing.assert_close(weights[0].parameter.detach(), make_weights()[0].parameter.detach() * decays)
        assert equal(values(weights), limited[3])  # the average too has been before the limit


def test_what_is_shown_of_an_average_is_within_the_limit_and_the_average_as_it_was():
    """The mean of vectors of one length that turn is shorter than they are."""
    weights = make_weights()
    vectors = weights[3].parameter
    tokens = TokensSection(train="first", learning_rate=0.5)
    optimization = make(weights, tokens=tokens, ema=0.99, kind="adamw", steps=20)
    optimization.limit = lambda: clamp_norms(vectors, 3.0, 3.0)
    (average,) = [g.average.values[0] for g in optimization._groups if g.component == "tokens"]
    train(optimization, weights, 0, 10)
    before, own = average.clone(), values(weights)
    assert (before.norm(dim=1) < 2.99).all()
    with optimization.averaged():
        shown = values(weights)[3]
        torch.testing.assert_close(shown, before / before.norm(dim=1, keepdim=True) * 3)
    assert equal(values(weights), own) and torch.equal(average, before)
    optimization.begin(10)  # the words are handed over
    assert torch.equal(vectors, shown)


def test_the_limit_of_schedule_free_words_is_on_their_average_and_on_the_point_that_moves():
    """Against the method's equations in float64, both points projected after a step (Defazio et al. 2024, eq. 3 to 5)."""
    weights = make_weights()[3:]
    vectors, beta, rate = weights[0].parameter, 0.9, 0.3
    tokens = TokensSection(train="alone", learning_rate=rate)
    optimization = make(
        weights, tokens=tokens, kind="schedule-free", schedule="constant", warmup_steps=0, clip_norm=0, steps=25
    )
    optimization.limit = lambda: clamp_norms(vectors, 0.8, 1.2)

    def within(points: torch.Tensor) -> torch.Tensor:
        lengths = points.norm(dim=1, keepdim=True)
        return points * lengths.clamp(0.8, 1.2) / lengths

    z = x = vectors.detach().double().clone()
    squares = torch.zeros_like(z)
    for step in range(25):
        y = (1 - beta) * z + beta * x
        gradient = 2 * (y - math.sin(step)) / y.numel()
        squares = 0.99 * squares + 0.01 * gradient**2
        z = z - rate * gradient / ((squares / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
        x = within(x + (z - x) / (step + 1))
        z = within(z)
        train(optimization, weights, step, step + 1)
        if step % 6 == 0:
            with optimization.averaged():
                torch.testing.assert_close(vectors.detach().double(), x, rtol=1e-3, atol=1e-4)
                lengths = vectors.detach().norm(dim=1)
                assert lengths.min() >= 0.8 - 1e-5 and lengths.max() <= 1.2 + 1e-5


@pytest.mark.parametrize(("kind", "ema"), [("adamw", 0.9), ("schedule-free", 0.0)])
def test_words_are_handed_over_as_they_will_be_saved(kind, ema):
    weights = make_weights()
    optimization = make(weights, tokens=TokensSection(train="first"), kind=kind, ema=ema, schedule="constant")
    train(optimization, weights, 0, 6)
    trained = values(weights)[3]
    with optimization.averaged():
        averaged = values(weights)[3]
    assert not torch.equal(trained, averaged)
    train(optimization, weights, 6, 12)
    assert torch.equal(weights[3].parameter, averaged)
    with optimization.averaged():
        assert torch.equal(weights[3].parameter, averaged)


def test_schedule_free_is_the_librarys():
    from schedulefree import AdamWScheduleFree

    weights, plain = make_weights()[:2], make_weights()[:2]
    options = {"kind": "schedule-free", "schedule": "constant", "warmup_steps": 0, "clip_norm": 0}
    optimization = make(weights, **options)
    train(optimization, weights, 0, 12, look=(5,))
    reference = AdamWScheduleFree([w.parameter for w in plain], lr=2e-4, betas=(0.9, 0.99), weight_decay=0.01)
    reference.train()
    for step in range(12):
        backward(plain, step)
        reference.step()
        reference.zero_grad()
    assert equal(values(weights), values(plain))
    reference.eval()
    with optimization.averaged():
        assert equal(values(weights), values(plain))


def test_prodigy_finds_a_step_size_for_each_part_and_tells_it():
    from prodigyopt import Prodigy

    weights, plain = make_weights()[:3], make_weights()[:3]
    options = {"kind": "prodigy", "learning_rate": 1.0, "text_encoder_learning_rate": 0.5, "clip_norm": 0}
    optimization = make(weights, steps=40, schedule="constant", warmup_steps=0, **options)
    for step in range(40):
        optimization.begin(step)
        backward(weights, 0)  # always the same way, so that there is a distance to find
        optimization.clip(off())
        optimization.apply(off())
        optimization.end(off())
    theirs = {"betas": (0.9, 0.99), "weight_decay": 0.01, "use_bias_correction": True, "safeguard_warmup": True}
    alone = [
        Prodigy([weight.parameter for weight in plain[:2]], lr=1.0, **theirs),
        Prodigy([plain[2].parameter], lr=0.5, **theirs),
    ]
    for _ in range(40):
        backward(plain, 0)
        for optimizer in alone:
            optimizer.step()
            optimizer.zero_grad()
    assert equal(values(weights), values(plain))
    sizes = [optimizer.param_groups[0]["d"] for optimizer in alone]
    assert sizes[0] != sizes[1] and min(sizes) > 5e-6
    assert optimization.learning_rate(39) == sizes[0]


def test_rates_of_another_optimizer_are_refused_by_one_that_finds_its_step_size():
    with pytest.raises(ConfigError, match=r"'prodigyopt.Prodigy' finds the size of its steps itself.* at 0.0002 noth"):
        make(make_weights()[:2], kind="prodigyopt.Prodigy")
    make(make_weights()[:2], kind="prodigyopt.Prodigy", learning_rate=0.5)


def test_notes_are_passed_on(monkeypatch):
    from sdlora.training import optimizers

    monkeypatch.setattr(optimizers, "why_not", lambda kind, device: "no library for this device")
    optimization = make(make_weights())
    assert optimization.notes == (
        "8-bit AdamW is not available here (no library for this device); using AdamW in 32 bits",
    )

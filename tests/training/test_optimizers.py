"""Which optimizer a name stands for, and what is said where it cannot be had."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from sdlora.config import OPTIMIZERS, OptimizerSection
from sdlora.errors import ConfigError
from sdlora.training import optimizers
from sdlora.training.lion import Lion
from sdlora.training.optimizers import check_optimizer, choose_optimizer, step_size, why_no_8bit

CPU = torch.device("cpu")


def made(section: OptimizerSection, size: tuple[int, ...] = (64, 128), rate: float = 1e-3):
    """The optimizer of one parameter, the parameter (zeros), and the notes."""
    parameter = nn.Parameter(torch.zeros(size))
    factory, notes = choose_optimizer(section, CPU)
    return factory([{"params": [parameter], "lr": rate}]), parameter, notes


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("adamw8bit", "AdamW8bit"),
        ("adamw", "AdamW"),
        ("paged-adamw8bit", "PagedAdamW8bit"),
        ("lion", "Lion"),
        ("lion8bit", "Lion8bit"),
        ("adafactor", "Adafactor"),
        ("prodigy", "Prodigy"),
        ("schedule-free", "AdamWScheduleFree"),
        ("torch.optim.RAdam", "RAdam"),
        ("torch.optim.adamw.AdamW", "AdamW"),
    ],
)
def test_every_kind_takes_a_step(kind, name, capsys):
    optimizer, parameter, notes = made(OptimizerSection(kind=kind), rate=1.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert type(optimizer).__name__ == name and notes == ()
    assert parameter.max() < 0
    assert capsys.readouterr().out == ""


def test_every_name_that_can_be_set_is_known():
    for kind in OPTIMIZERS:
        optimizer, parameter, _ = made(OptimizerSection(kind=kind), rate=1.0)
        assert [member for group in optimizer.param_groups for member in group["params"]] == [parameter]


@pytest.mark.parametrize("kind", ["adamw8bit", "paged-adamw8bit", "lion8bit"])
def test_states_are_kept_in_8_bits(kind):
    optimizer, parameter, _ = made(OptimizerSection(kind=kind))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["state1"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("kind", "broken", "instead", "count"),
    [
        ("adamw8bit", {"adamw8bit"}, torch.optim.AdamW, 1),
        ("lion8bit", {"lion8bit"}, Lion, 1),
        ("paged-adamw8bit", {"paged-adamw8bit", "adamw8bit"}, torch.optim.AdamW, 2),
    ],
)
def test_8_bits_fall_back_with_a_line_each(kind, broken, instead, count, monkeypatch):
    monkeypatch.setattr(optimizers, "why_not", lambda kind, device: "no such device" if kind in broken else "")
    optimizer, _, notes = made(OptimizerSection(kind=kind))
    assert type(optimizer) is instead and len(notes) == count
    assert all("not available here (no such device); using" in note and "\n" not in note for note in notes)


def test_without_the_library_there_is_no_8_bit_step(monkeypatch):
    assert why_no_8bit(CPU) == ""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "bitsandbytes" in why_no_8bit(CPU)
    assert type(made(OptimizerSection())[0]) is torch.optim.AdamW


def test_settings_and_arguments_reach_the_optimizer():
    section = OptimizerSection(kind="adamw", betas=(0.8, 0.95), epsilon=1e-7, weight_decay=0.3)
    group = made(section)[0].param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.8, 0.95), 1e-7, 0.3, 1e-3)
    section = section.model_copy(update={"arguments": {"amsgrad": True, "betas": [0.7, 0.9]}})
    group = made(section)[0].param_groups[0]
    assert group["amsgrad"] is True and list(group["betas"]) == [0.7, 0.9]


def test_settings_of_another_meaning_are_left_out():
    group = made(OptimizerSection(kind="torch.optim.RMSprop", weight_decay=0.3))[0].param_groups[0]
    assert group["weight_decay"] == 0.3 and "betas" not in group
    # Adafactor's eps is a pair, which Adam's epsilon is not.
    assert made(OptimizerSection(kind="torch.optim.Adafactor"))[0].param_groups[0]["eps"] == (None, 1e-3)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("adamw", {"amsgraad": True}, r"arguments: 'adamw' has no argument 'amsgraad'; it has betas, eps, .*amsgrad"),
        ("adamw", {"betas": [2.0, 0.9]}, r"'adamw' cannot be made: Invalid beta"),
        ("prodigy", {"d0": "much"}, "'prodigy' cannot be made"),
        ("schedule-free", {"betas": [0.0, 0.9]}, "'schedule-free' cannot train here"),
        ("torch.optim.LBFGS", {}, "LBFGS' cannot train here"),
        ("torch.optim.SparseAdam", {}, "SparseAdam' cannot train here"),
        ("torch.optim.AdamV", {}, "has no optimizer 'AdamV'; did you mean torch.optim.Adam"),
        ("torch.nn.Linear", {}, "module 'torch.nn' has no optimizer 'Linear'; it has no optimizers at all"),
        ("no_such_package.Adam", {}, "module 'no_such_package' cannot be imported .* install its package"),
    ],
)
def test_what_cannot_be_is_one_sentence(kind, arguments, words):
    with pytest.raises(ConfigError, match=words) as caught:
        choose_optimizer(OptimizerSection(kind=kind, arguments=arguments), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("torch.optim.RMSprop", "betas", (0.8, 0.9)),
        ("torch.optim.SGD", "epsilon", 1e-6),
        ("torch.optim.Adafactor", "epsilon", 1e-6),  # its eps is a pair
        ("torch.optim.Rprop", "weight_decay", 0.3),
    ],
)
def test_a_setting_that_means_nothing_to_a_class_is_refused(kind, setting, value):
    assert choose_optimizer(OptimizerSection(kind=kind), CPU)
    with pytest.raises(
        ConfigError, match=rf"^optimizer\.{setting} is .*{kind}' has no such argument; remove it"
    ) as error:
        choose_optimizer(OptimizerSection(kind=kind, **{setting: value}), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["prodigy", "prodigyopt.Prodigy"])
def test_rates_are_checked_before_there_are_weights(kind):
    section = OptimizerSection(kind=kind)
    check_optimizer(section, CPU)
    check_optimizer(section, CPU, [1.0, 0.0, 0.1])
    with pytest.raises(ConfigError, match=r"at 0.05 nothing would be learnt, set the learning rates to about 1"):
        check_optimizer(section, CPU, [1.0, 0.05])
    check_optimizer(OptimizerSection(kind="adamw"), CPU, [1e-6])
    with pytest.raises(ConfigError, match="has no argument 'amsgraad'"):
        check_optimizer(OptimizerSection(kind="adamw", arguments={"amsgraad": True}), CPU)


def test_only_prodigys_kin_tell_a_step_size():
    assert step_size(made(OptimizerSection(kind="prodigy"), rate=1.0)[0]) == 1e-6
    assert step_size(made(OptimizerSection(kind="adamw"))[0]) is None


def test_a_state_that_no_checkpoint_can_hold_is_refused(monkeypatch):
    class Odd(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "odd": object()}

    module = ModuleType("odd_optimizers")
    module.Odd = Odd
    monkeypatch.setitem(sys.modules, "odd_optimizers", module)
    with pytest.raises(ConfigError, match="cannot train here"):
        choose_optimizer(OptimizerSection(kind="odd_optimizers.Odd"), CPU)


def test_adafactors_rate_is_the_size_of_a_step_even_from_zero():
    optimizer, parameter, _ = made(OptimizerSection(kind="adafactor", weight_decay=0.0))
    parameter.grad = torch.full_like(parameter, 7.0)
    optimizer.step()
    assert parameter.detach() == pytest.approx(torch.full((64, 128), -1e-3), rel=1e-5)


def test_lion_is_the_papers():
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(3, 5, generator=generator))
    lion = Lion([parameter], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    expected, momentum = parameter.detach().double(), torch.zeros(3, 5, dtype=torch.float64)
    for _ in range(5):
        gradient = torch.randn(3, 5, generator=generator)
        parameter.grad = gradient.clone()
        lion.step()
        direction = torch.sign(0.9 * momentum + 0.1 * gradient.double())
        expected = expected - 0.01 * (direction + 0.1 * expected)
        momentum = 0.99 * momentum + 0.01 * gradient.double()
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-7)


def test_lion_agrees_with_bitsandbytes():
    import bitsandbytes

    generator = torch.Generator().manual_seed(1)
    ours, theirs = (nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    pair = (Lion([ours], lr=0.01, weight_decay=0.1), bitsandbytes.optim.Lion([theirs], lr=0.01, weight_decay=0.1))
    for _ in range(5):
        gradient = torch.randn(8, 8, generator=generator)
        for parameter, optimizer in zip((ours, theirs), pair, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)

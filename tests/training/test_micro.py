"""Batches in parts, and what happens where memory runs out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdlora.errors import TrainingError
from sdlora.training.micro import MicroBatches


class Numbers:
    """A batch: its loss for a weight w is the sum of (w - number)^2."""

    def __init__(self, values):
        self.values = list(values)

    def __len__(self):
        return len(self.values)

    def parts(self, size):
        for start in range(0, len(self), size):
            yield Numbers(self.values[start : start + size])


class Machine:
    """Computes batches with memory for `room` examples; out of it in the middle of the backward pass."""

    def __init__(self, room: int, size: int = 0):
        self.first, self.second = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))
        self.room, self.tried, self.said = room, [], []
        self.micro = MicroBatches(size, [self.first, self.second], self.said.append)

    def compute(self, part: Numbers) -> float:
        self.tried.append(len(part))
        numbers = torch.tensor(part.values)
        loss = ((self.first - numbers) ** 2).sum()
        loss.backward()
        if len(part) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return float(loss.detach())

    def run(self, *values: float) -> float:
        return self.micro.run(Numbers(values), self.compute)


def test_all_of_a_batch_is_computed_at_once_while_it_fits():
    machine = Machine(room=8)
    assert machine.run(2.0, 3.0, 5.0) == 1 + 4 + 16
    assert machine.tried == [3] and machine.said == [] and machine.micro.size == 0
    assert machine.first.grad == 2 * (-1 - 2 - 4) and machine.second.grad is None


def test_a_given_size_is_kept_to():
    machine = Machine(room=8, size=2)
    assert machine.run(2.0, 3.0, 5.0) == 21
    assert machine.tried == [2, 1] and machine.first.grad == -14 and machine.said == []


def test_out_of_memory_halves_and_gives_the_gradients_of_the_whole():
    machine = Machine(room=1)
    assert machine.run(2.0, 3.0, 5.0, 1.0, 0.0) == 22
    assert machine.tried == [5, 3, 2, 1, 1, 1, 1, 1]
    assert machine.first.grad == -12 and machine.second.grad is None
    assert machine.said == ["out of memory with more: 1 picture is computed at once from now on; batches stay as large"]


def test_the_size_is_remembered_and_said_once():
    machine = Machine(room=2)
    machine.run(2.0, 3.0, 5.0, 1.0)
    machine.tried.clear()
    machine.run(2.0, 3.0, 5.0, 1.0)
    assert machine.tried == [2, 2] and len(machine.said) == 1


def test_gradients_of_earlier_batches_of_the_step_survive():
    machine = Machine(room=4)
    machine.run(2.0, 3.0)
    machine.second.grad = torch.tensor(0.5)
    machine.room = 1
    machine.run(5.0, 1.0, 0.0)
    assert machine.first.grad == -6 - 8 + 0 + 2
    assert machine.second.grad == 0.5


def test_adding_up_gives_the_bits_of_plain_accumulation():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, generator=generator) for _ in range(3)]
    plain, laid_aside = (nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    micro = MicroBatches(0, [laid_aside], lambda line: None)

    def backward(parameter: nn.Parameter, batch: torch.Tensor) -> float:
        (parameter.sin() * batch).sum().backward()
        return 0.0

    for batch in batches:
        backward(plain, batch)
        micro.run(Numbers([0]), lambda part, batch=batch: backward(laid_aside, batch))
    assert torch.equal(plain.grad, laid_aside.grad)


def test_a_single_picture_too_many_ends_the_run_with_advice():
    machine = Machine(room=0)
    with pytest.raises(TrainingError, match=r"single picture.*gradient_checkpointing.*quantize.*resolution"):
        machine.run(2.0, 3.0)
    assert machine.tried == [2, 1]


def test_other_errors_pass():
    machine = Machine(room=1)
    with pytest.raises(ZeroDivisionError):
        machine.micro.run(Numbers([1.0]), lambda part: 1 / 0)

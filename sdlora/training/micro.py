"""`MicroBatches`: a batch computed in as large parts as memory allows.

Its noise, timesteps and captions are drawn before it is divided, so that parts add up to the whole. An adapter's
dropout alone is drawn anew in each part.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, Self, TypeVar

import torch
from torch import nn

from sdlora.errors import TrainingError


class Divisible(Protocol):
    """A batch whose loss is the sum of its parts' losses."""

    def __len__(self) -> int: ...

    def parts(self, size: int) -> Iterator[Self]:
        """Yield parts of at most `size` examples."""
        ...


Batch = TypeVar("Batch", bound=Divisible)


class MicroBatches:
    """How many examples are computed at once: `size` (0: all of a batch), and fewer once memory has run out.

    `parameters` are those that take gradients, `say` tells the user when the size changes.
    """

    def __init__(self, size: int, parameters: Sequence[nn.Parameter], say: Callable[[str], None]) -> None:
        self.size = size
        self._parameters = parameters
        self._say = say

    def run(self, drawn: Batch, compute: Callable[[Batch], float]) -> float:
        """Return the batch's loss, its gradients added to those that were there.

        `compute` runs a part forward and backward and returns its loss. Where memory runs out the batch begins
        again in parts of half the size, which later batches keep. Raises TrainingError where a single example is
        too much.
        """
        earlier = [parameter.grad for parameter in self._parameters]  # laid aside, so that a failed try drops alone
        size = min(self.size or len(drawn), len(drawn))
        while (loss := self._tried(drawn.parts(size), compute)) is None:
            if size == 1:
                raise TrainingError(
                    "out of memory with a single picture at once; set training.gradient_checkpointing = true, "
                    'base.quantize = "nf4" or a smaller data.resolution'
                )
            size = (size + 1) // 2
            # Only now, when the failed try's last reference is gone, does its memory come back.
            gc.collect()
            torch.cuda.empty_cache()
        for parameter, gradient in zip(self._parameters, earlier, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        if size < min(self.size or len(drawn), len(drawn)):
            self.size = size
            pictures = "1 picture is" if size == 1 else f"{size} pictures are"
            self._say(f"out of memory with more: {pictures} computed at once from now on; batches stay as large")
        return loss

    def _tried(self, parts: Iterable[Batch], compute: Callable[[Batch], float]) -> float | None:
        """Return the loss of all parts, only their gradients being there; None, and none, where memory runs out."""
        for parameter in self._parameters:
            parameter.grad = None
        try:
            return sum(compute(part) for part in parts)
        except torch.OutOfMemoryError:
            pass
        for parameter in self._parameters:
            parameter.grad = None
        return None

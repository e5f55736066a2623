"""Where a picture's noise comes from: the CPU's own generator, or numbers as a CUDA device would draw them.

torch draws other numbers on a CUDA device than on the CPU for the same seed. Those of the device are computed here, so
that seeds from programs that draw there mean the same picture. Element i of a tensor is thread i's first number of
cuRAND's normal distribution over Philox4x32-10, and every tensor moves the counter on by one.

That holds for tensors of no more elements than the device runs threads at once: 512 x 512 pixels are 16,384 elements,
1024 x 1024 are 65,536; beyond a device's number, which is its multiprocessors x their threads, it deals the rest out in
another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from sdlora.generation.request import NoiseSource

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class CudaGenerator(torch.Generator):
    """A generator on the CPU from which, inside `drawing_noise`, torch.randn draws what it would draw on CUDA.

    It counts the tensors that were drawn, as the device's generator does.
    """

    def __new__(cls, seed: int) -> CudaGenerator:
        return super().__new__(cls, device="cpu")  # type: ignore[call-arg]  # torch's has no types of its own

    def __init__(self, seed: int) -> None:
        self.manual_seed(seed)
        self.drawn = 0

    def randn(self, shape: Sequence[int]) -> torch.Tensor:
        """Return the next normal numbers, float32."""
        numbers = cuda_randn(self.initial_seed(), self.drawn, int(np.prod(shape, dtype=np.int64)))
        self.drawn += 1
        return torch.from_numpy(numbers).reshape(tuple(shape))


class _DrawnAsAsked(TorchFunctionMode):
    """torch.randn of a `CudaGenerator` is that generator's; every other call is torch's."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        generator = options.get("generator")
        if func is not torch.randn or not isinstance(generator, CudaGenerator):
            return func(*args, **options)
        shape = args[0] if args and not isinstance(args[0], int) else args or options["size"]
        return generator.randn(shape).to(options.get("device"), options.get("dtype") or torch.get_default_dtype())


def noise_generators(source: NoiseSource, seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one generator a picture. Draw from them within `drawing_noise`."""
    if source == "cuda":
        return [CudaGenerator(seed) for seed in seeds]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawing_noise() -> TorchFunctionMode:
    """Return the context in which torch.randn knows the generators of `noise_generators`, in this thread alone."""
    return _DrawnAsAsked()


def cuda_randn(seed: int, drawn: int, count: int) -> np.ndarray:
    """Return the normal numbers [count] float32 of the tensor that is drawn after `drawn` others.

    Of two words x, y of a thread's four: sqrt(-2 ln u) sin(v), u in (0, 1] and v in (0, 2 pi] (Box and Muller 1958).
    """
    thread = np.arange(count, dtype=np.uint64)
    zero = np.zeros(count, dtype=np.uint64)
    counter = (zero + np.uint64(drawn & 0xFFFFFFFF), zero + np.uint64(drawn >> 32), thread & _LOW, thread >> _WORD)
    x, y, _, _ = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    u = x.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    turn = np.float32(2.0**-32 * 2 * np.pi)
    v = y.astype(np.float32) * turn + turn / np.float32(2)
    return np.sqrt(np.float32(-2) * np.log(u)) * np.sin(v)


def philox(counter: _Words, key: tuple[int, int]) -> _Words:
    """Return the four words, each 32 bits in a uint64, that Philox4x32-10 makes of counters (Salmon et al. 2011)."""
    a, b, c, d = counter
    low, high = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (second >> _WORD) ^ b ^ low, second & _LOW, (first >> _WORD) ^ d ^ high, first & _LOW
        low, high = (low + _KEY_STEPS[0]) & _LOW, (high + _KEY_STEPS[1]) & _LOW
    return a, b, c, d

"""How the process uses its memory and its threads while it trains on a CPU."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of malloc.h
_WORK_OF_ONE_THREAD = 2_000_000_000


@contextmanager
def training_on_cpu(work: int) -> Iterator[None]:
    """Inside, memory is kept between steps, and a step too small to be shared runs on one thread.

    `work` is a batch's latent positions times the UNet's parameters. Of a small step each operation takes
    microseconds: a second thread costs as much in waiting as it saves, and more when the machine is busy.
    The bound is a function of the job alone, so that a run gives the same numbers whenever it is repeated.
    """
    _keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if work < _WORK_OF_ONE_THREAD else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _keep_freed_memory() -> None:
    """What one step frees is there for the next, instead of being mapped, zeroed and returned every time.

    Without it page faults are an eighth of an SD 1.5 step on a CPU. Of glibc only (mallopt(3)), and for the
    rest of the process.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)

"""Two processes as a launcher starts them, which share one run, without the libraries being imported anew for each."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from forked import at_once

PROCESSES = 2


def launched(work: Callable[[], int | None], folder: Path) -> list[str]:
    """Return what each of two processes wrote that ran `work`, told what `torch.distributed.run` tells them.

    Their output is kept in `folder`. Fails where one of them did.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": f"{PROCESSES}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}

    def member(rank: int) -> int | None:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        os.environ.update(group | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "LOCAL_WORLD_SIZE": f"{PROCESSES}"})
        for state in (AcceleratorState, GradientState, PartialState):  # an earlier run's, of one process
            state._reset_state()
        return work()

    return at_once([partial(member, rank) for rank in range(PROCESSES)], folder)

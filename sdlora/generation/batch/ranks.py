"""Several processes that make one batch: launched by accelerate or torchrun, each with its share of the pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from sdlora.errors import SdloraError
from sdlora.generation.batch.plan import Picture, in_groups

_LONGEST_WAIT = timedelta(days=30)
"""That a process which is done early waits for the others: a batch may take a night, and its shares are not equally long."""

Result = TypeVar("Result")


class Ranks:
    """This process among those that were launched together; alone where none were."""

    def __init__(self, *, on_cpu: bool = False) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = 0
        self._state: Any = None
        if self.count > 1:
            from accelerate import PartialState
            from accelerate.utils import parse_flag_from_env

            from sdlora.families.registry import default_device

            cpu = on_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or default_device().type == "cpu"
            self._state = PartialState(cpu=cpu, timeout=_LONGEST_WAIT)
            self.rank = self._state.process_index

    @property
    def is_main(self) -> bool:
        """Whether this process plans, and speaks for all."""
        return self.rank == 0

    def from_main(self, work: Callable[[], Result]) -> Result | None:
        """Return what `work` gives, which the main process alone does; None in the others where it failed.

        There it raises what `work` raised, after the others were told.
        """
        if self._state is None:
            return work()
        from accelerate.utils import broadcast_object_list

        result: list[Any] = [None]
        failure: SdloraError | None = None
        if self.is_main:
            try:
                result = [work()]
            except SdloraError as error:
                failure = error
        broadcast_object_list(result)
        if failure is not None:
            raise failure
        return result[0]

    def wait(self) -> None:
        """All processes have come here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def leave(self) -> None:
        """This process waits for no other any more."""
        if self._state is not None:
            self._state.destroy_process_group()


def deal(pictures: Sequence[Picture], processes: int, batch_size: int) -> list[list[Picture]]:
    """Return each process's share: batches that can be made together, next to one another, with about equally much work.

    Where there are fewer full batches than processes, they are made smaller.
    """
    size = max(1, min(batch_size, -(-len(pictures) // processes)))
    batches = [group[start : start + size] for group in in_groups(pictures) for start in range(0, len(group), size)]
    works = [sum(picture.cost for picture in batch) for batch in batches]
    total, before = sum(works), 0.0
    shares: list[list[Picture]] = [[] for _ in range(processes)]
    for batch, work in zip(batches, works, strict=True):
        middle = (before + work / 2) / total
        shares[min(processes - 1, int(middle * processes))] += batch
        before += work
    return shares

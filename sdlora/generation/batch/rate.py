"""How long a batch will take, from a few of its pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sdlora.generation.asked import FindAdapter
from sdlora.generation.batch.making import full_batches
from sdlora.generation.batch.plan import Picture
from sdlora.generation.engine import Engine


def measured_rate(
    engine: Engine, pictures: Sequence[Picture], batch_size: int, find_adapter: FindAdapter | None = None
) -> float:
    """Return the seconds that a unit of `Picture.cost` takes: a batch is made twice, and the second time counts.

    Raises GenerationError where it cannot be made.
    """
    batch = next(full_batches(engine, pictures, batch_size, find_adapter))
    requests = [picture.request for picture in batch]
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        for _ in engine.generate_all(requests, batch_size=batch_size):
            pass
        seconds = time.perf_counter() - started
    return seconds / sum(picture.cost for picture in batch)

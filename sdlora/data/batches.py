"""The order of training: which examples make up batch number k, on any process, at any time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdlora.data.cache import CachedExample
from sdlora.diffusion import seed_from


class BatchOrder:
    """A fixed, endless sequence of batches, reachable by number.

    Each epoch holds every example `repeats` times, shuffled anew; a batch comes from one bucket, and a
    bucket's last batch of an epoch may be short. Because batch k is a function of (seed, k) alone, a
    resumed run goes on exactly where it stopped, and processes take different k of one sequence.
    """

    def __init__(self, examples: Sequence[CachedExample], batch_size: int, repeats: int, seed: int) -> None:
        self._batch_size = batch_size
        self._seed = seed
        self._buckets: dict[tuple[int, int], list[int]] = {}
        for index, example in enumerate(examples):
            self._buckets.setdefault(example.bucket, []).extend([index] * repeats)
        self.batches_per_epoch = sum(-(-len(members) // batch_size) for members in self._buckets.values())
        self._epoch = -1
        self._batches: list[list[int]] = []

    def batch(self, number: int) -> list[int]:
        """Return the example indices of batch `number` (0, 1, 2, ...)."""
        epoch, position = divmod(number, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return self._batches[position]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed_from(self._seed, "order", epoch))
        batches = []
        for _, members in sorted(self._buckets.items()):
            order = torch.randperm(len(members), generator=generator).tolist()
            shuffled = [members[position] for position in order]
            batches += [
                shuffled[start : start + self._batch_size] for start in range(0, len(shuffled), self._batch_size)
            ]
        return [batches[position] for position in torch.randperm(len(batches), generator=generator).tolist()]

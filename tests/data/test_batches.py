from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sdlora.data.batches import BatchOrder
from sdlora.data.cache import CachedExample
from sdlora.data.source import Sample
from sdlora.families.base import PictureSize


def example(width: int, height: int) -> CachedExample:
    latents = torch.zeros(1, 4, height // 8, width // 8)
    size = PictureSize((height, width), (0, 0), (height, width))
    return CachedExample(Sample(Path("a.png"), ""), latents, latents, size)


EXAMPLES = [example(*size) for size in [(64, 64)] * 7 + [(128, 32)] * 3 + [(32, 128)] * 2]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
@pytest.mark.parametrize("repeats", [1, 3])
def test_an_epoch_holds_every_example_as_often_as_asked(batch_size, repeats):
    order = BatchOrder(EXAMPLES, batch_size, repeats, seed=5)
    for epoch in range(3):
        first = epoch * order.batches_per_epoch
        batches = [order.batch(first + i) for i in range(order.batches_per_epoch)]
        assert Counter(index for batch in batches for index in batch) == dict.fromkeys(range(12), repeats)
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        assert all(len({EXAMPLES[index].bucket for index in batch}) == 1 for batch in batches)


def test_the_number_of_batches_counts_each_buckets_last_short_one():
    assert BatchOrder(EXAMPLES, 2, 1, 0).batches_per_epoch == 4 + 2 + 1
    assert BatchOrder(EXAMPLES, 2, 2, 0).batches_per_epoch == 7 + 3 + 2


def test_batches_are_the_same_in_any_order_of_asking():
    one, other = BatchOrder(EXAMPLES, 2, 1, 9), BatchOrder(EXAMPLES, 2, 1, 9)
    in_turn = [one.batch(number) for number in range(30)]
    for number in (29, 3, 14, 0, 28, 7, 7):
        assert other.batch(number) == in_turn[number]


def test_epochs_and_seeds_differ():
    order = BatchOrder(EXAMPLES, 2, 1, 9)
    size = order.batches_per_epoch
    epochs = [[order.batch(epoch * size + i) for i in range(size)] for epoch in range(4)]
    assert len({str(epoch) for epoch in epochs}) == 4
    assert [BatchOrder(EXAMPLES, 2, 1, 10).batch(i) for i in range(size)] != epochs[0]


def test_buckets_are_mixed_within_an_epoch():
    order = BatchOrder([example(64, 64)] * 20 + [example(128, 32)] * 20, 1, 1, 0)
    buckets = [order.batch(i)[0] < 20 for i in range(40)]
    assert sum(a != b for a, b in pairwise(buckets)) > 5

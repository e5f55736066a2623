import itertools
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sdlora.data.batches import Batch, BatchOrder, Draw, Placed
from sdlora.errors import DataError

SQUARE, WIDE, TALL = (64, 64), (128, 32), (32, 128)

properties = settings(deadline=None, derandomize=True, max_examples=80)


def example(bucket=SQUARE, batch_size=2, repeats=1, concept=0, prior=False) -> Placed:
    return Placed(bucket, batch_size, repeats, concept, prior)


def examples(batch_size=2, repeats=1) -> list[Placed]:
    return [example(bucket, batch_size, repeats) for bucket in [SQUARE] * 7 + [WIDE] * 3 + [TALL] * 2]


def epoch_of(order: BatchOrder, epoch: int) -> list[Batch]:
    return [order.batch(number) for number in range(order.first_batch(epoch), order.first_batch(epoch + 1))]


def indices(batch: Batch) -> list[int]:
    return [draw.example for draw in batch.draws]


def counts(order: BatchOrder, epoch: int) -> Counter[int]:
    return Counter(index for batch in epoch_of(order, epoch) for index in indices(batch))


placements = st.lists(
    st.builds(
        Placed,
        bucket=st.sampled_from([SQUARE, WIDE, TALL]),
        batch_size=st.sampled_from([1, 2, 5]),
        repeats=st.integers(1, 3),
        concept=st.integers(0, 2),
        prior=st.booleans(),
    ),
    min_size=1,
    max_size=25,
)
policies = st.sampled_from(["keep", "fill", "drop"])
ratios = st.sampled_from([0.0, 0.0, 0.3, 1.0, 2.5])


def make_order(placed, seed, ratio, policy) -> BatchOrder:
    """An order, unless it could have no batch at all."""
    try:
        return BatchOrder(placed, seed, prior_ratio=ratio, short_batches=policy)
    except DataError:
        assume(False)
        raise


def test_the_order_of_one_concept_is_pinned():
    order = BatchOrder(examples(), 9)
    assert [indices(order.batch(number)) for number in range(7)] == [[4, 1], [2, 6], [9], [3], [8, 7], [11, 10], [5, 0]]
    assert [indices(order.batch(number)) for number in range(7, 14)] == [
        [7],
        [11, 10],
        [3, 6],
        [5, 1],
        [0, 2],
        [4],
        [9, 8],
    ]

    repeated = [example(bucket, 3, 2) for bucket in [SQUARE, WIDE, SQUARE, TALL, SQUARE, WIDE]]
    order = BatchOrder(repeated, 1234)
    assert [indices(order.batch(number)) for number in range(5)] == [[0, 4, 2], [3, 3], [1], [5, 5, 1], [0, 2, 4]]
    assert [indices(order.batch(number)) for number in range(5, 10)] == [[3, 3], [0, 4, 2], [5, 5, 1], [1], [2, 0, 4]]

    order = BatchOrder([example(batch_size=4)] * 10, 0)
    assert [indices(order.batch(number)) for number in range(300, 303)] == [[1, 3, 2, 0], [6, 7, 4, 9], [5, 8]]
    assert [indices(order.batch(number)) for number in range(303, 306)] == [[4, 8], [0, 3, 2, 6], [5, 9, 1, 7]]


def test_prior_examples_beside_one_concept_change_nothing_in_the_pinned_order():
    placed = [example(bucket, prior=number % 3 == 0) for number, bucket in enumerate([SQUARE] * 7 + [WIDE] * 3)]
    assert [BatchOrder(placed, 9).batch(number) for number in range(6)] == [
        BatchOrder(examples()[:10], 9).batch(number) for number in range(6)
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
@pytest.mark.parametrize("repeats", [1, 3])
def test_an_epoch_holds_every_example_as_often_as_asked(batch_size, repeats):
    placed = examples(batch_size, repeats)
    order = BatchOrder(placed, 5)
    for epoch in range(3):
        batches = epoch_of(order, epoch)
        assert counts(order, epoch) == dict.fromkeys(range(12), repeats)
        assert all(1 <= len(batch.draws) <= batch_size == batch.size for batch in batches)
        assert all(len({placed[index].bucket for index in indices(batch)}) == 1 for batch in batches)


def test_the_number_of_batches_counts_each_buckets_last_short_one():
    assert BatchOrder(examples(2, 1), 0).first_batch(1) == 4 + 2 + 1
    assert BatchOrder(examples(2, 2), 0).first_batch(1) == 7 + 3 + 2
    assert BatchOrder(examples(2, 2), 0).first_batch(3) == 36
    assert [BatchOrder(examples(2, 2), 0).epoch_of(number) for number in (0, 11, 12, 36)] == [0, 0, 1, 3]


def test_batches_are_the_same_in_any_order_of_asking():
    one, other = BatchOrder(examples(), 9), BatchOrder(examples(), 9)
    in_turn = [one.batch(number) for number in range(30)]
    for number in (29, 3, 14, 0, 28, 7, 7):
        assert other.batch(number) == in_turn[number]


def test_epochs_and_seeds_differ():
    order = BatchOrder(examples(), 9)
    epochs = [[indices(batch) for batch in epoch_of(order, epoch)] for epoch in range(4)]
    assert len({str(epoch) for epoch in epochs}) == 4
    assert [indices(batch) for batch in epoch_of(BatchOrder(examples(), 10), 0)] != epochs[0]


def test_buckets_are_mixed_within_an_epoch():
    order = BatchOrder([example(SQUARE, 1)] * 20 + [example(WIDE, 1)] * 20, 0)
    buckets = [indices(order.batch(number))[0] < 20 for number in range(40)]
    assert sum(a != b for a, b in pairwise(buckets)) > 5


def test_a_draw_says_its_epoch_and_how_often_the_example_came_before_in_it():
    order = BatchOrder([example(repeats=2)], 0)
    assert order.batch(0) == Batch((Draw(0, 0, 0), Draw(0, 0, 1)), 2)
    assert order.batch(7) == Batch((Draw(0, 7, 0), Draw(0, 7, 1)), 2)


def test_a_filled_batch_goes_on_counting_and_takes_turns():
    placed = [example(batch_size=4) for _ in range(6)]
    order = BatchOrder(placed, 3, short_batches="fill")
    added: Counter[int] = Counter()
    for epoch in range(3):
        batches = epoch_of(order, epoch)
        assert [len(batch.draws) for batch in batches] == [4, 4]
        seen = Counter((draw.example, draw.occurrence) for batch in batches for draw in batch.draws)
        assert set(seen.values()) == {1}
        added += Counter(draw.example for batch in batches for draw in batch.draws if draw.occurrence == 1)
    assert added == dict.fromkeys(range(6), 1)


def test_a_bucket_of_one_picture_is_filled_with_that_picture():
    order = BatchOrder([example(batch_size=3)], 0, short_batches="fill")
    assert [draw.occurrence for draw in order.batch(0).draws] == [0, 1, 2]


def test_examples_take_turns_in_being_left_out():
    order = BatchOrder([example(batch_size=4) for _ in range(6)], 3, short_batches="drop")
    left_out = [set(range(6)) - set(counts(order, epoch)) for epoch in range(3)]
    assert all(len(epoch_of(order, epoch)) == 1 for epoch in range(3))
    assert sorted(index for out in left_out for index in out) == [0, 1, 2, 3, 4, 5]


def test_two_batch_sizes_of_one_bucket_are_kept_apart():
    placed = [example(batch_size=2)] * 5 + [example(batch_size=3)] * 5
    for batch in epoch_of(BatchOrder(placed, 0), 0):
        assert {placed[index].batch_size for index in indices(batch)} == {batch.size}


def test_a_rare_concept_is_spread_evenly():
    placed = [example(batch_size=22, concept=index % 11 == 0) for index in range(220)]
    for epoch in range(5):
        rare = [sum(index % 11 == 0 for index in indices(batch)) for batch in epoch_of(BatchOrder(placed, 1), epoch)]
        assert len(rare) == 10
        assert sum(rare) == 20
        assert all(1 <= number <= 3 for number in rare)
    orders = [tuple(indices(batch)) for epoch in range(2) for batch in epoch_of(BatchOrder(placed, 1), epoch)]
    assert len(set(orders)) == 20


def test_prior_draws_are_a_share_of_the_others_and_take_turns():
    placed = [example(repeats=3) for _ in range(5)] + [example(WIDE, 2, 7, 1, True) for _ in range(4)]
    order = BatchOrder(placed, 0, prior_ratio=0.4)
    total: Counter[int] = Counter()
    for epoch in range(9):
        found = counts(order, epoch)
        assert {index: found[index] for index in range(5)} == dict.fromkeys(range(5), 3)
        assert sum(found[index] for index in range(5, 9)) == 6  # 0.4 * 15
        total += found
        times = [total[index] for index in range(5, 9)]
        assert max(times) - min(times) <= 1


def test_prior_turns_change_how_many_batches_an_epoch_has():
    # 3 draws of squares make 2 batches, 4 do too, and the wide example makes one of its own
    placed = [example(), example(), example(), example(SQUARE, prior=True), example(WIDE, prior=True)]
    order = BatchOrder(placed, 0, prior_ratio=1 / 3)
    lengths = [len(epoch_of(order, epoch)) for epoch in range(6)]
    assert lengths == [3 if counts(order, epoch)[4] else 2 for epoch in range(6)]
    assert order.first_batch(6) == sum(lengths) == 15
    epochs = [order.epoch_of(number) for number in range(15)]
    assert epochs == [epoch for epoch, length in enumerate(lengths) for _ in range(length)]


def test_epochs_without_a_batch_are_passed_over():
    # only with a prior example in its turn is there a full batch of squares
    placed = [example(), example(SQUARE, prior=True), example(WIDE, prior=True)]
    order = BatchOrder(placed, 0, prior_ratio=1.0, short_batches="drop")
    lengths = [order.first_batch(epoch + 1) - order.first_batch(epoch) for epoch in range(4)]
    assert sorted(lengths) == [0, 0, 1, 1]
    first = lengths.index(1)
    assert [order.epoch_of(number) for number in range(3)] == [first, first + 2, first + 4]
    assert sorted(indices(order.batch(1))) == [0, 1]


def test_prior_examples_lie_evenly_among_those_of_one_concept():
    placed = [example(batch_size=4) for _ in range(40)] + [example(batch_size=4, prior=True) for _ in range(40)]
    for batch in epoch_of(BatchOrder(placed, 2, prior_ratio=1.0), 0):
        assert 1 <= sum(index >= 40 for index in indices(batch)) <= 3


def test_what_can_have_no_batch_is_refused():
    with pytest.raises(DataError, match=r'short_batches is "drop"; set it to "keep" or "fill", or lower'):
        BatchOrder([example(batch_size=5)] * 4, 0, short_batches="drop")
    with pytest.raises(DataError, match=r"no picture to train on beside those of data\.prior"):
        BatchOrder([example(prior=True)], 0, prior_ratio=1.0)
    with pytest.raises(DataError, match="no picture to train on"):
        BatchOrder([], 0)
    with pytest.raises(DataError, match="no picture to train on"):
        BatchOrder([example(prior=True)], 0)


@properties
@given(placements, st.integers(0, 99), ratios, policies)
def test_every_example_comes_as_often_as_asked(placed, seed, ratio, policy):
    order = make_order(placed, seed, ratio, policy)
    turns = {index for index, one in enumerate(placed) if one.prior and ratio}
    often = {index: one.repeats for index, one in enumerate(placed) if index not in turns}
    per_epoch = Fraction(str(ratio)) * sum(one.repeats for one in placed if not one.prior) if turns else 0
    total: Counter[int] = Counter()
    for epoch in range(4):
        found = counts(order, epoch)
        asked = Counter(often)
        if policy == "keep":
            assert {index: found[index] for index in often} == often
        total += found
        if policy == "keep":
            assert sum(total[index] for index in turns) == int((epoch + 1) * per_epoch)
        if policy == "keep" and turns:
            times = [total[index] for index in turns]
            assert max(times) - min(times) <= 1
        if policy == "fill" and not turns:
            assert found >= asked
        if policy == "drop" and not turns:
            assert found <= asked
    if not turns:  # what is added and left out goes round
        for key in {(one.bucket, one.batch_size) for one in placed}:
            members = [i for i in often if (placed[i].bucket, placed[i].batch_size) == key]
            extra = [(total[index] - 4 * often[index], often[index]) for index in members]
            draws = sum(often[index] for index in members)
            per = {"keep": 0, "fill": -draws % key[1], "drop": -(draws % key[1])}[policy]
            assert sum(number for number, _ in extra) == 4 * per
            assert all(abs(number - repeats * 4 * per / draws) <= repeats for number, repeats in extra)


@properties
@given(placements, st.integers(0, 99), ratios, policies)
def test_batches_never_mix_buckets_and_say_their_full_size(placed, seed, ratio, policy):
    order = make_order(placed, seed, ratio, policy)
    for epoch in range(3):
        short: Counter[object] = Counter()
        came: Counter[int] = Counter()
        for batch in epoch_of(order, epoch):
            (key,) = {(placed[index].bucket, placed[index].batch_size) for index in indices(batch)}
            assert 1 <= len(batch.draws) <= batch.size == key[1]
            short[key] += len(batch.draws) < batch.size
            for draw in batch.draws:
                assert (draw.epoch, draw.occurrence) == (epoch, came[draw.example])
                came[draw.example] += 1
        assert all(number <= (policy == "keep") for number in short.values())


@properties
@given(placements, st.integers(0, 99), ratios, policies, st.integers(1, 4), st.integers(0, 200))
def test_processes_share_the_sequence_and_any_start_goes_on_with_it(placed, seed, ratio, policy, world, start):
    order = make_order(placed, seed, ratio, policy)
    steps = -(-order.first_batch(3) // world)
    fresh = [make_order(placed, seed, ratio, policy) for _ in range(world)]
    by_rank = [[fresh[rank].batch(step * world + rank) for step in range(steps)] for rank in range(world)]
    shared = [batch for step in zip(*by_rank, strict=True) for batch in step]
    assert shared == [order.batch(number) for number in range(steps * world)]
    seen = Counter(index for batch in shared[: order.first_batch(3)] for index in indices(batch))
    assert seen == counts(order, 0) + counts(order, 1) + counts(order, 2)
    resumed = make_order(placed, seed, ratio, policy)
    assert resumed.batch(start) == order.batch(start)
    assert resumed.first_batch(order.epoch_of(start)) <= start < resumed.first_batch(order.epoch_of(start) + 1)


@properties
@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.integers(1, 9), st.integers(0, 99))
def test_concepts_are_even_over_every_stretch_of_a_bucket(numbers, batch_size, seed):
    placed = [example(batch_size=batch_size, concept=concept) for concept, n in enumerate(numbers) for _ in range(n)]
    shares = [n / len(placed) for n in numbers]
    for batch in epoch_of(BatchOrder(placed, seed), 0):
        found = Counter(placed[index].concept for index in indices(batch))
        for concept, share in enumerate(shares):
            # each end of a stretch is off by less than one example of each concept
            assert abs(found[concept] - share * len(batch.draws)) < 2 + 2 * len(numbers) * share


def test_a_batch_far_away_is_reached_without_those_before():
    placed = [
        example((64 * (index % 9 + 1), 64), 4, 1 + index % 3, index % 5, index % 7 == 0) for index in range(100_000)
    ]
    order = BatchOrder(placed, 0, prior_ratio=0.37, short_batches="fill")
    far = order.batch(10**9)
    assert order.epoch_of(10**9) > 1000 and 1 <= len(far.draws) <= far.size == 4
    assert order.batch(3) != far == order.batch(10**9)


def test_concepts_alternate_also_where_each_batch_holds_one_example():
    placed = [Placed((64, 64), 1, 1, concept, False) for concept in (0, 1) for _ in range(30)]
    order = BatchOrder(placed, seed=3)
    concepts = [order.batch(number).draws[0].example // 30 for number in range(60)]
    runs = [len(list(group)) for _, group in itertools.groupby(concepts)]
    assert max(runs) <= 3  # at random one would be of five or more


def test_a_small_ratio_of_prior_draws_is_kept_over_the_epochs():
    placed = [example(repeats=1) for _ in range(18)] + [example(prior=True) for _ in range(5)]
    for ratio, expected in ((0.08, 144), (0.02, 36), (0.0001, 18)):  # the last is taken as a hundredth
        order = BatchOrder(placed, 0, prior_ratio=ratio)
        drawn = [draw.example for n in range(order.first_batch(100)) for draw in order.batch(n).draws]
        assert sum(index >= 18 for index in drawn) == expected
        assert order.epoch_of(order.first_batch(100)) == 100

"""The order of training: which examples make up batch number k, on any process, at any time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from sdlora.data.buckets import Bucket
from sdlora.diffusion import seed_from
from sdlora.errors import DataError

_FINEST_RATIO = 100
"""Ratios of prior draws are taken as fractions of at most this denominator, so that their counts repeat."""

_Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Placed:
    """What the order needs to know of one example."""

    bucket: Bucket
    batch_size: int
    repeats: int
    """How often it comes in one epoch."""
    concept: int
    prior: bool


@dataclass(frozen=True, slots=True)
class Draw:
    """One example in its place of the order."""

    example: int
    epoch: int
    occurrence: int
    """How often the example came before in this epoch."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of one bucket that are trained together."""

    draws: tuple[Draw, ...]
    size: int
    """Draws of a full batch. The loss is divided by it, so an example of a short batch weighs as much as any other."""


@dataclass(frozen=True, slots=True)
class _Group:
    """The examples that can share batches: of one bucket and one batch size."""

    batch_size: int
    members: _Integers
    """Those that come in every epoch, each as often as it comes."""
    turns: _Integers
    """Where its prior examples come in the cycle of turns, rising."""


@dataclass(frozen=True, slots=True)
class _Epoch:
    """One epoch's draws, batch after batch."""

    examples: _Integers
    occurrences: _Integers
    ends: _Integers
    """Where each batch ends."""
    sizes: _Integers
    """Draws of each batch if it were full."""


def prior_draws(ratio: float, draws: int) -> Fraction:
    """Return how many prior draws an epoch with `draws` others has on average; the first has the whole part of it."""
    return draws * max(Fraction(ratio).limit_denominator(_FINEST_RATIO), Fraction(1, _FINEST_RATIO))


class BatchOrder:
    """A fixed, endless sequence of batches, reachable by number.

    Each epoch holds every example `repeats` times, shuffled anew; a batch comes from one bucket and has
    one batch size. With two or more concepts to learn, or prior examples that take turns, each concept is
    spread evenly over its buckets' batches, and each bucket over the epoch. Because batch k is a function of
    (placed, seed, k) alone, a resumed run goes on exactly where it stopped, and processes take different k of
    one sequence.

    `prior_ratio` above 0: so many prior draws come per other draw, over the epochs if not in each, whatever
    their repeats; the prior examples take turns, and at the end of an epoch their counts differ by at most one. `short_batches` says what becomes
    of a bucket's last batch of an epoch: it is kept short, or filled with further draws of the bucket, or so
    many draws are left out, prior ones too. Examples take turns in being added or left out, as long as their
    bucket has as many draws in each epoch.
    """

    def __init__(
        self,
        placed: Sequence[Placed],
        seed: int,
        *,
        prior_ratio: float = 0.0,
        short_batches: Literal["keep", "fill", "drop"] = "keep",
    ) -> None:
        """Raises DataError when no epoch would have a batch."""
        self._seed, self._short_batches = seed, short_batches
        taking_turns = [index for index, example in enumerate(placed) if example.prior and prior_ratio > 0]
        if all(example.prior for example in placed):
            raise DataError("there is no picture to train on beside those of data.prior; set data.folder to some")
        draws = sum(example.repeats for example in placed if not example.prior)
        self._turns_per_epoch = prior_draws(prior_ratio, draws) if taking_turns else Fraction(0)
        mixed = torch.randperm(len(taking_turns), generator=self._generator("prior")).numpy()
        self._turns = np.array(taking_turns, dtype=np.int64)[mixed]

        keys = sorted({(example.bucket, example.batch_size) for example in placed})
        numbers = {key: number for number, key in enumerate(keys)}
        self._group_of = np.array([numbers[example.bucket, example.batch_size] for example in placed], dtype=np.int64)
        often = np.array([example.repeats for example in placed], dtype=np.int64)
        often[self._turns] = 0
        self._groups = self._group(often, [batch_size for _, batch_size in keys])

        learnt = {example.concept for example in placed if not example.prior}
        self._balanced = len(learnt) > 1 or bool(taking_turns)
        concepts = {key: number for number, key in enumerate(sorted({(e.concept, e.prior) for e in placed}))}
        self._concepts = np.array([concepts[e.concept, e.prior] for e in placed], dtype=np.int64)

        self._epochs: dict[int, _Epoch] = {}
        self._ends = self._count_batches()
        if self._ends[-1] == 0:
            raise DataError(
                'no shape has pictures enough for one batch, and data.buckets.short_batches is "drop"; set it to '
                '"keep" or "fill", or lower training.batch_size'
            )

    def batch(self, number: int) -> Batch:
        """Return batch `number` (0, 1, 2, ...); quick while numbers stay near each other."""
        index = self.epoch_of(number)
        epoch, position = self._epoch(index), number - self.first_batch(index)
        start = int(epoch.ends[position - 1]) if position else 0
        drawn = slice(start, int(epoch.ends[position]))
        pairs = zip(epoch.examples[drawn].tolist(), epoch.occurrences[drawn].tolist(), strict=True)
        draws = tuple(Draw(example, index, occurrence) for example, occurrence in pairs)
        return Batch(draws, int(epoch.sizes[position]))

    def epoch_of(self, number: int) -> int:
        """Return the epoch (0, 1, 2, ...) that batch `number` belongs to."""
        cycle, rest = divmod(number, int(self._ends[-1]))
        return cycle * len(self._ends) + int(np.searchsorted(self._ends, rest, side="right"))

    def first_batch(self, epoch: int) -> int:
        """Return the number of an epoch's first batch, which is how many batches all epochs before it have."""
        cycle, inside = divmod(epoch, len(self._ends))
        return cycle * int(self._ends[-1]) + (int(self._ends[inside - 1]) if inside else 0)

    def _generator(self, *parts: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_from(self._seed, *parts))

    def _group(self, often: _Integers, batch_sizes: Sequence[int]) -> list[_Group]:
        """Return the groups; example i is a member `often[i]` times."""
        members = np.repeat(np.arange(len(often)), often)
        turns = np.arange(len(self._turns))
        parts = zip(batch_sizes, self._by_group(members, members), self._by_group(self._turns, turns), strict=True)
        return [_Group(*part) for part in parts]

    def _by_group(self, examples: _Integers, values: _Integers) -> list[_Integers]:
        """Return for each group the values that belong to its examples, in their order."""
        groups = self._group_of[examples]
        order = np.argsort(groups, kind="stable")
        return np.split(values[order], np.searchsorted(groups[order], np.arange(1, self._group_of.max() + 1)))

    def _count_batches(self) -> _Integers:
        """Return how many batches have passed at the end of each epoch, up to where the counts begin again."""
        turns, epochs = self._turns_per_epoch.as_integer_ratio()
        period = epochs * (len(self._turns) // math.gcd(len(self._turns), turns)) if turns else 1
        rounds, rest = np.divmod(self._first_turn(np.arange(period + 1)), max(1, len(self._turns)))
        batches = np.zeros(period, dtype=np.int64)
        for group in self._groups:
            prior = np.diff(rounds * len(group.turns) + np.searchsorted(group.turns, rest))
            draws = len(group.members) + prior
            batches += draws // group.batch_size if self._short_batches == "drop" else -(-draws // group.batch_size)
        return np.cumsum(batches)

    def _first_turn(self, epochs: _Integers) -> _Integers:
        """Return how many prior draws all epochs before these have."""
        turns, per = self._turns_per_epoch.as_integer_ratio()
        return epochs * turns // per

    def _epoch(self, index: int) -> _Epoch:
        if index not in self._epochs:
            # One other stays: the processes of one step may stand on both sides of an epoch's end.
            self._epochs = dict(list(self._epochs.items())[-1:]) | {index: self._make_epoch(index)}
        return self._epochs[index]

    def _make_epoch(self, index: int) -> _Epoch:
        generator = self._generator("order", index)
        first, end = self._first_turn(np.array([index, index + 1])).tolist()
        turns = np.arange(first, end) % max(1, len(self._turns))
        prior = np.sort(self._turns[turns])
        sequences, lengths, sizes = [], [], []
        for number, (group, drawn) in enumerate(zip(self._groups, self._by_group(prior, prior), strict=True)):
            members = self._whole_batches(np.concatenate([group.members, drawn]), number, index)
            sequences.append(self._shuffle(members, generator))
            full, rest = divmod(len(members), group.batch_size)
            lengths += [group.batch_size] * full + [rest] * (rest > 0)
            sizes += [group.batch_size] * (full + (rest > 0))
        if self._balanced:
            counts = [
                -(-len(members) // group.batch_size) for members, group in zip(sequences, self._groups, strict=True)
            ]
            order = _evenly(np.repeat(np.arange(len(counts)), counts), generator)
        else:
            order = torch.randperm(len(lengths), generator=generator).numpy()
        length, size = np.array(lengths, dtype=np.int64), np.array(sizes, dtype=np.int64)
        starts = np.cumsum(length) - length
        ends = np.cumsum(length[order])
        moved = np.repeat(starts[order] - (ends - length[order]), length[order])
        examples = np.concatenate(sequences)[moved + np.arange(len(moved))]
        return _Epoch(examples, _equals_before(examples), ends, size[order])

    def _whole_batches(self, members: _Integers, group: int, epoch: int) -> _Integers:
        """Return the members with some more or some fewer, as `short_batches` asks for."""
        batch_size, count = self._groups[group].batch_size, len(members)
        amount = {"keep": 0, "fill": -count % batch_size, "drop": count % batch_size}[self._short_batches]
        if not amount or not count:
            return members
        # Each epoch goes on in one cycle of places where the last one ended.
        cycle = torch.randperm(count, generator=self._generator("turns", group)).numpy()
        places = cycle[np.arange(epoch * amount, (epoch + 1) * amount) % count]
        if self._short_batches == "drop":
            return np.delete(members, places)
        return np.concatenate([members, members[places]])

    def _shuffle(self, members: _Integers, generator: torch.Generator) -> _Integers:
        """Return the members in a random order, the concepts evenly over it if they are to be balanced."""
        shuffled = members[torch.randperm(len(members), generator=generator).numpy()]
        if not self._balanced:
            return shuffled
        return shuffled[_evenly(self._concepts[shuffled], generator)]


def _evenly(kinds: _Integers, generator: torch.Generator) -> _Integers:
    """Return an order in which each kind is spread evenly, those of a kind in the order they have now.

    Number j of the n of a kind comes at a random place of the j-th of n equal parts.
    """
    offsets = torch.rand(len(kinds), generator=generator, dtype=torch.float64).numpy()
    places = (_equals_before(kinds) + offsets) / np.bincount(kinds)[kinds]
    return np.argsort(places, kind="stable")


def _equals_before(values: _Integers) -> _Integers:
    """Return for each value how many equal ones stand before it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(values) else np.zeros(0, dtype=bool)
    places = np.arange(len(values))
    before = np.empty_like(places)
    before[order] = places - np.maximum.accumulate(np.where(starts, places, 0))
    return before

"""What one epoch comes to: how much of it each concept is, which shapes there are, and how many batches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdlora.config import TrainConfig
from sdlora.data.batches import prior_draws
from sdlora.data.buckets import Bucket
from sdlora.data.check.picture import Picture
from sdlora.data.examples import order_samples
from sdlora.data.sample import Concept


@dataclass(frozen=True)
class ConceptShare:
    """One concept, and how much of an epoch it is."""

    name: str
    folder: str
    trigger: str
    prior: bool
    pictures: int
    repeats: int
    draws: int
    """How often its pictures come in one epoch, all together."""
    share: float
    """Of the draws of all concepts to learn, or of all prior ones."""


@dataclass(frozen=True)
class Shape:
    """One shape that training pictures are cut to."""

    bucket: Bucket
    pictures: int
    cropped: float
    """Share of them that is cropped away, on average."""


@dataclass(frozen=True)
class Batches:
    """What an epoch comes to."""

    size: int
    """Of a full one; concepts may have their own."""
    count: int
    short: int
    """How many are not full."""
    left_out: int
    """Draws that `short_batches = "drop"` leaves out of each epoch."""
    drawn_again: int
    """Draws that `short_batches = "fill"` adds to each epoch."""


def plan_batches(training: Sequence[Picture], config: TrainConfig) -> Batches:
    """Return what the first epoch comes to. Raises DataError where a run would not have a batch."""
    buckets = [picture.bucket for picture in training if picture.bucket]
    order = order_samples([picture.sample for picture in training], buckets, config)
    batches = [order.batch(number) for number in range(order.first_batch(1))]
    drawn = sum(len(batch.draws) for batch in batches)
    wanted = sum(_draws(training, config).values())
    return Batches(
        size=config.training.batch_size,
        count=len(batches),
        short=sum(len(batch.draws) < batch.size for batch in batches),
        left_out=max(0, wanted - drawn),
        drawn_again=max(0, drawn - wanted),
    )


def _draws(training: Sequence[Picture], config: TrainConfig) -> Counter[Concept]:
    """Return how often the pictures of each concept come in one epoch, all together."""
    draws: Counter[Concept] = Counter()
    for picture in training:
        draws[picture.sample.concept] += picture.sample.concept.settings.repeats
    prior = Counter(picture.sample.concept for picture in training if picture.part == "prior")
    if config.data.prior.ratio and prior:
        own = sum(number for concept, number in draws.items() if concept not in prior)
        turns = int(prior_draws(config.data.prior.ratio, own))
        for concept, number in prior.items():
            draws[concept] = round(turns * number / prior.total())
    return draws


def share_out(training: Sequence[Picture], config: TrainConfig) -> Iterator[ConceptShare]:
    """Yield each concept of the readable pictures, with its share of an epoch."""
    draws = _draws(training, config)
    counts = Counter(picture.sample.concept for picture in training)
    totals = Counter[bool]()
    for concept in counts:
        totals[concept.prior] += draws[concept]
    for concept, number in counts.items():
        settings = concept.settings
        yield ConceptShare(
            name=concept.name or Path(settings.folder).resolve().name,
            folder=settings.folder,
            trigger=settings.trigger,
            prior=concept.prior,
            pictures=number,
            repeats=settings.repeats,
            draws=draws[concept],
            share=draws[concept] / totals[concept.prior] if totals[concept.prior] else 0.0,
        )


def list_shapes(training: Sequence[Picture]) -> list[Shape]:
    """Return the shapes of the readable pictures, those of the most pictures first."""
    cropped: dict[Bucket, list[float]] = defaultdict(list)
    for picture in training:
        if picture.bucket:
            cropped[picture.bucket].append(picture.cropped)
    shapes = [Shape(bucket, len(shares), sum(shares) / len(shares)) for bucket, shares in cropped.items()]
    return sorted(shapes, key=lambda shape: (-shape.pictures, shape.bucket))

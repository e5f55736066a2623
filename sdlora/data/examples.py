"""Examples: samples with their shape and crops settled, and their latents under a name in the store."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sdlora.config import BucketsSection, TrainConfig
from sdlora.data.batches import BatchOrder, Placed
from sdlora.data.buckets import Bucket, assign_buckets, crop_of, mirrored
from sdlora.data.index import PictureFacts
from sdlora.data.sample import Sample
from sdlora.data.store import TensorStore
from sdlora.families.base import PictureSize

LATENT_CHANNELS = 4
"""Channels of the mean, and of the standard deviation behind it; a mask is one more."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to cut a sample's picture, perhaps mirrored afterwards, and the name of its latents in the store."""

    cut: PictureSize
    flipped: bool
    name: str

    @property
    def size(self) -> PictureSize:
        """What the model is told: of a mirrored picture, the crop counts from the other side."""
        return mirrored(self.cut) if self.flipped else self.cut


@dataclass(frozen=True, slots=True)
class Posterior:
    """What the VAE makes of a picture: mean and std, each [4,h,w] float32, and the weight [1,h,w] of its parts."""

    mean: torch.Tensor
    std: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class CachedExample:
    """A picture as the trainer sees it: the VAE's posterior, not a draw from it, in one or several variants."""

    sample: Sample
    identity: str
    """SHA-256 of the picture file: chance depends on it, not on names or order."""
    mask_hash: str
    """SHA-256 of the mask's file, "" without one."""
    variants: tuple[Variant, ...]
    store: TensorStore

    @property
    def bucket(self) -> Bucket:
        """Width and height in pixels."""
        height, width = self.variants[0].size.target
        return width, height

    @property
    def size(self) -> PictureSize:
        """The first variant's."""
        return self.variants[0].size

    def posterior(self, variant: int = 0) -> Posterior:
        """Return the latents of one variant, read from the store. Raises DataError when they are gone."""
        packed = self.store.read(self.variants[variant].name)
        mask = packed[2 * LATENT_CHANNELS :]
        return Posterior(
            packed[:LATENT_CHANNELS], packed[LATENT_CHANNELS : 2 * LATENT_CHANNELS], mask if len(mask) else None
        )


def plan_examples(
    samples: Sequence[Sample],
    facts: Sequence[PictureFacts],
    mask_hashes: Sequence[str],
    resolution: int,
    store: TensorStore,
    *,
    augment: bool = True,
) -> list[CachedExample]:
    """Return each sample with its bucket and crops; nothing is encoded yet.

    `resolution` is the base's own, for concepts that set none. Pictures under the same rules share their
    buckets. `mask_hashes` holds "" for a picture without a mask. Where `augment` is False, as for validation,
    each picture has the one crop around its centre.
    """
    buckets = place_in_buckets(samples, facts, resolution)
    sizes: dict[PictureSize, PictureSize] = {}
    examples = []
    for sample, fact, mask, bucket in zip(samples, facts, mask_hashes, buckets, strict=True):
        settings = sample.concept.settings
        variants = []
        crops = settings.crops if augment else 1
        for crop in range(crops):
            cut = crop_of(*fact.size, bucket, crop, crops, fact.sha256)
            cut = sizes.setdefault(cut, cut)
            for flipped in (False, True)[: 1 + (settings.flip and augment)]:
                variants.append(Variant(cut, flipped, _name(sample, fact, mask, cut, flipped)))
        examples.append(CachedExample(sample, fact.sha256, mask, tuple(variants), store))
    return examples


def place_in_buckets(samples: Sequence[Sample], facts: Sequence[PictureFacts], resolution: int) -> list[Bucket]:
    """Return the bucket of each sample."""
    groups: dict[tuple[int, BucketsSection], list[int]] = defaultdict(list)
    buckets: dict[int, Bucket] = {}
    rules = {
        concept: (concept.settings.resolution or resolution, concept.settings.buckets)
        for concept in {sample.concept for sample in samples}
    }
    for index, sample in enumerate(samples):
        if sample.train_size:
            buckets[index] = sample.train_size
        else:
            groups[rules[sample.concept]].append(index)
    for (side, section), members in groups.items():
        chosen = assign_buckets([facts[index].size for index in members], section, side)
        buckets |= dict(zip(members, chosen, strict=True))
    return [buckets[index] for index in range(len(samples))]


def order_samples(samples: Sequence[Sample], buckets: Sequence[Bucket], config: TrainConfig) -> BatchOrder:
    """Return the order in which samples in these buckets are trained on. Raises DataError when there is no batch."""
    concepts = {concept: number for number, concept in enumerate(dict.fromkeys(sample.concept for sample in samples))}
    placed = []
    for sample, bucket in zip(samples, buckets, strict=True):
        settings = sample.concept.settings
        batch_size = settings.batch_size or config.training.batch_size
        placed.append(Placed(bucket, batch_size, settings.repeats, concepts[sample.concept], sample.prior))
    data = config.data
    return BatchOrder(
        placed, config.training.seed, prior_ratio=data.prior.ratio, short_batches=data.buckets.short_batches
    )


def _name(sample: Sample, facts: PictureFacts, mask: str, cut: PictureSize, flipped: bool) -> str:
    """Return the name of a variant's latents: equal for equal pixels, masks and cuts, whatever the file is called."""
    settings = sample.concept.settings
    opacity = settings.masks.source == "alpha"
    parts = (facts.sha256, mask, opacity, settings.background, cut, flipped)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

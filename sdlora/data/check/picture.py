"""A picture under check: its sample, what a look at its file showed, and how it will be cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdlora.data.buckets import Bucket, crop_of, cropped_share
from sdlora.data.check.looking import Look
from sdlora.data.sample import Sample
from sdlora.families.base import PictureSize

Part = Literal["training", "prior", "validation"]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of the data set, with all that the check knows of it."""

    sample: Sample
    part: Part
    look: Look
    bucket: Bucket | None
    """Width and height that it is cut to; None where it cannot be read."""
    texts: tuple[str, ...]
    """The different texts that it is trained with, the plain caption first."""

    @property
    def name(self) -> str:
        """Its file, for people."""
        return str(self.sample.path)

    @property
    def cuts(self) -> list[PictureSize]:
        """How it is cut: once around the centre, or at several places."""
        if self.look.header is None or self.bucket is None:
            return []
        crops = self.sample.concept.settings.crops
        return [crop_of(*self.look.header.size, self.bucket, crop, crops, self.look.sha256) for crop in range(crops)]

    @property
    def cropped(self) -> float:
        """The share of its area that one crop leaves out."""
        if self.look.header is None or self.bucket is None:
            return 0.0
        return cropped_share(*self.look.header.size, self.bucket)

    @property
    def enlarged(self) -> float:
        """By how much its sides grow when it is scaled to cover its shape; below 1 they shrink."""
        if self.look.header is None or self.bucket is None:
            return 0.0
        width, height = self.look.header.size
        return max(self.bucket[0] / width, self.bucket[1] / height)

"""What a check of the data can find: its kinds, how grave each is, and what helps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Kind:
    """One kind of finding. An error is what a training run would refuse; a note is only good to know."""

    name: str
    severity: Severity
    title: str
    """What is found, in the plural: "pictures that cannot be read"."""
    advice: str
    """What helps, or what it means; one sentence without the full stop."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    kind: Kind
    text: str
    """A sentence that begins with the file it is about."""
    pictures: tuple[int, ...] = ()
    """The pictures it is about, by their number in the report; none where the file did not become one."""


UNUSABLE = Kind(
    "unusable", "error", "files that cannot be used as they are", "training refuses the data until they are mended"
)
UNREADABLE = Kind(
    "unreadable", "error", "pictures that cannot be read", "training refuses the data until they are gone"
)
MASK_UNFIT = Kind("mask-unfit", "error", "masks that cannot be used", "a mask has the shape of its picture")
LEAK = Kind(
    "leak",
    "error",
    "pictures that are trained on and validated on",
    "training refuses it, since the held-out loss would say nothing; remove one of the two",
)
NO_BATCH = Kind("no-batch", "error", "settings that leave nothing to train on", "change the setting")

NEAR_LEAK = Kind(
    "near-leak",
    "warning",
    "pictures nearly alike in training and validation",
    "the held-out loss looks better than it is; remove one of the two",
)
PRIOR_COPY = Kind(
    "prior-copy",
    "warning",
    "pictures that are both learnt and held to what the base knows",
    "the two pull against each other; remove one of them",
)
DUPLICATE = Kind(
    "duplicate",
    "warning",
    "pictures that are there several times",
    "each counts that often; keep one, or set data.repeats where that is meant",
)
NEAR_DUPLICATE = Kind(
    "near-duplicate",
    "warning",
    "pictures that are nearly the same",
    "resized, cropped, brightened or mirrored copies count as often as they are there; keep the best",
)
ENLARGED = Kind(
    "enlarged",
    "warning",
    "pictures smaller than their shape",
    "enlarging adds blur that is learnt too; find larger ones, lower data.resolution, or set data.buckets.upscale = false",
)
CROPPED = Kind(
    "cropped",
    "warning",
    "pictures of which much is cropped away",
    "crop them by hand, or allow longer shapes with data.buckets.min_side and max_side",
)
ANIMATED = Kind("animated", "warning", "pictures with several frames", "only the first frame is trained on")
PROFILE_UNREADABLE = Kind(
    "profile-unreadable",
    "warning",
    "pictures with a damaged colour profile",
    "they are taken for sRGB; look whether their colours are right",
)
MASK_MISSING = Kind(
    "mask-missing", "warning", "pictures without a mask, though others have one", "all of these is learnt"
)
MASK_BLACK = Kind(
    "mask-black", "warning", "masks that are black all over", "nothing of these counts fully; white is what is learnt"
)
CAPTION_EMPTY = Kind(
    "caption-empty", "warning", "pictures with an empty caption", "they are trained as if there were no prompt"
)
CAPTION_CUT = Kind(
    "caption-cut",
    "warning",
    "captions longer than the text encoder sees",
    "what is lost is not learnt; shorten them, the important first",
)
TRIGGER_MISSING = Kind(
    "trigger-missing",
    "warning",
    "captions without the trigger",
    'what these show is not bound to it; write it, or "[trigger]", or set data.captions.insert_trigger',
)
TRIGGER_SPLIT = Kind(
    "trigger-split",
    "warning",
    "captions where the trigger is part of another word",
    "the text encoder sees other tokens there; put the trigger apart",
)
TRIGGER_KNOWN = Kind(
    "trigger-known",
    "warning",
    "triggers that are a common word",
    "what the base knows by it mixes with what is learnt; invent a word",
)
BRACES_UNBALANCED = Kind(
    "braces-unbalanced",
    "warning",
    "captions with a brace that is never closed or opened",
    'it stays in the text; write "{{" or "}}" where a brace is meant',
)
BRACES_PLAIN = Kind(
    "braces-plain",
    "warning",
    "captions with {a|b} that stays as it is",
    "set data.captions.wildcards, which draws one of the choices",
)

CAPTION_REPEATED = Kind(
    "caption-repeated",
    "note",
    "captions shared by several pictures",
    "what these have in common goes to the words of the caption, and what differs cannot be called",
)
TURNED = Kind("turned", "note", "pictures turned upright as their EXIF says", "other programs may train them lying")
TRANSPARENT = Kind("transparent", "note", "pictures with transparent parts", "data.background is laid behind these")
CONVERTED = Kind("converted", "note", "pictures that are not stored as 8-bit RGB", "they are converted")
PROFILE = Kind("profile", "note", "pictures with another colour profile than sRGB", "their colours are converted")

KINDS: tuple[Kind, ...] = (
    UNREADABLE,
    UNUSABLE,
    MASK_UNFIT,
    LEAK,
    NO_BATCH,
    NEAR_LEAK,
    PRIOR_COPY,
    DUPLICATE,
    NEAR_DUPLICATE,
    ENLARGED,
    CROPPED,
    ANIMATED,
    PROFILE_UNREADABLE,
    MASK_MISSING,
    MASK_BLACK,
    CAPTION_EMPTY,
    CAPTION_CUT,
    TRIGGER_MISSING,
    TRIGGER_SPLIT,
    TRIGGER_KNOWN,
    BRACES_UNBALANCED,
    BRACES_PLAIN,
    CAPTION_REPEATED,
    TURNED,
    TRANSPARENT,
    CONVERTED,
    PROFILE,
)
"""All kinds, the gravest first."""

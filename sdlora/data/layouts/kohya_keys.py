"""The keys of a dataset config of kohya's trainer: where each may stand, its values, what they come to.

The list is that of library/config_util.py in kohya-ss/sd-scripts: of its DreamBooth, fine-tuning and
ControlNet subsets together, with skip_image_resolution of its later versions.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sdlora.config import ConceptSection
from sdlora.data.layouts.kohya_folders import PRIOR_NOTE
from sdlora.data.layouts.listing import prior_settings

GENERAL, DATASET, SUBSET = "[general]", "[[datasets]]", "[[datasets.subsets]]"
_ANYWHERE = (GENERAL, DATASET, SUBSET)
_OUTSIDE = (GENERAL, DATASET)
_INSIDE = (SUBSET,)


class _Kind(NamedTuple):
    expected: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 1 << 31


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_whole(side, 1) for side in value)


_YES_NO = _Kind("true or false", lambda value: isinstance(value, bool))
_COUNT = _Kind("a whole number from 0", lambda value: _is_whole(value, 0))
_POSITIVE = _Kind("a whole number from 1", lambda value: _is_whole(value, 1))
_STEP = _Kind("a multiple of 8", lambda value: _is_whole(value, 1) and value % 8 == 0)
_SHARE = _Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_SIZE = _Kind("a whole number, or [width, height]", lambda value: _is_whole(value, 1) or _is_pair(value))
_TEXT = _Kind("a text in quotes", lambda value: isinstance(value, str))
_FILLED = _Kind("a text in quotes that is not empty", lambda value: isinstance(value, str) and value != "")
_ENDING = _Kind('an ending such as ".txt"', lambda value: isinstance(value, str) and bool(re.fullmatch(_SUFFIX, value)))
_NUMBER = _Kind("a number", _is_number)
_ANY = _Kind("", lambda value: True)
_ATTRIBUTES = _Kind("a table of true and false", lambda value: isinstance(value, dict))
_RANDOM_CROPS = 8
_MIN_SIDE, _MAX_SIDE, _BUCKET_STEP = 256, 1024, 64
"""Bounds and step of buckets where a file does not name them, in pixels."""
_SUFFIX = r"\.?[^./\\\0][^/\\\0]{0,40}"


@dataclass(frozen=True)
class _Key:
    kind: _Kind
    tables: tuple[str, ...]
    setting: str = ""
    """The setting that takes the value as it is; where empty, it is worked in elsewhere."""
    refusal: str = ""
    """Why only `harmless` values are accepted."""
    harmless: tuple[Any, ...] = ()


KEYS = {
    "resolution": _Key(_SIZE, _OUTSIDE),
    "batch_size": _Key(_POSITIVE, _OUTSIDE, "batch_size"),
    "enable_bucket": _Key(_YES_NO, _OUTSIDE),
    "min_bucket_reso": _Key(_POSITIVE, _OUTSIDE),
    "max_bucket_reso": _Key(_POSITIVE, _OUTSIDE),
    "bucket_reso_steps": _Key(_STEP, _OUTSIDE),
    "bucket_no_upscale": _Key(_YES_NO, _OUTSIDE),
    "skip_image_resolution": _Key(_SIZE, _OUTSIDE),
    "validation_split": _Key(_SHARE, _ANYWHERE, "held_out"),
    "validation_seed": _Key(_COUNT, _ANYWHERE),
    "image_dir": _Key(_FILLED, _INSIDE),
    "metadata_file": _Key(_FILLED, _INSIDE),
    "conditioning_data_dir": _Key(_FILLED, _INSIDE),
    "alpha_mask": _Key(_YES_NO, _INSIDE),
    "is_reg": _Key(_YES_NO, _INSIDE),
    "custom_attributes": _Key(_ATTRIBUTES, _ANYWHERE),
    "num_repeats": _Key(_COUNT, _ANYWHERE, "repeats"),
    "class_tokens": _Key(_TEXT, _ANYWHERE, "caption"),
    "caption_extension": _Key(_ENDING, _ANYWHERE),
    "cache_info": _Key(_YES_NO, _ANYWHERE),
    "flip_aug": _Key(_YES_NO, _ANYWHERE, "flip"),
    "random_crop": _Key(_YES_NO, _ANYWHERE),
    "caption_prefix": _Key(_TEXT, _ANYWHERE, "captions.prefix"),
    "caption_suffix": _Key(_TEXT, _ANYWHERE, "captions.suffix"),
    "caption_dropout_rate": _Key(_SHARE, _ANYWHERE, "captions.dropout"),
    "caption_dropout_every_n_epochs": _Key(_COUNT, _ANYWHERE, "captions.dropout_every_epochs"),
    "enable_wildcard": _Key(_YES_NO, _ANYWHERE),
    "caption_separator": _Key(_FILLED, _ANYWHERE, "captions.separator"),
    "keep_tokens": _Key(_COUNT, _ANYWHERE, "captions.keep_tags"),
    "keep_tokens_separator": _Key(_TEXT, _ANYWHERE, "captions.keep_separator"),
    "shuffle_caption": _Key(_YES_NO, _ANYWHERE, "captions.shuffle"),
    "caption_tag_dropout_rate": _Key(_SHARE, _ANYWHERE, "captions.tag_dropout"),
    "secondary_separator": _Key(_TEXT, _ANYWHERE, "captions.secondary_separator"),
    "color_aug": _Key(
        _YES_NO, _ANYWHERE, refusal="pictures are encoded once, so that colours cannot change", harmless=(False,)
    ),
    "face_crop_aug_range": _Key(_ANY, _ANYWHERE, refusal="crops are not made around faces"),
    "token_warmup_step": _Key(_NUMBER, _ANYWHERE, refusal="all tags are trained from the start", harmless=(0,)),
    "token_warmup_min": _Key(_NUMBER, _ANYWHERE, refusal="all tags are trained from the start", harmless=(1,)),
    "resize_interpolation": _Key(
        _TEXT, _ANYWHERE, refusal='pictures are resized as "lanczos" does', harmless=("lanczos",)
    ),
    "network_multiplier": _Key(_NUMBER, _OUTSIDE, refusal="an adapter is trained at full strength", harmless=(1,)),
}


class Written(NamedTuple):
    """A value, and the table of the file where it stands, for messages."""

    value: Any
    table: str


Keys = Mapping[str, Written]
"""The keys that hold in one place of a file, all with values of their kind."""


@dataclass(frozen=True)
class Meaning:
    """What the keys of one subset come to."""

    settings: ConceptSection
    prior: bool
    """Whether the pictures are for prior preservation."""
    size: tuple[int, int] | None
    """Width and height of all, where they are cropped to one shape that is no square."""
    faults: Sequence[str]
    notes: Sequence[str]


def check_table(table: Mapping[str, Any], kind: str, name: str, inner: str, faults: list[str]) -> dict[str, Written]:
    """Return the keys of one table whose values can be used; every other one is a sentence more in `faults`.

    `kind` is GENERAL, DATASET or SUBSET, `name` what the table is called in messages, `inner` the key of
    the tables that it holds.
    """
    usable = {}
    for key, value in table.items():
        if key == inner:
            continue
        known = KEYS.get(key)
        if known is None:
            faults.append(f"{name}: unknown key {key}{_nearest(key)}")
        elif kind not in known.tables:
            faults.append(f"{name}: {key} does not belong there; move it to {' or '.join(known.tables)}")
        elif not known.kind.fits(value):
            faults.append(f"{name}: {key} is {shown(value)}; expected {known.kind.expected}")
        else:
            usable[key] = Written(value, name)
    return usable


def _refusals(keys: Keys) -> Iterator[str]:
    """Yield a sentence for each value that asks for what cannot be done."""
    for key, (value, table) in keys.items():
        known = KEYS[key]
        if known.refusal and value not in known.harmless:
            instead = f" or set it to {shown(known.harmless[0])}" if known.harmless else ""
            yield f"{table}: {key} is {shown(value)}, which is not supported, as {known.refusal}; remove it{instead}"


def meaning_of(keys: Keys, own: ConceptSection) -> Meaning:
    """Return what the keys of a subset make of the settings `own`, and what is to be said about it.

    Paths, skip_image_resolution and num_repeats = 0 are left to who has the files.
    """
    faults = [*_refusals(keys), *_wrong_attributes(keys)]
    notes: list[str] = []
    is_reg = value_of(keys, "is_reg", False)
    prior = is_reg or value_of(keys, "custom_attributes", {}).get("diff_output_preservation") is True
    if is_reg:
        notes.append(PRIOR_NOTE)
    base = prior_settings(own) if prior else own
    shape, size = _shape(keys, base, faults, notes)
    changes = {known.setting: keys[key].value for key, known in KEYS.items() if known.setting and key in keys}
    changes |= shape | _captions(keys, base, notes) | _cuts_and_masks(keys, base, notes)
    if prior:
        changes["held_out"] = 0.0  # kohya's trainer never splits regularisation pictures
    elif "validation_seed" in keys and changes.get("held_out", own.held_out):
        seed = keys["validation_seed"]
        faults.append(
            f"{seed.table}: validation_seed is {seed.value}, but which pictures are held out depends on their "
            "names alone; remove it"
        )
    if value_of(keys, "cache_info", False):
        notes.append("cache_info is not needed: captions and sizes are read anew by each run")
    return Meaning(_changed(base, changes), prior, size, faults, notes)


def value_of(keys: Keys, key: str, default: Any) -> Any:
    """Return the value of `key`, or `default` where it is not set."""
    return keys[key].value if key in keys else default


def sides_of(value: Any) -> tuple[int, int]:
    """Return width and height of a resolution."""
    return (value[0], value[1]) if isinstance(value, list) else (value, value)


def shown(value: Any) -> str:
    """Return the value as it is written in the file, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError:  # a date
        text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "; it is none of kohya's trainer"


def _wrong_attributes(keys: Keys) -> Iterator[str]:
    for key, value in value_of(keys, "custom_attributes", {}).items():
        if key != "diff_output_preservation" or not isinstance(value, bool):
            table = keys["custom_attributes"].table
            yield (
                f"{table}: custom_attributes.{key} is {shown(value)}; expected only diff_output_preservation, "
                "true or false"
            )


def _captions(keys: Keys, base: ConceptSection, notes: list[str]) -> dict[str, Any]:
    """Return which caption files and which of their lines are taken."""
    changes: dict[str, Any] = {}
    if "caption_extension" in keys:
        changes["caption_suffixes"] = (f".{keys['caption_extension'].value.removeprefix('.')}",)
    elif "metadata_file" not in keys:
        notes.append(
            f"caption_extension is not set; captions are read from {' or '.join(base.caption_suffixes)} files, "
            "where kohya's trainer takes .caption unless told otherwise"
        )
    if "enable_wildcard" in keys:
        wildcards = keys["enable_wildcard"].value
        changes |= {"captions.wildcards": wildcards, "captions.lines": "alternatives" if wildcards else "first"}
    elif not base.captions.wildcards:
        changes["captions.lines"] = "first"
    return changes


def _cuts_and_masks(keys: Keys, base: ConceptSection, notes: list[str]) -> dict[str, Any]:
    """Return how many crops there are, and whether opacity is the mask."""
    changes: dict[str, Any] = {}
    if value_of(keys, "random_crop", False):
        changes["crops"] = max(_RANDOM_CROPS, base.crops)
        notes.append(f"random_crop is read as data.crops = {changes['crops']}: so many crops of each picture")
    elif "random_crop" in keys:
        changes["crops"] = 1
    if value_of(keys, "alpha_mask", False):
        changes |= {"masks.source": "alpha", "masks.unmasked_weight": 0.0}
    elif "alpha_mask" in keys and base.masks.source == "alpha":
        changes["masks.source"] = "none"
    return changes


def _shape(
    keys: Keys, base: ConceptSection, faults: list[str], notes: list[str]
) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Return the settings that say how pictures are cut, and the size of all where that is no square."""
    enabled = value_of(keys, "enable_bucket", False)
    changes: dict[str, Any] = {"buckets.enabled": enabled}
    if "enable_bucket" not in keys:
        notes.append("enable_bucket is not set; as in kohya's trainer pictures are cropped to one shape without it")
    width = height = base.resolution
    if "resolution" in keys:
        value, table = keys["resolution"]
        width, height = sides_of(value)
        side = round(math.sqrt(width * height) / 8) * 8
        if side < 8 or (not enabled and (width % 8 or height % 8)):
            faults.append(f"{table}: resolution is {shown(value)}; expected multiples of 8")
            return changes, None
        changes["resolution"] = side
        if enabled and side * side != width * height:
            notes.append(f"{table}: resolution {shown(value)} is read as the area of {side} x {side} pixels")
    if not enabled:
        return changes, (width, height) if width != height else None
    changes |= _bounds(keys, base, (width, height), faults)
    changes["buckets.upscale"] = not value_of(keys, "bucket_no_upscale", not base.buckets.upscale)
    if base.buckets.shapes == "fitted":
        notes.append(
            'buckets are fitted to the pictures; data.buckets.shapes = "classic" gives those of kohya\'s trainer'
        )
    return changes, None


def _bounds(keys: Keys, base: ConceptSection, size: tuple[int, int], faults: list[str]) -> dict[str, int]:
    """Return step and bounds of the buckets: multiples of the step, as kohya's trainer adjusts them."""
    small, large = min(size), max(size)
    rules, usual = base.buckets, small >= _MIN_SIDE  # below, and where the resolution is the base's, ours are left
    step = value_of(keys, "bucket_reso_steps", rules.step or (_BUCKET_STEP if usual else 0))
    low = value_of(keys, "min_bucket_reso", rules.min_side or (_MIN_SIDE if usual else 0))
    high = value_of(keys, "max_bucket_reso", rules.max_side or (_MAX_SIDE if usual and large <= _MAX_SIDE else 0))
    grain = step or 8
    low, high = max(grain, low // grain * grain) if low else 0, math.ceil(high / grain) * grain
    if small and low > small:
        where = _where(keys, "min_bucket_reso", "data.buckets.min_side")
        faults.append(f"{where} is {low}, more than resolution = {small}; lower it")
    if high and large > high:
        where = _where(keys, "max_bucket_reso", "data.buckets.max_side")
        faults.append(f"{where} is {high}, less than resolution = {large}; raise it")
    return {"buckets.step": step, "buckets.min_side": low, "buckets.max_side": high}


def _where(keys: Keys, key: str, setting: str) -> str:
    """Return what to call a value that is the file's or, where it has none, that of `setting`."""
    return f"{keys[key].table}: {key}" if key in keys else setting


def _changed(settings: ConceptSection, changes: Mapping[str, Any]) -> ConceptSection:
    """Return the settings with {"name" or "table.name": value} in place of theirs."""
    own = {key: value for key, value in changes.items() if "." not in key}
    for name in ("captions", "buckets", "masks"):
        inner = {key.partition(".")[2]: value for key, value in changes.items() if key.startswith(f"{name}.")}
        own[name] = getattr(settings, name).model_copy(update=inner)
    return settings.model_copy(update=own)

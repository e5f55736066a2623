"""Aspect-ratio buckets: every picture gets about the same area, and little of it is cropped away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from sdlora.config import BucketsSection
from sdlora.diffusion import seed_from
from sdlora.errors import ConfigError
from sdlora.families.base import PictureSize

Bucket = tuple[int, int]
"""Width and height in pixels."""

_LEAST_AREA = 0.8
"""A fitted shape has at least this share of the resolution's area."""
_CHARGE = 0.1
"""What area is worth: of a shape with one per cent less area, 0.1% less must be cropped away."""
_SHAPE_COST = 0.05
"""A further shape must save so much of one picture at least: each makes a short batch more."""
_MOST_CANDIDATES = 400
"""Beyond so many, which small steps give, only candidates are looked at that are the best for some picture."""
_LISTED = 12
"""How many shapes a description names."""

_Floats = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.int64]


def bucket_step(resolution: int) -> int:
    """Return the step between the sides of classic buckets in pixels: 64, or an eighth of a small resolution."""
    return max(8, min(64, resolution // 8 // 8 * 8))


def fitted_step(resolution: int) -> int:
    """Return the step between the sides of fitted buckets in pixels: 16, or 8 at a small resolution.

    Steps of 64 leave so few shapes that near many aspects there is either much to crop or little area. The
    UNet takes every multiple of 8: where a side cannot be halved on the way down, it is rounded up.
    """
    return max(8, bucket_step(resolution) // 4 // 8 * 8)


def classic_buckets(resolution: int, step: int = 0, min_side: int = 0, max_side: int = 0) -> list[Bucket]:
    """Return the square and, for each width between the limits, the height that keeps the area; and their transposes.

    This is the list of kohya's trainer. 0 stands for `bucket_step`, half and double the resolution. Sides are
    multiples of the step, so the square is smaller than a resolution that is none. Raises ConfigError
    when the limits leave no room for the square.
    """
    step, side, low, high = _limits(resolution, step, min_side, max_side)
    buckets = {(side, side)}
    for width in range(low, high + 1, step):
        height = min(high, resolution * resolution // width // step * step)
        if height >= low:
            buckets |= {(width, height), (height, width)}
    return sorted(buckets)


def fitted_buckets(
    sizes: Sequence[tuple[int, int]],
    resolution: int,
    step: int = 0,
    min_side: int = 0,
    max_side: int = 0,
    count: int = 0,
) -> list[Bucket]:
    """Return the shapes, at most `count`, that crop least on average from pictures of these widths and heights.

    0 stands for `fitted_step`, the limits of `classic_buckets`, and for as many shapes as that has. The result is
    sorted and does not depend on the order of the sizes. Without sizes it is the square. Raises ConfigError as
    `classic_buckets` does.
    """
    classic = classic_buckets(resolution, step, min_side, max_side)
    step, side, low, high = _limits(resolution, step or fitted_step(resolution), min_side, max_side)
    if not sizes:
        return [(side, side)]
    widths, heights = _columns(sizes)
    aspects, numbers = np.unique(widths / heights, return_counts=True)
    candidates = _candidates(resolution, step, low, high, classic)
    own = np.array([width / height for width, height in candidates])
    charges = _CHARGE * (1 - np.array([width * height for width, height in candidates]) / resolution**2)
    if len(candidates) > _MOST_CANDIDATES:
        useful = _useful(aspects, numbers, own, charges)
        candidates, own, charges = [candidates[index] for index in useful], own[useful], charges[useful]
    chosen = _medians(aspects, numbers, own, charges, count or len(classic))
    return sorted(candidates[index] for index in chosen)


def cropped_share(width: int, height: int, bucket: Bucket) -> float:
    """Return the share of a picture's area that is lost when it is scaled to cover the bucket and cropped."""
    across, down = width * bucket[1], height * bucket[0]
    return 1 - min(across, down) / max(across, down)


def assign_buckets(sizes: Sequence[tuple[int, int]], rules: BucketsSection, resolution: int) -> list[Bucket]:
    """Return the bucket of each picture under all the rules; `resolution` is a multiple of 8.

    Without buckets all get the square, enlarged or not. Without upscaling, a picture that would have to be
    enlarged keeps its own size instead, cut to multiples of the step; it is made smaller where it has more
    than the resolution's area or a side beyond the longest, and a side below the step is enlarged to the
    step. Raises ConfigError when the limits leave no room for the square.
    """
    if not rules.enabled:
        return [(resolution, resolution)] * len(sizes)
    limits = (resolution, rules.step, rules.min_side, rules.max_side)
    if rules.shapes == "classic":
        buckets = classic_buckets(*limits)
    else:
        # Pictures of less area would be enlarged in any shape, and keep their own size instead.
        least = 0 if rules.upscale else _LEAST_AREA * resolution**2
        buckets = fitted_buckets([size for size in sizes if size[0] * size[1] >= least], *limits, rules.count)
    chosen = choose_buckets(sizes, buckets)
    if rules.upscale:
        return chosen
    step = rules.step or (bucket_step if rules.shapes == "classic" else fitted_step)(resolution)
    step, _, _, high = _limits(resolution, step, rules.min_side, rules.max_side)
    return [
        _own_shape(*size, resolution, step, high) if bucket[0] > size[0] or bucket[1] > size[1] else bucket
        for size, bucket in zip(sizes, chosen, strict=True)
    ]


def describe_buckets(sizes: Sequence[tuple[int, int]], buckets: Sequence[Bucket]) -> str:
    """Return a line for people: how many pictures have which shape, and how much of them is cropped away.

    `buckets` holds the shape of each picture: "2 shapes: 576x384 x12, 384x576 x3; 1.3% cropped on average,
    at most 8.0%".
    """
    if not sizes:
        return "no pictures"
    found = sorted(Counter(buckets).items(), key=lambda item: (-item[1], item[0]))
    named = [f"{width}x{height} x{number}" for (width, height), number in found[:_LISTED]]
    if len(found) > _LISTED:
        named.append(f"{len(found) - _LISTED} more x{sum(number for _, number in found[_LISTED:])}")
    cropped = [cropped_share(*size, bucket) for size, bucket in zip(sizes, buckets, strict=True)]
    return (
        f"{len(found)} shape{'s' * (len(found) > 1)}: {', '.join(named)}; "
        f"{sum(cropped) / len(cropped):.1%} cropped on average, at most {max(cropped):.1%}"
    )


def crop_of(width: int, height: int, bucket: Bucket, crop: int = 0, crops: int = 1, seed: int | str = 0) -> PictureSize:
    """Return how a picture of `width` x `height` is cut to fill the bucket, scaled to cover it.

    The only crop is around the centre. Of several, number `crop` lies at a place in its own part of the
    free range, which is a fixed function of `seed`; where nothing is free they are all alike.
    """
    assert 0 <= crop < crops, (crop, crops)
    original, target = (height, width), (bucket[1], bucket[0])
    scaled = _scaled(original, target)
    free = (scaled[0] - target[0], scaled[1] - target[1])
    if crops == 1:
        return PictureSize(original, (free[0] // 2, free[1] // 2), target)
    chance = [seed_from(seed, "crop", crop, axis) / 2**63 for axis in ("top", "left")]
    top, left = (int((crop + part) / crops * (room + 1)) for part, room in zip(chance, free, strict=True))
    return PictureSize(original, (min(top, free[0]), min(left, free[1])), target)


def mirrored(size: PictureSize) -> PictureSize:
    """Return where the crop lies in the mirrored picture."""
    top, left = size.crop_top_left
    _, scaled_width = _scaled(size.original, size.target)
    return PictureSize(size.original, (top, scaled_width - left - size.target[1]), size.target)


def fit_picture(picture: Image.Image, size: PictureSize) -> torch.Tensor:
    """Return the pixels of the crop, [3,H,W] float32 in [-1,1].

    The picture may have been decoded smaller than `size.original`: the crop is the same part of it.
    """
    height, width = size.target
    cropped = picture.resize((width, height), Image.Resampling.LANCZOS, box=_kept(picture, size))
    pixels = torch.from_numpy(np.asarray(cropped, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    return pixels.contiguous()


def cut_mask(mask: Image.Image, size: PictureSize, factor: int = 8) -> torch.Tensor:
    """Return the mean of a grey mask in each `factor` x `factor` square of the crop, [1,H/factor,W/factor] in [0,1]."""
    height, width = size.target
    small = mask.resize((width // factor, height // factor), Image.Resampling.BOX, box=_kept(mask, size))
    return torch.from_numpy(np.asarray(small, dtype=np.float32))[None] / 255


def _scaled(original: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of the picture when it just covers the target."""
    scale = max(target[1] / original[1], target[0] / original[0])
    return max(target[0], round(original[0] * scale)), max(target[1], round(original[1] * scale))


def scaled_size(size: PictureSize) -> tuple[int, int]:
    """Return width and height of the whole picture when it just covers its bucket."""
    height, width = _scaled(size.original, size.target)
    return width, height


def _kept(picture: Image.Image, size: PictureSize) -> tuple[float, float, float, float]:
    """Return the box of the crop in the picture as it is."""
    # Only what is kept is scaled: of a long thin picture the rest could fill the memory.
    (height, width), (top, left) = size.target, size.crop_top_left
    scaled = _scaled(size.original, size.target)
    across, down = picture.width / scaled[1], picture.height / scaled[0]
    right, bottom = min(picture.width, (left + width) * across), min(picture.height, (top + height) * down)
    return left * across, top * down, right, bottom


def _limits(resolution: int, step: int, min_side: int, max_side: int) -> tuple[int, int, int, int]:
    """Return the step, and the sides of the square, the shortest and the longest in multiples of it."""
    step = step or bucket_step(resolution)
    side = resolution // step * step
    low = -(-min_side // step) * step if min_side else max(step, resolution // 2 // step * step)
    high = (max_side or 2 * resolution) // step * step
    if not low <= side <= high:
        raise ConfigError(
            f"data.buckets: in steps of {step} from min_side = {low} to max_side = {high} pixels there is no square "
            f"for the resolution {resolution}; change step, min_side or max_side"
        )
    return step, side, low, high


def _columns(sizes: Sequence[tuple[int, int]]) -> tuple[_Integers, _Integers]:
    widths, heights = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    return widths, heights


def choose_buckets(sizes: Sequence[tuple[int, int]], buckets: Sequence[Bucket]) -> list[Bucket]:
    """Return for each picture the bucket that keeps most of it; of equals the larger, then the narrower."""
    widths, heights = _columns(sizes)
    ordered = sorted(buckets, key=lambda bucket: (-bucket[0] * bucket[1], bucket))
    most, chosen = np.zeros(len(sizes)), np.zeros(len(sizes), dtype=np.int64)
    for index, bucket in enumerate(ordered):
        across, down = widths * bucket[1], heights * bucket[0]
        kept = np.minimum(across, down) / np.maximum(across, down)
        better = kept > most  # of equals the first stays, and equal ratios of integers are equal floats
        most[better], chosen[better] = kept[better], index
    return [ordered[index] for index in chosen.tolist()]


def _own_shape(width: int, height: int, resolution: int, step: int, high: int) -> Bucket:
    """Return the picture's own shape in multiples of the step, no side longer than `high`, no more than the area."""
    area = resolution**2
    scale = min(1.0, (area / (width * height)) ** 0.5, high / max(width, height))
    # A side that is a whole number of steps must not be rounded off below it.
    across, down = (max(step, int(side * scale + 1e-6) // step * step) for side in (width, height))
    if across >= down:  # the other side may have been raised to the step
        return min(across, area // down // step * step), down
    return across, min(down, area // across // step * step)


def _candidates(resolution: int, step: int, low: int, high: int, classic: Sequence[Bucket]) -> list[Bucket]:
    """Return the shapes of nearly the full area and the classic ones, by rising aspect; of one aspect the largest."""
    sides = np.arange(low, high + 1, step)
    areas = sides[:, None] * sides[None, :]
    fitting = np.argwhere((areas <= resolution**2) & (areas >= _LEAST_AREA * resolution**2))
    shapes = {(int(sides[across]), int(sides[down])) for across, down in fitting} | set(classic)
    largest = {width / height: (width, height) for width, height in sorted(shapes)}
    return [largest[aspect] for aspect in sorted(largest)]


def _useful(aspects: _Floats, numbers: _Integers, own: _Floats, charges: _Floats) -> _Integers:
    """Return the indices of candidates that are the best for some picture, of many pictures for a spread of them."""
    ranks = np.linspace(0, numbers.sum() - 1, _MOST_CANDIDATES).astype(np.int64)
    spread = np.unique(aspects[np.searchsorted(np.cumsum(numbers), ranks, side="right")])
    kept = np.minimum(spread[:, None] / own, own / spread[:, None])
    return np.unique(np.argmin(1 - kept + charges, axis=1))


def _medians(aspects: _Floats, numbers: _Integers, own: _Floats, charges: _Floats, count: int) -> list[int]:
    """Return which candidates to take, at most `count`, for the least cropped in all, charges and shapes' costs added.

    Aspects of pictures and candidates rise. Of a chosen set, a picture takes one of its two neighbours, the one
    on its side of their geometric mean; so the cost of a set is a sum over neighbours, and the best sets
    of 1, 2, 3, ... are found one from the other.
    """
    sums = [np.concatenate([[0.0], np.cumsum(numbers * part)]) for part in (1.0, aspects, 1 / aspects)]

    def wider(first: _Integers, last: _Integers, own: _Floats, charges: _Floats) -> _Floats:
        """Return the cost of pictures first..last, wider than their candidate: 1 - own / aspect each, and charge."""
        return (1 + charges) * (sums[0][last] - sums[0][first]) - own * (sums[2][last] - sums[2][first])

    def narrower(first: _Integers, last: _Integers, own: _Floats, charges: _Floats) -> _Floats:
        """Return the cost of pictures first..last, narrower: 1 - aspect / own each, and charge."""
        return (1 + charges) * (sums[0][last] - sums[0][first]) - (sums[1][last] - sums[1][first]) / own

    at = np.searchsorted(aspects, own, side="right")
    middle = np.searchsorted(aspects, np.sqrt(own[:, None] * own), side="right").clip(at[:, None], at)
    between = wider(at[:, None], middle, own[:, None], charges[:, None]) + narrower(middle, at, own, charges)
    between[np.tril_indices(len(own))] = np.inf
    after = wider(at, np.full_like(at, len(aspects)), own, charges)
    cost = narrower(np.zeros_like(at), at, own, charges)
    totals, ends, before = [], [], []
    for number in range(1, min(count, len(own)) + 1):
        totals.append((cost + after).min() + number * _SHAPE_COST)
        ends.append(int((cost + after).argmin()))
        steps = cost[:, None] + between
        before.append(steps.argmin(axis=0))
        cost = steps.min(axis=0)
    best = int(np.argmin(totals))
    chosen = [ends[best]]
    for previous in reversed(before[:best]):
        chosen.append(int(previous[chosen[-1]]))
    return chosen

"""Encodes pictures and captions once, so that a training step pays for neither."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from sdlora.data.buckets import Bucket, FittedPicture, choose_bucket, fit_picture, make_buckets
from sdlora.data.source import Sample, read_picture
from sdlora.errors import DataError
from sdlora.families.base import Conditioning, LoadedBase, PictureSize

_DECODE_THREADS = 2
_DECODE_AHEAD = 16
_PIXELS_AT_ONCE = 4 * 512 * 512


@dataclass(frozen=True)
class CachedExample:
    """A picture as the trainer sees it: the VAE's posterior, not a draw from it.

    `mean` and `std` are [V,4,h,w] float32; V is 2 with the mirrored picture second, else 1.
    """

    sample: Sample
    mean: torch.Tensor
    std: torch.Tensor
    size: PictureSize

    @property
    def bucket(self) -> Bucket:
        """Width and height in pixels."""
        height, width = self.size.target
        return width, height


def encode_pictures(
    base: LoadedBase,
    samples: Sequence[Sample],
    resolution: int,
    *,
    buckets: bool = True,
    flip: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[CachedExample]:
    """Return the examples in the order of `samples`; pictures of one size are encoded together.

    Raises DataError for an unreadable picture and when the VAE gives non-finite latents.
    """
    shapes = make_buckets(resolution) if buckets else [(resolution, resolution)]

    def fit(sample: Sample) -> FittedPicture:
        picture = read_picture(sample.path)
        return fit_picture(picture, choose_bucket(picture.width, picture.height, shapes))

    examples: dict[int, CachedExample] = {}
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        parts = (samples[start : start + _DECODE_AHEAD] for start in range(0, len(samples), _DECODE_AHEAD))
        fitted = enumerate(picture for part in parts for picture in pool.map(fit, part))
        for group in _groups_of_one_size(fitted):
            pixels = torch.stack([picture.pixels for _, picture in group])
            mean, std = _encode(base, pixels, flip)
            for row, (index, picture) in enumerate(group):
                sample = samples[index]
                if not (mean[row].isfinite().all() and std[row].isfinite().all()):
                    raise DataError(
                        f"{sample.path}: the VAE gives non-finite latents for this picture in {base.dtype}; "
                        "set base.precision to fp32 or bf16"
                    )
                examples[index] = CachedExample(sample, mean[row].clone(), std[row].clone(), picture.size)
            if on_progress:
                on_progress(len(examples), len(samples))
    return [examples[index] for index in range(len(samples))]


def encode_captions(base: LoadedBase, captions: Iterable[str], batch_size: int = 16) -> dict[str | None, Conditioning]:
    """Return {caption: its conditioning, one row, on the CPU} for all captions, and under None that of no prompt."""
    unique: list[str | None] = [None, *sorted(set(captions))]
    rows: dict[str | None, Conditioning] = {}
    with torch.no_grad():
        for start in range(0, len(unique), batch_size):
            part = unique[start : start + batch_size]
            encoded = base.family.encode_prompts(base, part).to(torch.device("cpu"))
            rows |= {caption: encoded.rows([index]) for index, caption in enumerate(part)}
    return rows


def _encode(base: LoadedBase, pixels: torch.Tensor, flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and std on the CPU, each [B,V,4,h,w]."""
    variants = [pixels, pixels.flip(-1)] if flip else [pixels]
    encoded = [base.family.encode_images(base, variant) for variant in variants]
    mean = torch.stack([mean.cpu() for mean, _ in encoded], dim=1)
    std = torch.stack([std.cpu() for _, std in encoded], dim=1)
    return mean, std


def _groups_of_one_size(
    fitted: Iterable[tuple[int, FittedPicture]],
) -> Iterator[list[tuple[int, FittedPicture]]]:
    waiting: dict[tuple[int, ...], list[tuple[int, FittedPicture]]] = {}
    for item in fitted:
        shape = tuple(item[1].pixels.shape)
        group = waiting.setdefault(shape, [])
        group.append(item)
        if len(group) * shape[1] * shape[2] >= _PIXELS_AT_ONCE or len(group) >= 16:
            yield waiting.pop(shape)
    yield from waiting.values()

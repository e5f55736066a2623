"""Encodes pictures once, for all runs and all processes: what the store already has is not encoded again."""

from __future__ import annotations

import hashlib
import io
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from sdlora.data import Progress
from sdlora.data.buckets import cut_mask, fit_picture, scaled_size
from sdlora.data.cache_folder import store_folder
from sdlora.data.examples import CachedExample, Variant
from sdlora.data.headers import read_header
from sdlora.data.pictures import read_mask, read_picture_and_opacity
from sdlora.data.sample import Sample
from sdlora.data.source import raise_problems
from sdlora.data.store import ALONE, ShardWriter, TensorStore, Together
from sdlora.errors import DataError
from sdlora.families.base import LoadedBase, module_sha256

_DECODE_THREADS = 2
_PIXELS_AHEAD = 16 * 512 * 512
"""So many may be decoded ahead of the encoder, with all crops and mirrored ones."""
_PIXELS_AT_ONCE = 4 * 512 * 512
_PIXELS_AT_ONCE_ON_CPU = 512 * 512
"""There larger batches take more memory and no less time."""
_PICTURES_AT_ONCE = 16
_ENCODER_VERSION = 1
"""Raised when the same picture would be encoded to other latents."""


@dataclass(frozen=True)
class EncodingReport:
    """What encoding took: pictures encoded now and found in the store, and where the time went."""

    encoded: int = 0
    reused: int = 0
    seconds: float = 0.0
    seconds_waiting: float = 0.0
    """For pictures to be decoded, which happens in other threads meanwhile."""

    def sentence(self) -> str:
        """Return a line for the start of a run."""
        if not self.encoded:
            return f"{self.reused} pictures encoded before, in the cache"
        waiting = self.seconds_waiting / self.seconds if self.seconds else 0.0
        text = f"{self.encoded} pictures encoded in {self.seconds:.1f} s, {waiting:.0%} of it waiting for files"
        return text + (f"; {self.reused} were in the cache" if self.reused else "")


def picture_store(base: LoadedBase, cache: Path) -> TensorStore:
    """Return the store of pictures encoded by this base's VAE in its precision."""
    config = base.vae.config
    parts = (_ENCODER_VERSION, module_sha256(base.vae), base.vae.dtype, config.scaling_factor, config.shift_factor)
    return TensorStore(store_folder(cache, "pictures", parts))


@dataclass(frozen=True)
class _Cut:
    """One variant's pixels [3,H,W] float32 in [-1,1], and its mask [1,h,w]."""

    name: str
    pixels: torch.Tensor
    mask: torch.Tensor | None
    sample: Sample


def encode_pictures(
    base: LoadedBase,
    examples: Sequence[CachedExample],
    *,
    together: Together = ALONE,
    on_progress: Progress | None = None,
) -> EncodingReport:
    """All variants of the examples are in their store; each process encodes its part of what is missing.

    Raises one DataError for all pictures that cannot be read or encoded. What was encoded before that, or
    before an interruption, stays in the store.
    """
    if not examples:
        return EncodingReport()
    started = time.perf_counter()
    store = examples[0].store
    names = {variant.name for example in examples for variant in example.variants}
    there = store.find(names)
    mine = [e for e in together.part(examples) if any(variant.name not in there for variant in e.variants)]
    if not any(example.sample.rows for example in mine):
        mine.sort(key=lambda example: example.bucket)  # few shapes at a time in memory
    decoder = _Decoder(there)
    problems: list[str] = []
    done = 0
    with store.writing() as writer:
        for group in _groups_of_one_size(decoder.cuts(mine, problems), base.device):
            _encode_group(base, group, writer, problems)
            done += len({id(cut.sample) for cut in group})
            if on_progress:
                on_progress(min(done, len(mine)), len(mine))
    raise_problems(problems)
    together.wait()
    store.require(names)
    seconds = time.perf_counter() - started
    return EncodingReport(len(mine), len(together.part(examples)) - len(mine), seconds, decoder.seconds_waiting)


class _Decoder:
    """Reads and cuts pictures in threads, some ahead of the encoder."""

    def __init__(self, there: set[str]) -> None:
        self._there = there
        self.seconds_waiting = 0.0

    def cuts(self, examples: Iterable[CachedExample], problems: list[str]) -> Iterator[_Cut]:
        """Yield what is missing of each example, in order; those that cannot be read are in `problems`."""
        waiting: deque[tuple[Future[list[_Cut]], int]] = deque()
        with ThreadPoolExecutor(_DECODE_THREADS) as pool:
            for example in examples:
                wanted = [variant for variant in example.variants if variant.name not in self._there]
                self._there.update(variant.name for variant in wanted)  # a second file of the same content is not read
                if wanted:
                    try:
                        source = example.sample.source()
                    except DataError as error:  # a row whose picture is missing
                        problems.append(str(error))
                        continue
                    waiting.append((pool.submit(_cut, example, source, wanted), _pixels(wanted)))
                while len(waiting) > 1 and sum(pixels for _, pixels in waiting) > _PIXELS_AHEAD:
                    yield from self._result(waiting.popleft()[0], problems)
            while waiting:
                yield from self._result(waiting.popleft()[0], problems)

    def _result(self, job: Future[list[_Cut]], problems: list[str]) -> list[_Cut]:
        started = time.perf_counter()
        try:
            return job.result()
        except DataError as error:
            problems.append(str(error))
            return []
        finally:
            self.seconds_waiting += time.perf_counter() - started


def _cut(example: CachedExample, source: Path | io.BytesIO, variants: Sequence[Variant]) -> list[_Cut]:
    """Return the pixels and masks of the variants, from one decode. Raises DataError."""
    sample = example.sample
    settings = sample.concept.settings
    file = _unchanged(source, example.identity, sample.path)
    at_least = scaled_size(variants[0].cut)
    picture, opacity = read_picture_and_opacity(file, sample.path, background=settings.background, at_least=at_least)
    mask = opacity if settings.masks.source == "alpha" else None
    if sample.mask is not None:
        mask = read_mask(sample.mask, read_header(file, sample.path), sample.path)
        _unchanged(sample.mask, example.mask_hash, sample.mask)
    cuts = []
    for variant in variants:
        pixels = fit_picture(picture, variant.cut)
        weight = None if mask is None else cut_mask(mask, variant.cut)
        if variant.flipped:
            pixels, weight = pixels.flip(-1), None if weight is None else weight.flip(-1)
        cuts.append(_Cut(variant.name, pixels, weight, sample))
    return cuts


def _unchanged(source: Path | io.BytesIO, sha256: str, name: Path) -> io.BytesIO:
    """Return the file's content, which is still what it was when it was hashed. Raises DataError where it is not.

    Else the latents of one picture would be kept under the name of another.
    """
    try:
        content = source.read_bytes() if isinstance(source, Path) else source.getvalue()
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error}); restore or remove the file") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{name}: was changed while it was being read; start again")
    return io.BytesIO(content)


def _pixels(variants: Sequence[Variant]) -> int:
    return sum(variant.cut.target[0] * variant.cut.target[1] for variant in variants)


def _encode_group(base: LoadedBase, group: Sequence[_Cut], writer: ShardWriter, problems: list[str]) -> None:
    """The latents of cuts of one size are with the writer."""
    mean, std = base.family.encode_images(base, torch.stack([cut.pixels for cut in group]))
    packed = torch.cat([mean, std], dim=1).cpu()
    for cut, row in zip(group, packed, strict=True):
        if row.isfinite().all():
            writer.add(cut.name, row.clone() if cut.mask is None else torch.cat([row, cut.mask]))
        else:
            problems.append(
                f"{cut.sample.path}: the VAE gives non-finite latents for this picture in {base.dtype}; "
                "set base.precision to fp32 or bf16"
            )


def _groups_of_one_size(cuts: Iterable[_Cut], device: torch.device) -> Iterator[list[_Cut]]:
    most = _PIXELS_AT_ONCE_ON_CPU if device.type == "cpu" else _PIXELS_AT_ONCE
    waiting: dict[tuple[int, ...], list[_Cut]] = {}
    for cut in cuts:
        shape = tuple(cut.pixels.shape)
        group = waiting.setdefault(shape, [])
        group.append(cut)
        if (len(group) + 1) * shape[1] * shape[2] > most or len(group) >= _PICTURES_AT_ONCE:
            yield waiting.pop(shape)
    yield from waiting.values()

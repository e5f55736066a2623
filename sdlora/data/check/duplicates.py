"""Finds pictures that show the same: resized, recompressed, slightly cropped, brightened or mirrored copies.

Two steps. Hashes that differ in few bits name candidates, without comparing all with all. Then each
candidate is laid over the other, and what remains different tells copies from pictures of one series.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sdlora.data.check.alignment import correlation_when_aligned

SIDE = 32
"""Side in pixels of the grey picture that is kept of each for comparing."""

# Chosen on 158 photographs of 30 subjects (the DreamBooth data set), several of each, and on copies of them.
# Different photographs have 25 bits or more between them and correlate by 0.89 at most; drawings of one figure in
# one frame, 18 bits and 0.972. Found are all copies resized to 128 pixels, of JPEG quality 20, a third darker or
# without colour; 98 % of those cropped by 2 % on each side, 94 % by 4 %, 99 % by 5 % on one side.
MOST_BITS = 23
"""Hashes of candidates differ in so many of their 128 bits at most."""
LEAST_CORRELATION = 0.975
"""So much do copies correlate at least, once they lie over one another."""
_FLAT = 3.0
"""Standard deviation below which a picture of 256 greys shows nothing to compare."""
_BANDS, _BAND_BITS, _BAND_RADIUS = 8, 16, 2
_LOW = 8
_BLOCK = 4096
_PAIRS_AT_ONCE = 256
_FEW_ROUNDS, _PROMISING = 2, 0.75
"""After so few rounds of placing, copies correlate by 0.8 or more."""
_ROUNDS = 8
_EXPANDED_AT_ONCE = 2_000_000

_Floats = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]
_Greys = npt.NDArray[np.uint8]


def grey_thumbnail(picture: Image.Image) -> bytes:
    """Return the picture squeezed into `SIDE` x `SIDE` grey pixels, row by row."""
    return picture.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0).tobytes()


def groups_of_copies(thumbnails: Sequence[bytes]) -> list[tuple[int, ...]]:
    """Return the groups of pictures that are copies of one another, as rising indices, the first members rising.

    Copies of copies are in one group. Pictures of a single colour are in none.
    """
    greys = np.frombuffer(b"".join(thumbnails), dtype=np.uint8).reshape(-1, SIDE, SIDE)
    varied = np.flatnonzero(_in_blocks(lambda block: block.std(axis=(1, 2)), greys) >= _FLAT)
    if len(varied) < 2:
        return []
    greys = greys[varied]
    mirrored = greys[:, :, ::-1]
    hashes, mirrored_hashes = _in_blocks(hash_greys, greys), _in_blocks(hash_greys, mirrored)
    _, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    links = _Links(len(greys))
    links.link_alike(greys, greys, np.stack([first[inverse.reshape(-1)], np.arange(len(greys))], axis=1))
    # From here on one picture stands for all of equal hash: a thousand copies would be half a million pairs.
    links.link_alike(greys, greys, first[near_pairs(hashes[first], hashes[first])])
    links.link_alike(greys, mirrored, first[near_pairs(hashes[first], mirrored_hashes[first])])
    return [tuple(int(varied[member]) for member in group) for group in links.groups()]


def _in_blocks(function: Callable[[_Greys], Any], greys: _Greys) -> Any:
    """Return what `function` gives, an entry a picture, without all pictures as floating-point numbers at once."""
    return np.concatenate([function(block) for block in np.array_split(greys, len(greys) // _BLOCK + 1)])


def hash_greys(greys: _Greys) -> _Words:
    """Return 128 bits for each of the thumbnails [n,32,32], as [n,2] uint64.

    The first 64 say which of the lowest frequencies are above their median (pHash); the others whether it gets
    brighter from one place to the next, half of them rightwards, half downwards (dHash).
    """
    values = greys.astype(np.float64)
    frequencies = (_COSINES @ values @ _COSINES.T).reshape(len(greys), -1)[:, 1:]
    coarse = np.concatenate([frequencies, np.zeros((len(greys), 1))], axis=1)
    above = coarse > np.median(frequencies, axis=1, keepdims=True)
    across = _MEANS_8[::2] @ values @ _MEANS_9.T
    down = _MEANS_9 @ values @ _MEANS_8[::2].T
    # By more than a grey, so that empty paper gives the same bits in every copy.
    rising = [(steps > 1).reshape(len(greys), -1) for steps in (np.diff(across, axis=2), np.diff(down, axis=1))]
    bits = np.concatenate([above, *rising], axis=1)
    return np.packbits(bits, axis=1).view(np.uint64)


def near_pairs(hashes: _Words, others: _Words, most: int = MOST_BITS) -> _Integers:
    """Return all (i, j), i < j, where hash i differs from other j in at most `most` bits, as [pairs,2], nearest first.

    By the pigeonhole principle one of the 8 bands of 16 bits differs in at most `most` / 8 of its bits; so
    the few neighbours of each band are looked up in a table, instead of comparing all with all.
    """
    assert most < _BANDS * (_BAND_RADIUS + 1)
    found = [np.zeros((0, 2), dtype=np.int64), *_band_matches(hashes, others, most)]
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs[np.argsort(_distance(hashes[pairs[:, 0]], others[pairs[:, 1]]), kind="stable")]


def _band_matches(hashes: _Words, others: _Words, most: int) -> Iterator[_Integers]:
    """Yield the pairs (i, j), i < j, within `most` bits, each perhaps several times."""
    masks = [
        sum(1 << bit for bit in bits) for count in range(_BAND_RADIUS + 1) for bits in combinations(range(16), count)
    ]
    bands, other_bands = (words.view(np.uint16).astype(np.int64) for words in (hashes, others))
    for band in range(_BANDS):
        order = np.argsort(other_bands[:, band], kind="stable")
        starts = np.searchsorted(other_bands[order, band], np.arange((1 << _BAND_BITS) + 1))
        for mask in masks:
            wanted = bands[:, band] ^ mask
            begin, counts = starts[wanted], starts[wanted + 1] - starts[wanted]
            ends = np.cumsum(counts)
            for part in np.split(np.arange(len(counts)), np.flatnonzero(np.diff(ends // _EXPANDED_AT_ONCE)) + 1):
                number = counts[part]
                within = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
                i, j = np.repeat(part, number), order[np.repeat(begin[part], number) + within]
                i, j = i[i < j], j[i < j]
                near = _distance(hashes[i], others[j]) <= most
                yield np.stack([i[near], j[near]], axis=1)


def _distance(first: _Words, second: _Words) -> _Integers:
    """Return in how many bits the rows differ."""
    return np.bitwise_count(first ^ second).sum(axis=1, dtype=np.int64)


def _means(count: int) -> _Floats:
    """Return the matrix [count,SIDE] that takes the means of equal parts of `SIDE` values."""
    edges = np.linspace(0, SIDE, count + 1)
    pixels = np.arange(SIDE)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    parts: _Floats = covered.clip(0) / (SIDE / count)
    return parts


_COSINES = np.cos(np.pi * (2 * np.arange(SIDE) + 1) * np.arange(_LOW)[:, None] / (2 * SIDE))
_MEANS_8, _MEANS_9 = _means(8), _means(9)


class _Links:
    """Which of n things belong together."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def root(self, thing: int) -> int:
        while self._parents[thing] != thing:
            self._parents[thing] = thing = self._parents[self._parents[thing]]
        return thing

    def link_alike(self, greys: _Greys, others: _Greys, pairs: _Integers) -> None:
        """The pairs (i, j) of which picture i and other j are alike belong together."""
        for part in np.array_split(pairs, len(pairs) // _PAIRS_AT_ONCE + 1):
            # What earlier pairs have linked needs no look: a picture with many copies costs one look a copy.
            left = part[[self.root(first) != self.root(second) for first, second in part.tolist()]]
            for rounds, least in ((_FEW_ROUNDS, _PROMISING), (_ROUNDS, LEAST_CORRELATION)):
                left = left[correlation_when_aligned(greys[left[:, 0]], others[left[:, 1]], rounds) >= least]
            for first, second in left.tolist():
                self.link(first, second)

    def link(self, first: int, second: int) -> None:
        low, high = sorted((self.root(first), self.root(second)))
        self._parents[high] = low

    def groups(self) -> list[tuple[int, ...]]:
        """Return those with more than one member."""
        members: dict[int, list[int]] = defaultdict(list)
        for thing in range(len(self._parents)):
            members[self.root(thing)].append(thing)
        return [tuple(group) for group in members.values() if len(group) > 1]

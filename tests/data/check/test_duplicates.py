"""Copies are found whatever was done to them, and pictures that differ are not taken for copies."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from check_help import photo
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from sdlora.data.check.alignment import correlation_when_aligned
from sdlora.data.check.duplicates import MOST_BITS, grey_thumbnail, groups_of_copies, hash_greys, near_pairs

SIZE = (240, 160)


def recompressed(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=20)
    return Image.open(buffer)


def cropped(picture: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = picture.size
    return picture.crop((int(width * left), int(height * top), int(width * (1 - right)), int(height * (1 - bottom))))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "the same": lambda picture: picture,
    "resized": lambda picture: picture.resize((90, 60)),
    "recompressed": recompressed,
    "darker": lambda picture: ImageEnhance.Brightness(picture).enhance(0.7),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.15),
    "more contrast": lambda picture: ImageEnhance.Contrast(picture).enhance(1.3),
    "grey": lambda picture: picture.convert("L"),
    "cropped all round": lambda picture: cropped(picture, 0.03, 0.03, 0.03, 0.03),
    "cropped at one side": lambda picture: cropped(picture, 0.05, 0, 0, 0),
    "squeezed": lambda picture: picture.resize((160, 160)),
    "mirrored": ImageOps.mirror,
    "mirrored and all else": lambda picture: recompressed(cropped(ImageOps.mirror(picture), 0.03, 0, 0, 0.02)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_is_found_among_others(change: str) -> None:
    others = [photo(seed, SIZE) for seed in range(10)]
    pictures = [*others, CHANGES[change](photo(3, SIZE))]
    assert groups_of_copies([grey_thumbnail(picture) for picture in pictures]) == [(3, 10)]


def test_different_pictures_are_no_copies() -> None:
    assert groups_of_copies([grey_thumbnail(photo(seed, SIZE)) for seed in range(60)]) == []


def test_a_subject_elsewhere_before_the_same_background_is_no_copy() -> None:
    pictures = []
    for left in (10, 90, 160):
        picture = photo(1, SIZE)
        ImageDraw.Draw(picture).ellipse((left, 40, left + 60, 120), fill="white", outline="black", width=4)
        pictures.append(grey_thumbnail(picture))
    assert groups_of_copies(pictures) == []


def test_one_place_with_other_things_in_it_is_no_copy_though_the_hashes_are_near() -> None:
    pictures = []
    for seed in (1, 5, 3, 11):
        random, picture = np.random.default_rng(seed), photo(1, SIZE)
        for _ in range(5):
            x, y = random.uniform(60, 180), random.uniform(40, 120)
            colour = tuple(random.integers(0, 256, 3).tolist())
            ImageDraw.Draw(picture).rectangle((x - 18, y - 18, x + 18, y + 18), fill=colour)
        pictures.append(grey_thumbnail(picture))
    hashes = hash_greys(np.frombuffer(b"".join(pictures), dtype=np.uint8).reshape(-1, 32, 32))
    assert {(0, 1), (2, 3)} <= {tuple(pair) for pair in near_pairs(hashes, hashes).tolist()}
    assert groups_of_copies(pictures) == []


def test_copies_of_copies_are_one_group() -> None:
    first, other = photo(1, SIZE), photo(2, SIZE)
    small, mirrored = first.resize((120, 80)), ImageOps.mirror(first)
    pictures = [other, mirrored, photo(5, SIZE), small, recompressed(other), first]
    assert groups_of_copies([grey_thumbnail(picture) for picture in pictures]) == [(0, 4), (1, 3, 5)]


def test_pictures_of_one_colour_are_no_copies() -> None:
    plain = [Image.new("RGB", (50, 50), colour) for colour in ("white", "white", "#fefefe", "black")]
    assert groups_of_copies([grey_thumbnail(picture) for picture in plain]) == []
    assert groups_of_copies([]) == []


def test_many_copies_are_one_group() -> None:
    one = grey_thumbnail(photo(1, SIZE))
    assert groups_of_copies([one] * 400) == [tuple(range(400))]


def flipped(words: np.ndarray, bits: int, random: np.random.Generator) -> np.ndarray:
    """Return the hash with so many of its bits turned."""
    flat = np.unpackbits(words.view(np.uint8))
    flat[random.choice(128, bits, replace=False)] ^= 1
    return np.packbits(flat).view(np.uint64)


def test_near_pairs_are_those_of_comparing_all_with_all() -> None:
    random = np.random.default_rng(7)
    hashes = random.integers(0, 2**64, (10_000, 2), dtype=np.uint64)
    planted = {}
    for number, bits in enumerate([0, 1, 7, 8, 15, 16, 20, 21, 22, 23, 23, 23, 24, 24, 30]):
        first, second = 17 * number, 9_000 + number
        hashes[second] = flipped(hashes[first], bits, random)
        planted[first, second] = bits
    pairs = near_pairs(hashes, hashes)

    brute = set()
    for first in range(len(hashes) - 1):
        distances = np.bitwise_count(hashes[first] ^ hashes[first + 1 :]).sum(axis=1)
        brute |= {(first, first + 1 + int(second)) for second in np.flatnonzero(distances <= MOST_BITS)}
    assert {tuple(pair) for pair in pairs.tolist()} == brute
    assert brute == {pair for pair, bits in planted.items() if bits <= MOST_BITS}
    assert [planted[tuple(pair)] for pair in pairs.tolist()] == sorted(b for b in planted.values() if b <= MOST_BITS)


def test_near_pairs_of_two_lists_compare_the_first_with_later_ones_of_the_second() -> None:
    random = np.random.default_rng(1)
    hashes, others = random.integers(0, 2**64, (2, 50, 2), dtype=np.uint64)
    others[30], others[4] = flipped(hashes[2], 5, random), hashes[40]
    assert near_pairs(hashes, others).tolist() == [[2, 30]]


def test_a_wider_search_than_the_bands_allow_is_refused() -> None:
    with pytest.raises(AssertionError):
        near_pairs(np.zeros((2, 2), dtype=np.uint64), np.zeros((2, 2), dtype=np.uint64), 24)


def test_hashes_hardly_change_with_size_and_not_with_brightness() -> None:
    def bits(picture: Image.Image) -> np.ndarray:
        return hash_greys(np.frombuffer(grey_thumbnail(picture), dtype=np.uint8).reshape(1, 32, 32))

    one = bits(photo(4, SIZE))
    assert one.shape == (1, 2) and one.dtype == np.uint64
    assert np.bitwise_count(one ^ bits(photo(4, SIZE).resize((480, 320)))).sum() <= 4
    assert np.bitwise_count(one ^ bits(photo(5, SIZE))).sum() > 40


def test_alignment_finds_a_shift_and_a_scale() -> None:
    large = photo(2, (400, 400)).convert("L")
    whole = np.asarray(large.crop((0, 0, 360, 360)).resize((32, 32)))[None]
    shifted = np.asarray(large.crop((24, 16, 384, 376)).resize((32, 32)))[None]
    closer = np.asarray(large.crop((20, 25, 330, 340)).resize((32, 32)))[None]
    for other in (shifted, closer):
        as_they_lie = np.corrcoef(whole.ravel(), other.ravel())[0, 1]
        aligned = correlation_when_aligned(whole, other, 8)
        assert as_they_lie < 0.95 < 0.985 < aligned[0]
        assert aligned == pytest.approx(correlation_when_aligned(other, whole, 8))


def test_alignment_takes_brightness_and_contrast_but_no_negative() -> None:
    one = np.asarray(photo(2).convert("L").resize((32, 32)))[None]
    assert correlation_when_aligned(one, one // 2 + 20, 8)[0] > 0.999
    assert correlation_when_aligned(one, 255 - one, 8)[0] < 0.5
    assert correlation_when_aligned(one[:0], one[:0], 8).shape == (0,)

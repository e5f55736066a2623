import colorsys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from picture_files import (
    ADOBE_RGB_GAMMA,
    ADOBE_RGB_PRIMARIES,
    SRGB_PRIMARIES,
    from_linear,
    gamma_curve,
    ink_profile,
    matrix_profile,
    table_curve,
    to_linear,
)
from PIL import Image, ImageCms

from sdlora.data.colours import profile_title, split_opacity, to_srgb

ADOBE_RGB = matrix_profile(ADOBE_RGB_PRIMARIES, gamma_curve(ADOBE_RGB_GAMMA), "Adobe RGB (1998)")
SRGB_BY_TABLE = matrix_profile(
    SRGB_PRIMARIES, table_curve(to_linear(np.linspace(0, 1, 1024))), "Colour LCD, calibrated"
)
LINEAR_GREY = matrix_profile((), gamma_curve(1.0), "linear grey", b"GRAY")
COLOURS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def levels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def from_adobe_rgb(values: np.ndarray) -> np.ndarray:
    """Return 8-bit sRGB of 8-bit Adobe RGB: through linear light and XYZ under D50."""
    light = (values / 255) ** ADOBE_RGB_GAMMA
    to_xyz, from_xyz = np.array(ADOBE_RGB_PRIMARIES).T, np.linalg.inv(np.array(SRGB_PRIMARIES).T)
    return 255 * from_linear(light @ (from_xyz @ to_xyz).T)


# --- profiles ----------------------------------------------------------------------------------------


def test_a_profile_of_rgb_is_converted_as_its_curve_and_primaries_say():
    expected = from_adobe_rgb(COLOURS)
    assert np.abs(expected - COLOURS).max() > 50  # there is something to do
    assert np.abs(levels(to_srgb(Image.fromarray(COLOURS), ADOBE_RGB)) - expected).max() <= 1


def test_grey_pixels_under_a_profile_of_rgb_stay_grey_but_follow_its_curve():
    ramp = np.arange(256, dtype=np.uint8).reshape(1, -1)
    found = levels(to_srgb(Image.fromarray(ramp), ADOBE_RGB))
    assert np.ptp(found, axis=2).max() <= 1
    assert np.abs(found[..., 0] - 255 * from_linear((ramp / 255) ** ADOBE_RGB_GAMMA)).max() <= 1


def test_a_profile_of_grey_is_converted():
    ramp = np.arange(256, dtype=np.uint8).reshape(1, -1)
    found = levels(to_srgb(Image.fromarray(ramp), LINEAR_GREY))
    assert np.abs(found - 255 * from_linear(ramp / 255)[..., None]).max() <= 1


def test_a_profile_of_inks_is_converted():
    # Cyan halves the lightness, black takes all of it, the other inks cannot be seen.
    profile = ink_profile(lambda cyan, magenta, yellow, black: (100 * (1 - cyan / 2) * (1 - black), 0, 0))
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)]
    found = [to_srgb(Image.new("CMYK", (1, 1), ink), profile).getpixel((0, 0)) for ink in inks]
    middle = round(255 * float(from_linear(((50 + 16) / 116) ** 3)))  # L* 50: light of (66/116)^3
    assert middle == 119
    assert np.abs(np.array(found) - np.array([[255] * 3, [middle] * 3, [255] * 3, [0] * 3])).max() <= 2


def test_paper_is_white_and_the_darkest_ink_black():
    profile = ink_profile(lambda *inks: (100 - 20 * sum(inks), 0, 0), paper=(0.8, 0.8, 0.5))
    found = [to_srgb(Image.new("CMYK", (1, 1), (ink,) * 4), profile).getpixel((0, 0)) for ink in (0, 255)]
    assert np.abs(np.array(found) - np.array([[255] * 3, [0] * 3])).max() <= 1


def test_what_is_srgb_by_its_numbers_keeps_its_bytes_whatever_its_title():
    built_in = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (built_in, SRGB_BY_TABLE):
        assert profile_title(profile, "RGB") == "sRGB"
        assert np.array_equal(levels(to_srgb(Image.fromarray(COLOURS), profile)), COLOURS)
    named_so = matrix_profile(ADOBE_RGB_PRIMARIES, gamma_curve(ADOBE_RGB_GAMMA), "sRGB IEC61966-2.1")
    assert np.abs(levels(to_srgb(Image.fromarray(COLOURS), named_so)) - from_adobe_rgb(COLOURS)).max() <= 1


@pytest.mark.parametrize(
    "profile", [None, b"", b"junk" * 50, ADOBE_RGB[:200], LINEAR_GREY, ink_profile(lambda *_: (0, 0, 0))]
)
def test_a_profile_that_is_broken_or_of_other_channels_is_ignored(profile):
    assert np.array_equal(levels(to_srgb(Image.fromarray(COLOURS), profile)), COLOURS)


def test_titles():
    assert profile_title(ADOBE_RGB, "RGB") == "Adobe RGB (1998)"
    assert profile_title(ADOBE_RGB, "P") == profile_title(ADOBE_RGB, "I;16") == "Adobe RGB (1998)"
    assert profile_title(ADOBE_RGB, "CMYK") == "unreadable"
    assert profile_title(LINEAR_GREY, "LA") == "linear grey"
    assert profile_title(LINEAR_GREY, "RGB") == "unreadable"
    assert profile_title(None, "RGB") == profile_title(ADOBE_RGB[:200], "RGB") == "unreadable"
    assert profile_title(matrix_profile(ADOBE_RGB_PRIMARIES, gamma_curve(1.8), ""), "RGB") == "unnamed"


def test_threads_share_a_conversion():
    picture = Image.fromarray(np.tile(COLOURS, (5, 5, 1)))
    alone = levels(to_srgb(picture, ADOBE_RGB))
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: levels(to_srgb(picture, ADOBE_RGB)), range(40)):
            assert np.array_equal(found, alone)


# --- kinds of pixels that no file in the tests of pictures has ---------------------------------------


def test_hue_saturation_value():
    hsv = (85, 128, 200)
    expected = np.array(colorsys.hsv_to_rgb(*(value / 255 for value in hsv))) * 255
    found = levels(to_srgb(Image.new("HSV", (1, 1), hsv), None))[0, 0]
    assert np.abs(found - expected).max() <= 1.5


def test_luma_and_chroma():
    luma, blue, red = 120, 100, 160
    expected = [  # ITU-R BT.601 in full range, as JPEG has it
        luma + 1.402 * (red - 128),
        luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128),
        luma + 1.772 * (blue - 128),
    ]
    found = levels(to_srgb(Image.new("YCbCr", (1, 1), (luma, blue, red)), None))[0, 0]
    assert np.abs(found - expected).max() <= 1


def test_the_result_is_a_new_picture_that_carries_nothing_along():
    picture = Image.new("RGB", (2, 2), "red")
    picture.info.update(icc_profile=ADOBE_RGB, exif=b"x")
    for profile in (None, ADOBE_RGB):
        found = to_srgb(picture, profile)
        assert found is not picture and found.info == {}
    assert picture.info


def test_twelve_bits_are_scaled():
    colours, opacity = split_opacity(Image.fromarray(np.array([[0, 8, 9, 2048, 4095]], np.uint16)), bits=12)
    assert opacity is None
    assert list(colours.getdata()) == [0, 0, 1, 128, 255]  # 8 x 255 / 4095 is 0.498, 9 x 255 / 4095 is 0.56

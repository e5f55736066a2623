import io
import random
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from picture_files import (
    ADOBE_RGB_GAMMA,
    ADOBE_RGB_PRIMARIES,
    D50,
    SRGB_PRIMARIES,
    exif,
    flat_jpeg,
    from_linear,
    gamma_curve,
    matrix_profile,
    png,
    tiff,
)
from PIL import Image

from sdlora.data import headers
from sdlora.data.pictures import (
    Header,
    check_colour,
    read_header,
    read_mask,
    read_picture,
    read_picture_and_opacity,
)
from sdlora.errors import ConfigError, DataError

RED, GREEN, BLUE, WHITE, BLACK = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]
PALETTE = (b"PLTE", bytes(RED + GREEN + BLUE))


def grey(*values: int) -> list[list[int]]:
    return [[value] * 3 for value in values]


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def row(data: bytes, **options) -> list[list[int]]:
    """Return the pixels of a picture of one row."""
    picture = read_picture(io.BytesIO(data), "a.png", **options)
    assert picture.mode == "RGB" and picture.height == 1
    return np.asarray(picture)[0].tolist()


def smooth(width: int, height: int) -> Image.Image:
    """Return a picture of soft edges everywhere, such as photographs have."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 21 + y / 55 + shift) + np.sin(x * y / 9000 + shift) + np.sin(y / 34) for shift in (0, 1, 2)]
    return Image.fromarray(np.clip(np.stack(waves, axis=-1) * 40 + 128, 0, 255).astype(np.uint8))


# --- a gallery: every kind of pixel ------------------------------------------------------------------

INK = Image.new("CMYK", (2, 1))
INK.putdata([(0, 128, 255, 51), (0, 0, 0, 0)])
HALVES = (np.array([[0, 128, 129, 257, 32768, 65535]]), grey(0, 0, 1, 1, 128, 255))
"""16-bit values; 128 / 257 is 0.498 and 129 / 257 is 0.502."""
ANIMATED = [Image.new("RGBA", (2, 1), colour) for colour in ("red", "blue")]

EXACT = {
    "rgb": (png(2, 1, 8, 2, bytes([1, 2, 3, 250, 251, 252])), [[1, 2, 3], [250, 251, 252]]),
    "grey": (png(3, 1, 8, 0, bytes([0, 77, 255])), grey(0, 77, 255)),
    "grey, one transparent": (png(3, 1, 8, 0, bytes([0, 77, 255]), [(b"tRNS", b"\0\x4d")]), grey(0, 255, 255)),
    "grey and alpha": (png(3, 1, 8, 4, bytes([7, 255, 7, 0, 0, 51])), grey(7, 255, 204)),
    "1 bit": (png(8, 1, 1, 0, b"\xa0"), grey(255, 0, 255, 0, 0, 0, 0, 0)),
    "1 bit, black transparent": (png(8, 1, 1, 0, b"\xa0", [(b"tRNS", b"\0\0")]), grey(*[255] * 8)),
    "2 bits": (png(4, 1, 2, 0, bytes([0b00011011])), grey(0, 85, 170, 255)),
    "2 bits, 1 of 3 transparent": (png(4, 1, 2, 0, bytes([0b00011011]), [(b"tRNS", b"\0\1")]), grey(0, 255, 170, 255)),
    "4 bits, 5 of 15 transparent": (png(2, 1, 4, 0, bytes([0x5A]), [(b"tRNS", b"\0\5")]), grey(255, 170)),
    "palette": (png(4, 1, 2, 3, bytes([0b00011000]), [PALETTE]), [RED, GREEN, BLUE, RED]),
    "palette, one transparent": (
        png(4, 1, 2, 3, bytes([0b00011000]), [PALETTE, (b"tRNS", b"\xff\0")]),
        [RED, WHITE, BLUE, RED],
    ),
    "palette, some half": (
        png(3, 1, 8, 3, bytes([0, 1, 2]), [PALETTE, (b"tRNS", b"\x33\x80")]),
        [[255, 204, 204], [127, 255, 127], BLUE],
    ),
    "rgb, one transparent": (
        png(2, 1, 8, 2, bytes([1, 2, 3, 1, 2, 4]), [(b"tRNS", b"\0\1\0\2\0\3")]),
        [WHITE, [1, 2, 4]],
    ),
    "rgb and alpha": (
        png(3, 1, 8, 6, bytes([*RED, 255, 9, 9, 9, 0, 0, 0, 0, 51])),
        [RED, WHITE, [204, 204, 204]],
    ),
    "16-bit grey": (png(6, 1, 16, 0, HALVES[0].astype(">u2").tobytes()), HALVES[1]),
    "16-bit grey, one transparent": (
        png(6, 1, 16, 0, HALVES[0].astype(">u2").tobytes(), [(b"tRNS", b"\0\x81")]),
        grey(0, 0, 255, 1, 128, 255),
    ),
    # Of 16-bit colours Pillow keeps the upper byte, at most one level less than rounding gives.
    "16-bit rgb": (png(2, 1, 16, 2, bytes([1, 0, 2, 0, 3, 0, 255, 255, 128, 128, 0, 0])), [[1, 2, 3], [255, 128, 0]]),
    "16-bit rgb, one transparent": (
        png(2, 1, 16, 2, bytes([1, 9, 2, 9, 3, 9, 9, 1, 9, 2, 9, 3]), [(b"tRNS", bytes([1, 9, 2, 9, 3, 9]))]),
        [WHITE, [9, 9, 9]],
    ),
    "16-bit rgb and alpha": (
        png(2, 1, 16, 6, bytes([255, 255, 0, 0, 0, 0, 51, 51, 1, 1, 2, 2, 3, 3, 255, 255])),
        [[255, 204, 204], [1, 2, 3]],
    ),
    "16-bit grey and alpha": (png(1, 1, 16, 4, bytes([0, 0, 51, 51])), grey(204)),
    "animated png": (saved(ANIMATED[0], "PNG", save_all=True, append_images=ANIMATED[1:]), [RED, RED]),
    "tiff rgb": (tiff(2, 1, (8, 8, 8), 2, bytes([1, 2, 3, 4, 5, 6])), [[1, 2, 3], [4, 5, 6]]),
    "tiff rgb and alpha": (tiff(1, 1, (8,) * 4, 2, bytes([0, 0, 0, 51]), extra=[(338, "H", (2,))]), grey(204)),
    "tiff palette and alpha": (
        tiff(2, 1, (8, 8), 3, bytes([1, 255, 1, 51]), extra=[(320, "H", (0, 65535, *[0] * 766)), (338, "H", (2,))]),
        [RED, [255, 204, 204]],
    ),
    "tiff 16-bit grey": (tiff(6, 1, (16,), 1, HALVES[0].astype("<u2").tobytes()), HALVES[1]),
    "tiff 16-bit grey, other bytes first": (tiff(6, 1, (16,), 1, HALVES[0].astype(">u2").tobytes(), ">"), HALVES[1]),
    "tiff 16-bit grey, white is 0": (tiff(6, 1, (16,), 0, (65535 - HALVES[0]).astype("<u2").tobytes()), HALVES[1]),
    "tiff grey, white is 0": (tiff(2, 1, (8,), 0, bytes([0, 200])), grey(255, 55)),
    # Without a profile: light is what each ink and black leave of it, (255 - ink) x (255 - black) / 255.
    "tiff cmyk": (saved(INK, "TIFF"), [[204, 102, 0], WHITE]),
    "gif": (saved(Image.frombytes("P", (2, 1), b"\0\1"), "GIF", palette=bytes(RED + GREEN)), [RED, GREEN]),
    # A canvas of three, whose first frame is the green one in the middle.
    "gif, small first frame": (
        b"GIF89a\3\0\1\0\x80\0\0" + bytes(RED + GREEN) + b",\1\0\0\0\1\0\1\0\0\2\2\x4c\1\0;",
        [WHITE, GREEN, WHITE],
    ),
    "animated gif": (saved(ANIMATED[0], "GIF", save_all=True, append_images=ANIMATED[1:]), [RED, RED]),
    "webp without loss": (saved(Image.new("RGBA", (1, 1), (0, 0, 0, 51)), "WEBP", lossless=True), grey(204)),
    "animated webp": (saved(ANIMATED[0], "WEBP", save_all=True, append_images=ANIMATED[1:], lossless=True), [RED, RED]),
    "bmp": (saved(Image.new("RGB", (1, 1), (1, 2, 3)), "BMP"), [[1, 2, 3]]),
}  # fmt: skip


@pytest.mark.parametrize("kind", EXACT)
def test_gallery_to_the_level(kind):
    data, expected = EXACT[kind]
    assert row(data) == expected


def without_adobe_mark(jpeg: bytes) -> bytes:
    place = jpeg.index(b"\xff\xee")
    return jpeg[:place] + jpeg[place + 2 + struct.unpack_from(">H", jpeg, place + 2)[0] :]


WIDE_INK = Image.new("CMYK", (16, 16), (0, 128, 255, 51))
ORANGE = Image.new("RGB", (16, 16), (230, 120, 40))


def srgb_of_lab(lightness: float, a: float, b: float) -> np.ndarray:
    """Return 8-bit sRGB of CIE L*a*b* under D50."""
    y = (lightness + 16) / 116
    xyz = np.array([y + a / 500, y, y - b / 200]) ** 3 * D50  # none of the tests' colours is in the straight part
    return 255 * from_linear(np.linalg.inv(np.array(SRGB_PRIMARIES).T) @ xyz)


LOSSY = {
    "jpeg": (saved(ORANGE, "JPEG", quality=95), (230, 120, 40), 2),
    "progressive jpeg": (saved(ORANGE, "JPEG", quality=95, progressive=True), (230, 120, 40), 2),
    "grey jpeg": (saved(Image.new("L", (16, 16), 77), "JPEG", quality=95), (77, 77, 77), 1),
    "webp": (saved(ORANGE, "WEBP", quality=95), (230, 120, 40), 3),
    "avif": (saved(ORANGE, "AVIF", quality=95), (230, 120, 40), 3),
    "cmyk jpeg of Adobe's": (saved(WIDE_INK, "JPEG", quality=95), (204, 102, 0), 2),
    # The same bytes without the mark mean the opposite: 0 is no ink.
    "cmyk jpeg": (
        without_adobe_mark(saved(WIDE_INK.point(lambda ink: 255 - ink), "JPEG", quality=95)),
        (204, 102, 0),
        2,
    ),
    "tiff of a jpeg": (saved(ORANGE, "TIFF", compression="jpeg", quality=95), (230, 120, 40), 3),
    "tiff lab": (tiff(1, 1, (8, 8, 8), 8, bytes([153, 20, 256 - 30])), srgb_of_lab(60, 20, -30), 2),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_gallery_within_rounding(kind):
    data, expected, tolerance = LOSSY[kind]
    found = np.asarray(read_picture(io.BytesIO(data))).astype(int)
    assert np.abs(found - expected).max() <= tolerance


def test_all_of_the_gallery_at_once_in_threads():
    files = [data for data, *_ in (*EXACT.values(), *LOSSY.values())] * 4
    alone = [np.asarray(read_picture(io.BytesIO(data))) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(lambda data: np.asarray(read_picture(io.BytesIO(data))), files)
        assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_result_is_a_plain_picture_without_the_metadata_of_the_file(kind):
    picture = read_picture(io.BytesIO(saved(ORANGE, kind, exif=exif(1))))
    assert type(picture) is Image.Image and picture.info == {}


# --- upright -----------------------------------------------------------------------------------------

UPRIGHT = np.array([[[10, 0, 0], [20, 0, 0], [30, 0, 0]], [[40, 0, 0], [50, 0, 0], [60, 0, 0]]], np.uint8)
AS_STORED = {
    # Where the first row and the first column of the file belong (EXIF 2.3, tag 0x0112).
    1: UPRIGHT,  # top, left
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.swapaxes(0, 1),  # left, top
    6: UPRIGHT.swapaxes(0, 1)[::-1],  # right, top
    7: UPRIGHT.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: UPRIGHT.swapaxes(0, 1)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", AS_STORED)
def test_every_orientation(kind, orientation):
    camera = Image.Exif()
    camera[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(Image.fromarray(np.ascontiguousarray(AS_STORED[orientation])), kind, exif=camera, **options)
    assert np.array_equal(np.asarray(read_picture(io.BytesIO(data))), UPRIGHT)
    assert read_header(io.BytesIO(data)).size == (3, 2)


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
@pytest.mark.parametrize("orientation", AS_STORED)
def test_every_orientation_of_lossy_files(kind, orientation):
    blocks = np.kron(AS_STORED[orientation] * 4, np.ones((16, 16, 1), np.uint8))
    camera = Image.Exif()
    camera[0x0112] = orientation
    found = np.asarray(read_picture(io.BytesIO(saved(Image.fromarray(blocks), kind, exif=camera, quality=95))))
    assert np.abs(found[8::16, 8::16].astype(int) - UPRIGHT * 4).max() < 8


def test_exif_behind_the_pixels_counts():
    data = png(1, 2, 8, 0, b"\1\2", after=[(b"eXIf", exif(6))])
    assert row(data) == grey(2, 1)


def test_opacity_is_turned_too():
    data = png(1, 2, 8, 4, bytes([7, 10, 8, 20]), before=[(b"eXIf", exif(6))])
    _, opacity = read_picture_and_opacity(io.BytesIO(data))
    assert (opacity.mode, opacity.size, list(opacity.getdata())) == ("L", (2, 1), [20, 10])


# --- transparency and colour -------------------------------------------------------------------------


def test_the_background_shows_through():
    data = png(3, 1, 8, 6, bytes([*RED, 255, 9, 9, 9, 0, 0, 0, 0, 102]))
    assert row(data, background="black") == [RED, BLACK, BLACK]
    assert row(data, background="#0000FF") == [RED, BLUE, [0, 0, 153]]
    assert row(data, background="lime") == [RED, GREEN, [0, 153, 0]]


def test_laying_on_the_background_rounds_to_the_nearest_level():
    values = np.array(
        [[level, level, level, opacity] for level in (0, 1, 127, 200) for opacity in range(256)], np.uint8
    )
    found = np.array(row(png(len(values), 1, 8, 6, values.tobytes()), background="#643201"))
    level, opacity = values[:, :3].astype(float), values[:, 3:] / 255
    assert np.array_equal(found, np.floor(level * opacity + np.array([0x64, 0x32, 1]) * (1 - opacity) + 0.5))


def test_opacity_comes_with_the_picture():
    picture, opacity = read_picture_and_opacity(io.BytesIO(png(2, 1, 8, 6, bytes([1, 2, 3, 0, 4, 5, 6, 51]))))
    assert np.asarray(picture).tolist() == [[WHITE, [205, 205, 205]]]
    assert np.asarray(opacity).tolist() == [[0, 51]]
    for data in (png(3, 1, 8, 0, bytes([0, 77, 255]), [(b"tRNS", b"\0\x4d")]), EXACT["gif, small first frame"][0]):
        _, opacity = read_picture_and_opacity(io.BytesIO(data))
        assert np.asarray(opacity).tolist() in ([[255, 0, 255]], [[0, 255, 0]])
    assert read_picture_and_opacity(io.BytesIO(EXACT["rgb"][0]))[1] is None


def test_colours():
    assert check_colour("white") == (255, 255, 255)
    assert check_colour("#FF8000") == check_colour("#ff8000ff") == (255, 128, 0)
    assert check_colour("rgb(1,2,3)") == (1, 2, 3)
    with pytest.raises(ConfigError, match=r'data\.background: "whit" is no colour \(nearest: "white"\); use a name'):
        check_colour("whit")
    with pytest.raises(ConfigError, match=r'"" is no colour; use a name such as "white", or "#rrggbb"'):
        check_colour("")
    with pytest.raises(ConfigError, match='"#ff000080" is itself transparent'):
        read_picture(io.BytesIO(EXACT["rgb"][0]), background="#ff000080")


def test_a_profile_is_applied_and_leaves_the_opacity_alone():
    profile = matrix_profile(ADOBE_RGB_PRIMARIES, gamma_curve(ADOBE_RGB_GAMMA))
    chunk = (b"iCCP", b"x\0\0" + zlib.compress(profile))
    # 100, 150, 200 of Adobe RGB is 66, 151, 203 of sRGB, see test_colours.py.
    data = png(2, 1, 8, 6, bytes([100, 150, 200, 255, 100, 150, 200, 0]), before=[chunk])
    picture, opacity = read_picture_and_opacity(io.BytesIO(data), background="black")
    assert np.asarray(picture).tolist() == [[[66, 151, 203], BLACK]]
    assert np.asarray(opacity).tolist() == [[255, 0]]
    palette = png(1, 1, 8, 3, b"\0", before=[chunk, (b"PLTE", bytes([100, 150, 200]))])
    assert row(palette) == [[66, 151, 203]]
    jpeg = saved(Image.new("RGB", (400, 400), (100, 150, 200)), "JPEG", quality=95, icc_profile=profile)
    small = read_picture(io.BytesIO(jpeg), at_least=(20, 20))
    assert small.size == (50, 50)
    assert np.abs(np.asarray(small).astype(int) - (66, 151, 203)).max() <= 2


# --- large pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at_least", "size"),
    [
        ((800, 400), (1600, 800)),  # twice that is all of it
        ((401, 200), (1600, 800)),
        ((400, 200), (800, 400)),
        ((10, 200), (800, 400)),
        ((200, 100), (400, 200)),
        ((100, 50), (200, 100)),
        ((1, 1), (200, 100)),  # an eighth is the least
        ((5000, 5000), (1600, 800)),
    ],
)
def test_a_jpeg_is_decoded_at_the_least_scale_that_is_twice_as_large(at_least, size):
    data = saved(Image.new("L", (1600, 800)), "JPEG")
    assert read_picture(io.BytesIO(data), at_least=at_least).size == size


def test_the_scale_heeds_a_turn():
    data = saved(Image.new("L", (1600, 800)), "JPEG", exif=b"Exif\0\0" + exif(6))
    assert read_header(io.BytesIO(data)).size == (800, 1600)
    assert read_picture(io.BytesIO(data), at_least=(100, 200)).size == (200, 400)
    assert read_picture(io.BytesIO(data), at_least=(200, 100)).size == (400, 800)


def test_a_reduced_jpeg_scales_to_what_the_full_one_scales_to():
    width, height = 1001, 763  # neither divides by 8: an eighth ends within its last column and row
    data = saved(smooth(width, height), "JPEG", quality=95)
    target = (62, 47)
    reduced = read_picture(io.BytesIO(data), at_least=target)
    assert reduced.size == (126, 96)
    full = read_picture(io.BytesIO(data))
    difference = np.asarray(full.resize(target, Image.Resampling.LANCZOS)).astype(float)
    difference -= np.asarray(reduced.resize(target, Image.Resampling.LANCZOS))
    assert 20 * np.log10(255 / np.sqrt((difference**2).mean())) > 45  # dB


def test_other_formats_come_whole():
    for kind in ("PNG", "WEBP", "TIFF"):
        data = saved(Image.new("RGB", (160, 80)), kind)
        assert read_picture(io.BytesIO(data), at_least=(10, 5)).size == (160, 80)


def test_a_picture_that_would_fill_the_memory_is_refused(monkeypatch):
    data = flat_jpeg(64, 64).replace(struct.pack(">HH", 64, 64), struct.pack(">HH", 16_000, 16_000))
    with pytest.raises(DataError, match=r"^a\.jpg: has more than 178 megapixels; resize it$"):
        read_picture(io.BytesIO(data), "a.jpg")
    monkeypatch.setattr(headers, "MAX_PIXELS", 60_000)
    jpeg, progressive = (saved(Image.new("L", (400, 200)), "JPEG", progressive=value) for value in (False, True))
    for data, at_least in ((jpeg, None), (jpeg, (101, 50)), (progressive, (100, 50))):
        with pytest.raises(DataError, match="megapixels"):
            read_picture(io.BytesIO(data), at_least=at_least)
    assert read_picture(io.BytesIO(jpeg), at_least=(100, 50)).size == (200, 100)


def test_nothing_is_printed_of_pictures_that_only_pillow_finds_large(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"):
            assert read_picture(io.BytesIO(saved(Image.new("RGB", (80, 60)), kind))).size == (80, 60)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_of_a_hundred_megapixels_few_are_ever_in_memory(tmp_path):
    (tmp_path / "a.jpg").write_bytes(flat_jpeg(10_240, 10_240))
    program = """
        import re, sys
        from pathlib import Path
        from sdlora.data.pictures import read_picture

        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

        before = peak()
        picture = read_picture(Path(sys.argv[1]), at_least=(512, 512))
        print(*picture.size, *picture.getpixel((1279, 1279)), peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "a.jpg")]
    width, height, *pixel, mib = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert (width, height, pixel) == ("1280", "1280", ["128"] * 3)
    assert float(mib) < 40  # all of it would be 100, or 400 in colour


# --- masks -------------------------------------------------------------------------------------------


LINEAR_GREY = matrix_profile((), gamma_curve(1.0), space=b"GRAY")


def masked(tmp_path, mask: bytes, size=(3, 1), orientation=1, kind="JPEG") -> np.ndarray:
    (tmp_path / "a-masklabel.png").write_bytes(mask)
    header = Header(*size, kind, "RGB", 8, orientation, transparent=False, animated=False, profile="")
    found = read_mask(tmp_path / "a-masklabel.png", header, "cats/a.jpg")
    assert found.mode == "L"
    return np.asarray(found)


@pytest.mark.parametrize(
    ("mask", "weights"),
    [
        (png(3, 1, 8, 0, bytes([0, 77, 255])), [0, 77, 255]),
        (png(3, 1, 8, 2, bytes([0, 9, 9, 77, 9, 9, 255, 9, 9])), [0, 77, 255]),
        (png(3, 1, 8, 6, bytes([0, 9, 9, 0, 77, 9, 9, 0, 255, 9, 9, 0])), [0, 77, 255]),
        (png(3, 1, 8, 4, bytes([0, 0, 77, 0, 255, 0])), [0, 77, 255]),
        (png(3, 1, 16, 0, bytes([0, 0, 77, 77, 255, 255])), [0, 77, 255]),
        (png(3, 1, 1, 0, b"\x60"), [0, 255, 255]),
        (png(3, 1, 8, 3, bytes([2, 1, 0]), [PALETTE]), [0, 0, 255]),
        (png(3, 1, 8, 0, bytes([0, 77, 255]), [(b"iCCP", b"x\0\0" + zlib.compress(LINEAR_GREY))]), [0, 77, 255]),
    ],
    ids=["grey", "red of rgb", "red of rgba", "grey of grey and alpha", "16 bits", "1 bit", "palette", "profile"],
)  # fmt: skip
def test_weights_of_every_kind_of_mask(tmp_path, mask, weights):
    assert masked(tmp_path, mask).tolist() == [weights]


@pytest.mark.parametrize(
    ("size", "mask"),
    [
        ((768, 512), (768, 512)),
        ((768, 512), (96, 64)),
        ((768, 512), (1536, 1024)),
        ((1000, 667), (500, 333)),  # 333.5 rounded down
        ((1000, 667), (500, 334)),
        ((333, 250), (4000, 3000)),  # the picture is the rounded one
        ((4000, 3000), (333, 250)),
    ],
)
def test_a_mask_may_have_another_size_of_the_same_shape(tmp_path, size, mask):
    assert masked(tmp_path, saved(Image.new("L", mask), "PNG"), size).shape == mask[::-1]


@pytest.mark.parametrize(
    ("size", "mask"),
    [((768, 512), (512, 512)), ((768, 512), (512, 768)), ((768, 512), (768, 500)), ((1000, 667), (500, 331))],
)
def test_a_mask_of_another_shape_is_an_error(tmp_path, size, mask):
    with pytest.raises(DataError) as caught:
        masked(tmp_path, saved(Image.new("L", mask), "PNG"), size)
    expected = f"mask is {mask[0]}x{mask[1]}, cats/a.jpg is {size[0]}x{size[1]}; resize the mask"
    assert str(caught.value) == f"{tmp_path / 'a-masklabel.png'}: {expected}"


def test_a_mask_of_the_picture_as_it_lies_is_turned_with_it(tmp_path):
    lying = png(3, 1, 8, 0, bytes([1, 2, 3]))
    assert masked(tmp_path, lying, size=(1, 3), orientation=6).tolist() == [[1], [2], [3]]
    assert masked(tmp_path, lying, size=(1, 3), orientation=6, kind="TIFF").tolist() == [[1], [2], [3]]
    assert masked(tmp_path, lying, size=(1, 3), orientation=8).tolist() == [[3], [2], [1]]
    assert masked(tmp_path, lying, size=(3, 1), orientation=6).tolist() == [[1, 2, 3]]  # it stands already
    assert masked(tmp_path, lying, size=(3, 1), orientation=3).tolist() == [[1, 2, 3]]
    with pytest.raises(DataError, match="mask is 3x1"):
        masked(tmp_path, lying, size=(1, 3), orientation=3)


def test_a_mask_has_an_orientation_of_its_own(tmp_path):
    mask = png(3, 1, 8, 0, bytes([1, 2, 3]), before=[(b"eXIf", exif(6))])
    assert masked(tmp_path, mask, size=(1, 3)).tolist() == [[1], [2], [3]]


# --- damaged files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("at_least", [None, (8, 8)])
def test_a_truncated_jpeg_is_named(tmp_path, progressive, at_least):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), "JPEG", progressive=progressive)
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(
        DataError, match=r"a\.jpg: cannot be read as a picture \(image file is truncated.*replace or remove the file$"
    ):
        read_picture(tmp_path / "a.jpg", at_least=at_least)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about the tags of a damaged TIFF
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_other_truncated_files_are_named(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    options = {"compression": "tiff_lzw"} if kind == "TIFF" else {}
    data = saved(noise, kind, **options)
    with pytest.raises(DataError, match=r"^rows\.parquet#7: cannot be read as a picture \(.*replace or remove"):
        read_picture(io.BytesIO(data[: len(data) * 3 // 4]), "rows.parquet#7")


def test_text_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(DataError, match=r"a\.png: is text, not a picture"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"b\.png: cannot be read \(No such file or directory\)"):
        read_picture(tmp_path / "b.png")


def damageable(kind: str) -> list[bytes]:
    gradient = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3))
    camera = Image.Exif()
    camera[0x0112] = 3
    profile = matrix_profile(ADOBE_RGB_PRIMARIES, gamma_curve(ADOBE_RGB_GAMMA))
    told = {} if kind in ("BMP", "GIF") else {"exif": camera, "icc_profile": profile}
    others = {
        "PNG": [saved(gradient.convert("P"), "PNG", transparency=b"\0\x80"), EXACT["animated png"][0]],
        "JPEG": [saved(gradient, "JPEG", progressive=True), saved(gradient.convert("CMYK"), "JPEG")],
        "WEBP": [EXACT["animated webp"][0]],
        "GIF": [EXACT["animated gif"][0]],
        "TIFF": [saved(gradient, "TIFF", compression=how) for how in ("tiff_lzw", "tiff_deflate", "jpeg")],
    }
    return [saved(gradient, kind, **told), *others.get(kind, [])]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about the tags of a damaged TIFF
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_random_damage_is_refused_or_harmless(monkeypatch, kind):
    monkeypatch.setattr(headers, "MAX_PIXELS", 1_000_000)  # a damaged size must not fill the test's memory
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    draw = random.Random(3)
    sound = damageable(kind)
    refused = 0
    for _ in range(150):
        data = bytearray(draw.choice(sound))
        if draw.random() < 0.2:
            del data[draw.randrange(len(data)) :]
        for _ in range(draw.choice((1, 2, 4))):
            if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
        for read in (read_header, read_picture):
            try:
                found = read(io.BytesIO(data), "a.jpg")
                assert found.mode == "RGB" if read is read_picture else found.width > 0
            except DataError as error:
                refused += 1
                assert str(error).startswith("a.jpg: ") and "\n" not in str(error)
    assert refused > 10

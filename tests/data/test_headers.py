import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from picture_files import (
    ADOBE_RGB_GAMMA,
    ADOBE_RGB_PRIMARIES,
    exif,
    flat_jpeg,
    gamma_curve,
    matrix_profile,
    png,
    png_chunk,
    tiff,
)
from PIL import Image

from sdlora.data.headers import Header, read_header
from sdlora.errors import DataError

ADOBE_RGB = matrix_profile(ADOBE_RGB_PRIMARIES, gamma_curve(ADOBE_RGB_GAMMA), "My camera's RGB")


def header(data: bytes) -> Header:
    return read_header(io.BytesIO(data), "a.png")


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def plain(kind: str, mode="RGB", **options) -> bytes:
    return saved(Image.new(mode, (6, 4)), kind, **options)


def refusal(data: bytes) -> str:
    with pytest.raises(DataError) as caught:
        header(data)
    text = str(caught.value)
    assert text.startswith("a.png: ") and "\n" not in text
    return text.removeprefix("a.png: ")


# --- what is told ------------------------------------------------------------------------------------


def test_everything_of_one_file():
    data = png(
        6, 4, 8, 6, bytes(6 * 4 * 4), before=[(b"iCCP", b"x\0\0" + zlib.compress(ADOBE_RGB)), (b"eXIf", exif(8))]
    )
    assert header(data) == Header(
        width=4,
        height=6,
        format="PNG",
        mode="RGBA",
        bits=8,
        orientation=8,
        transparent=True,
        animated=False,
        profile="My camera's RGB",
    )
    assert header(data).size == (4, 6)
    assert header(data).turned
    assert not header(plain("PNG")).turned


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"])
def test_the_kind_is_seen_in_the_file_not_in_its_name(tmp_path, kind):
    (tmp_path / "a.txt").write_bytes(plain(kind))
    found = read_header(tmp_path / "a.txt")
    assert (found.format, found.size, found.orientation, found.animated, found.transparent, found.profile) == (
        (kind, (6, 4), 1, False, False, "")
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_sizes_are_upright(kind, orientation):
    camera = Image.Exif()
    camera[0x0112] = orientation
    found = header(plain(kind, exif=camera))
    assert found.orientation == orientation
    assert found.size == ((6, 4) if orientation < 5 else (4, 6))


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_in_every_place_that_a_png_has(order):
    data = exif(6, order)
    as_text = b"\nexif\n%8d\n" % (len(data) + 6) + (b"Exif\0\0" + data).hex().encode()
    for chunks in (
        {"before": [(b"eXIf", data)]},
        {"after": [(b"tEXt", b"a\0b"), (b"eXIf", data)]},
        {"before": [(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(as_text))]},
    ):
        assert header(png(6, 4, 8, 0, bytes(24), **chunks)).orientation == 6


def test_letters_that_look_like_exif_do_not_turn_a_picture():
    before = png_chunk(b"eXIf", exif(6))[:-1] + b"x"  # its checksum is wrong
    assert header(png(6, 4, 8, 0, bytes(24), after=[(b"tEXt", b"a\0" + before)])).orientation == 1


@pytest.mark.parametrize("damaged", [b"", b"II*\0", exif(6)[:12], exif(9), exif(0), b"x" * 40, exif(6)[:-20]])
@pytest.mark.filterwarnings("error")
def test_damaged_exif_leaves_the_picture_as_it_lies_and_prints_nothing(damaged):
    assert header(png(6, 4, 8, 0, bytes(24), before=[(b"eXIf", damaged)])).orientation == 1
    assert header(plain("JPEG", exif=b"Exif\0\0" + damaged)).orientation == 1


@pytest.mark.parametrize(
    ("bits", "colour_type", "mode"),
    [(1, 0, "1"), (2, 0, "L"), (16, 0, "I;16"), (8, 2, "RGB"), (16, 2, "RGB"), (4, 3, "P"), (16, 6, "RGBA")],
)
def test_bits_of_a_png(bits, colour_type, mode):
    row = {0: 1, 2: 3, 3: 1, 6: 4}[colour_type] * bits
    found = header(png(8, 1, bits, colour_type, bytes(row), before=[(b"PLTE", bytes(6))]))
    assert (found.bits, found.mode) == (bits, mode)


def test_bits_of_a_tiff():
    assert header(tiff(1, 1, (16, 16, 16), 2, bytes(6))).bits == 16
    assert header(tiff(8, 1, (1,), 1, bytes(1))).bits == 1


def test_transparency_by_alpha_key_palette_or_a_frame_that_leaves_room():
    rows = bytes(24)
    assert header(png(6, 4, 8, 0, rows, before=[(b"tRNS", b"\0\7")])).transparent
    assert header(png(6, 4, 8, 3, rows, before=[(b"PLTE", bytes(6)), (b"tRNS", b"\x80")])).transparent
    assert header(plain("WEBP", "RGBA", lossless=True)).transparent
    assert header(plain("GIF", "P", transparency=0)).transparent
    whole = b"GIF89a\3\0\1\0\x80\0\0" + bytes(6) + b",\0\0\0\0\3\0\1\0\0" + b"\2\2\x4c\1\0;"
    assert not header(whole).transparent
    assert header(whole.replace(b",\0\0\0\0\3\0", b",\1\0\0\0\1\0")).transparent


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_more_frames_are_told(kind):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "green", "blue")]
    assert header(saved(frames[0], kind, save_all=True, append_images=frames[1:])).animated


def test_a_jpeg_of_several_pictures_is_its_first():
    left, right = Image.new("RGB", (16, 8), "red"), Image.new("RGB", (8, 8), "blue")
    found = header(saved(left, "MPO", save_all=True, append_images=[right]))
    assert (found.format, found.size, found.animated) == ("JPEG", (16, 8), False)


def test_profiles_by_title():
    assert header(plain("JPEG", icc_profile=ADOBE_RGB)).profile == "My camera's RGB"
    assert header(plain("WEBP", icc_profile=ADOBE_RGB)).profile == "My camera's RGB"
    assert header(plain("TIFF", icc_profile=ADOBE_RGB)).profile == "My camera's RGB"
    assert header(plain("JPEG", icc_profile=b"junk" * 50)).profile == "unreadable"
    assert header(plain("JPEG", "CMYK", icc_profile=ADOBE_RGB)).profile == "unreadable"
    assert header(png(6, 4, 8, 0, bytes(24), before=[(b"iCCP", b"x\0\0no zlib")])).profile == "unreadable"


# --- what it costs -----------------------------------------------------------------------------------


class Counting(io.BytesIO):
    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data


def test_pixels_are_neither_read_nor_decoded():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8))
    for kind, limit in (("PNG", 70_000), ("JPEG", 2_000), ("TIFF", 2_000), ("BMP", 2_000)):
        file = Counting(saved(noise, kind))
        assert len(file.getvalue()) > 150_000
        assert read_header(file).size == (600, 600)
        assert file.taken < limit
    damaged = bytearray(saved(noise, "PNG"))
    damaged[10_000:-100] = bytes(len(damaged) - 10_100)
    assert header(bytes(damaged)).size == (600, 600)


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty; replace or remove the file"),
        (b"hello\n", "is text, not a picture; replace or remove the file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer, not the picture itself; fetch the pictures with `git lfs pull`",
        ),
        (b"\xef\xbb\xbf\n <!DOCTYPE html><html>", "is a web page, not a picture; download the picture again"),
        (b"<HTML><head>", "is a web page"),
        (b"<svg xmlns=''>", "is an SVG drawing or other XML, which is not read; convert it to PNG or JPEG"),
        (b"\xff\x0a\xfa\x0f", "is a JPEG XL picture, which is not read; convert it"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "is a JPEG XL picture"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is an HEIC picture"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "is an HEIC picture"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isom", "is a film"),
        (b"8BPS\0\1", "is a Photoshop document"),
        (b"\0\1\2\3\4\5", "is not a picture in a known format; expected JPEG, PNG, WebP, AVIF, GIF, BMP or TIFF"),
    ],
)
def test_what_is_no_picture_is_named_for_what_it_is(data, reason):
    assert refusal(data).startswith(reason)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(
        DataError, match=r"b\.png: cannot be read \(No such file or directory\); restore or remove the file$"
    ):
        read_header(tmp_path / "b.png")
    (tmp_path / "c.png").mkdir()
    with pytest.raises(DataError, match=r"c\.png: cannot be read \(Is a directory\); restore"):
        read_header(tmp_path / "c.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about the tags of a damaged TIFF
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_header_cut_short_is_refused(kind):
    data = saved(Image.new("RGB", (600, 400)), kind)
    for length in (12, 20, 32):
        if kind == "GIF" and length == 32:
            continue  # by then the frame has begun
        text = refusal(data[:length])
        assert text.startswith("cannot be read as a picture (") or "known format" in text
        assert text.endswith("replace or remove the file") or "known format" in text


def test_pixels_whose_white_is_unknown_are_refused():
    assert refusal(plain("TIFF", "F")) == (
        "has floating-point pixels, whose black and white are not known; save it with 8 or 16 bits"
    )
    assert refusal(plain("TIFF", "I")).startswith("has signed or 32-bit pixels, whose black and white are not known")
    assert refusal(plain("TIFF", "YCbCr")) == (
        "is a TIFF of uncompressed YCbCr pixels, which cannot be read; save it as RGB"
    )


def huge_png(width: int, height: int) -> bytes:
    data = png(1, 1, 8, 2, bytes(3))
    return data[:8] + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + data[33:]


def test_more_than_178_megapixels_are_refused_and_fewer_print_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert header(huge_png(17_895, 10_000)).size == (17_895, 10_000)
        assert header(tiff(17_895, 10_000, (8,), 1, b"")).size == (17_895, 10_000)
        for data in (huge_png(17_896, 10_000), tiff(17_896, 10_000, (8,), 1, b""), huge_png(2**31 - 1, 2**31 - 1)):
            assert refusal(data) == "has more than 178 megapixels; resize it"


def test_a_jpeg_may_be_larger_as_it_can_be_decoded_at_an_eighth():
    large = flat_jpeg(64, 64).replace(struct.pack(">HH", 64, 64), struct.pack(">HH", 65_000, 65_000))
    assert header(large).size == (65_000, 65_000)
    progressive = large.replace(b"\xff\xc0", b"\xff\xc2")
    assert refusal(progressive) == "has more than 178 megapixels; resize it"

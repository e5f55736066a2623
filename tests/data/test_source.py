import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdlora.config import DataSection
from sdlora.data.source import fill_trigger, open_dataset, read_picture
from sdlora.errors import DataError


def picture(path: Path, colour=(255, 0, 0), size=(6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def caption(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


# --- folders and captions ----------------------------------------------------------------------------


def test_a_folder_and_its_parent_give_the_same_pictures(tmp_path):
    leaf = tmp_path / "parent" / "cats"
    for name in ("b.png", "a.JPG", "c.webp"):
        caption(picture(leaf / name).with_suffix(".txt"), f"caption of {name}")
    from_leaf = open_dataset(DataSection(folder=str(leaf)))
    from_parent = open_dataset(DataSection(folder=str(tmp_path / "parent")))
    assert from_leaf.samples == from_parent.samples
    assert [sample.path.name for sample in from_leaf.samples] == ["a.JPG", "b.png", "c.webp"]
    assert [sample.caption for sample in from_leaf.samples] == [f"caption of {n}" for n in ("a.JPG", "b.png", "c.webp")]
    assert from_leaf.summary() == f"3 pictures in {leaf}, 3 with their own caption"


def test_what_is_no_picture_of_the_user_is_left_out(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / ".thumbnails" / "a.png")
    picture(tmp_path / ".a.png")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "a_0512x0512_sd.npz").write_bytes(b"")
    dataset = open_dataset(DataSection(folder=str(tmp_path), caption="x"))
    assert [sample.path for sample in dataset.samples] == [tmp_path / "a.png"]


def test_a_data_folder_below_a_hidden_one_is_read(tmp_path):
    picture(tmp_path / ".cache" / "cats" / "a.png")
    assert len(open_dataset(DataSection(folder=str(tmp_path / ".cache" / "cats"), caption="x")).samples) == 1


def test_captions_beside_the_picture_win_over_the_common_one(tmp_path):
    caption(picture(tmp_path / "a.png").with_suffix(".caption"), "\ufeff  own [trigger], ünïcode \r\n\n")
    picture(tmp_path / "b.png")
    caption(picture(tmp_path / "c.png").with_suffix(".txt"), "")
    dataset = open_dataset(DataSection(folder=str(tmp_path), caption="photo of [trigger]", trigger="zorb"))
    assert [sample.caption for sample in dataset.samples] == ["own zorb, ünïcode", "photo of zorb", ""]
    assert dataset.captioned == 2


def test_pictures_without_caption_are_an_error_that_counts_them(tmp_path):
    caption(picture(tmp_path / "a.png").with_suffix(".txt"), "x")
    picture(tmp_path / "b.png")
    picture(tmp_path / "c.png")
    with pytest.raises(
        DataError, match=r"b\.png: has no caption file \(b\.txt\), and 1 other pictures have none; write"
    ):
        open_dataset(DataSection(folder=str(tmp_path)))


def test_a_caption_of_several_lines_or_not_in_utf8_is_an_error(tmp_path):
    picture(tmp_path / "a.png")
    caption(tmp_path / "a.txt", "one\ntwo\n")
    with pytest.raises(DataError, match=r"a\.txt: holds 2 lines; a caption is one line"):
        open_dataset(DataSection(folder=str(tmp_path)))
    (tmp_path / "a.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt: cannot be read as UTF-8"):
        open_dataset(DataSection(folder=str(tmp_path)))


def test_a_placeholder_without_a_trigger_is_an_error(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"holds \[trigger\] but data\.trigger is not set"):
        open_dataset(DataSection(folder=str(tmp_path), caption="a [trigger]"))
    assert fill_trigger("[trigger] and [trigger]", "x") == "x and x"
    assert fill_trigger("plain", "") == "plain"


def test_a_missing_folder_a_file_and_a_folder_without_pictures(tmp_path):
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        open_dataset(DataSection(folder=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"a\.png: is a file; data\.folder must name the folder it lies in"):
        open_dataset(DataSection(folder=str(picture(tmp_path / "x" / "a.png"))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no pictures \(it is empty\)"):
        open_dataset(DataSection(folder=str(tmp_path / "empty")))
    (tmp_path / "empty" / "a.psd").write_text("x")
    with pytest.raises(DataError, match=r"it holds files of type \.psd\); expected .*\.png"):
        open_dataset(DataSection(folder=str(tmp_path / "empty")))


def test_the_fingerprint_follows_captions_names_and_sizes(tmp_path):
    picture(tmp_path / "a.png")
    section = DataSection(folder=str(tmp_path), caption="x")
    first = open_dataset(section).fingerprint()
    assert open_dataset(section).fingerprint() == first
    assert open_dataset(DataSection(folder=str(tmp_path), caption="y")).fingerprint() != first
    picture(tmp_path / "b.png")
    assert open_dataset(section).fingerprint() != first


# --- pictures ----------------------------------------------------------------------------------------


def pixels(path: Path) -> np.ndarray:
    opened = read_picture(path)
    assert opened.mode == "RGB"
    return np.asarray(opened)


def test_exif_orientation_is_applied(tmp_path):
    upright = np.zeros((2, 3, 3), np.uint8)
    upright[0, 0] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png"), upright)


def test_transparency_is_laid_on_white(tmp_path):
    values = np.array([[[255, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    Image.fromarray(values, "RGBA").save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    Image.fromarray(np.array([[[7, 255], [7, 0]]], np.uint8), "LA").save(tmp_path / "b.png")
    assert pixels(tmp_path / "b.png").tolist() == [[[7, 7, 7], [255, 255, 255]]]


def test_palettes_with_and_without_transparency(tmp_path):
    paletted = Image.new("P", (2, 1))
    paletted.putpalette([0, 0, 255, 0, 255, 0])
    paletted.putdata([0, 1])
    paletted.save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[[0, 0, 255], [0, 255, 0]]]
    paletted.save(tmp_path / "b.png", transparency=1)
    assert pixels(tmp_path / "b.png").tolist() == [[[0, 0, 255], [255, 255, 255]]]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png")[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    Image.fromarray(grey).save(tmp_path / "b.png", transparency=5)
    assert pixels(tmp_path / "b.png")[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def test_cmyk_and_grey_become_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - (255, 0, 0)).max() < 12
    Image.new("L", (2, 2), 77).save(tmp_path / "b.bmp")
    assert (pixels(tmp_path / "b.bmp") == 77).all()
    Image.new("1", (2, 2), 1).save(tmp_path / "c.png")
    assert (pixels(tmp_path / "c.png") == 255).all()


def test_a_truncated_jpeg_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(
        DataError, match=r"a\.jpg: cannot be read as a picture \(image file is truncated.*replace or remove"
    ):
        read_picture(tmp_path / "a.jpg")


def test_text_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(DataError, match=r"a\.png: cannot be read as a picture \(it is not a picture\)"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"b\.png: cannot be read as a picture \(.*No such file"):
        read_picture(tmp_path / "b.png")


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(DataError, match=r"a\.png: has more than 178 megapixels; resize it"):
        read_picture(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about broken EXIF
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
def test_random_damage_is_refused_or_harmless(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # a damaged size must not fill the test's memory
    draw = random.Random(3)
    gradient = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3
    gradient.save(buffer, kind, **({} if kind == "bmp" else {"exif": exif}))
    sound = buffer.getvalue()
    path = tmp_path / f"a.{kind}"
    refused = 0
    for _ in range(150):
        data = bytearray(sound)
        if draw.random() < 0.2:
            del data[draw.randrange(len(data)) :]
        for _ in range(draw.choice((1, 2, 4))):
            if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            assert read_picture(path).mode == "RGB"
        except DataError as error:
            refused += 1
            assert str(error).startswith(str(path))
    assert refused > 10


# --- pictures of other things ------------------------------------------------------------------------


def test_pictures_of_the_prior_folder_come_last_and_are_marked(tmp_path):
    caption(picture(tmp_path / "cats" / "b.png").with_suffix(".txt"), "[trigger]")
    caption(picture(tmp_path / "others" / "a.png").with_suffix(".txt"), "a dog")
    section = DataSection(folder=str(tmp_path / "cats"), prior_folder=str(tmp_path / "others"), trigger="mycat")
    dataset = open_dataset(section)
    assert [(s.path.name, s.caption, s.prior) for s in dataset.samples] == [
        ("b.png", "mycat", False),
        ("a.png", "a dog", True),
    ]
    assert dataset.summary() == f"1 picture in {tmp_path / 'cats'}, 1 with their own caption; 1 of other things"
    bare = open_dataset(section.model_copy(update={"prior_folder": ""}))
    assert dataset.fingerprint() != bare.fingerprint()


def test_a_prior_folder_must_lie_apart_and_have_captions_of_its_own(tmp_path):
    caption(picture(tmp_path / "cats" / "b.png").with_suffix(".txt"), "a cat")
    picture(tmp_path / "others" / "a.png")
    with pytest.raises(DataError, match=r"others/a\.png: has no caption file .* each saying what its picture shows"):
        open_dataset(DataSection(folder=str(tmp_path / "cats"), prior_folder=str(tmp_path / "others"), caption="a cat"))
    with pytest.raises(DataError, match=r"b\.png: lies in data\.folder and in data\.prior_folder"):
        open_dataset(DataSection(folder=str(tmp_path / "cats"), prior_folder=str(tmp_path / "cats")))
    with pytest.raises(DataError, match=r"data\.prior_folder must name"):
        open_dataset(DataSection(folder=str(tmp_path / "cats"), prior_folder=str(tmp_path / "nowhere")))

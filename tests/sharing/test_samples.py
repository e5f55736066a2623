"""Pictures that are shared hold pixels and nothing else."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from shared_files import save_picture

from sdlora.data.pictures import read_picture
from sdlora.errors import DataError
from sdlora.sharing.samples import preview_png, samples, thumbnail_url


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_nothing_but_pixels_is_left(tmp_path, suffix):
    path = save_picture(tmp_path / f"anna{suffix}")
    assert b"anna lives here" in path.read_bytes()
    (sample,) = samples([(path, "a\nzorblin")])
    assert (sample.place, sample.prompt) == (f"samples/00{'.jpg' if suffix == '.jpg' else '.png'}", "a zorblin")
    assert b"anna" not in sample.data and b"ICC" not in sample.data and b"Exif" not in sample.data
    image = opened(sample.data)
    assert image.size == (20, 40) and not image.getexif()  # upright now
    if suffix == ".png":
        assert np.array_equal(np.asarray(image), np.asarray(read_picture(path)))


def test_they_are_numbered_and_what_is_no_picture_is_refused(tmp_path, picture):
    assert [sample.place for sample in samples([(picture, "")] * 2)] == ["samples/00.png", "samples/01.png"]
    (tmp_path / "a.png").write_text("<html>")
    with pytest.raises(DataError, match=r"a\.png"):
        samples([(tmp_path / "a.png", "")])


def test_previews_and_thumbnails_are_small(tmp_path):
    path = save_picture(tmp_path / "large.png", (3000, 1500))
    assert opened(preview_png(path)).size == (512, 1024)
    url = thumbnail_url(path)
    head, _, data = url.partition(",")
    image = opened(base64.b64decode(data))
    assert (head, image.format, image.size) == ("data:image/jpeg;base64", "JPEG", (128, 256))

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.data.buckets import bucket_step, choose_bucket, fit_picture, make_buckets
from sdlora.families.base import PictureSize


@pytest.mark.parametrize(("resolution", "step"), [(64, 8), (128, 16), (256, 32), (512, 64), (768, 64), (1024, 64)])
def test_bucket_step(resolution, step):
    assert bucket_step(resolution) == step


def test_the_buckets_of_512_are_those_of_kohyas_trainer():
    wide = [(512, 512), (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256)]
    wide += [(448, 576), (384, 640), (320, 768)]  # in this order of the loop, floor(area / width) differs
    buckets = make_buckets(512)
    assert set(wide) <= set(buckets)
    assert set(buckets) == {(h, w) for w, h in buckets}
    assert len(buckets) == len(set(buckets)) == 17


@pytest.mark.parametrize("resolution", [64, 128, 512, 768])
def test_buckets_keep_the_area_and_the_step(resolution):
    step = bucket_step(resolution)
    for width, height in make_buckets(resolution):
        assert width % step == height % step == 0
        assert resolution // 2 <= min(width, height)
        assert max(width, height) <= resolution * 2
        assert resolution**2 - step * max(width, height) < width * height <= resolution**2


def test_a_resolution_that_is_too_small_for_steps_has_the_square_only():
    assert make_buckets(8) == [(8, 8)]


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((3000, 3100), (512, 512)),
        ((1600, 900), (640, 384)),
        ((900, 1600), (384, 640)),
        ((3, 2), (640, 384)),
        ((10_000, 10), (1024, 256)),
    ],
)
def test_the_nearest_bucket(size, bucket):
    chosen = choose_bucket(*size, make_buckets(512))
    distances = {b: abs(np.log(b[0] / b[1]) - np.log(size[0] / size[1])) for b in make_buckets(512)}
    assert distances[chosen] == min(distances.values())
    assert chosen == bucket


def gradient(width: int, height: int) -> Image.Image:
    values = np.zeros((height, width, 3), np.uint8)
    values[..., 0] = np.arange(width)
    values[..., 1] = np.arange(height)[:, None]
    values[..., 2] = 255
    return Image.fromarray(values)


def test_a_picture_of_the_buckets_size_keeps_its_pixels():
    fitted = fit_picture(gradient(24, 16), (24, 16))
    assert fitted.pixels.shape == (3, 16, 24)
    assert fitted.pixels.dtype == torch.float32
    assert fitted.pixels.is_contiguous()
    expected = torch.arange(24, dtype=torch.float32).expand(16, 24) / 127.5 - 1
    assert torch.equal(fitted.pixels[0], expected)
    assert torch.equal(fitted.pixels[2], torch.ones(16, 24))
    assert fitted.size == PictureSize((16, 24), (0, 0), (16, 24))


def test_a_wider_picture_is_cropped_around_its_centre():
    fitted = fit_picture(gradient(26, 16), (16, 16))
    torch.testing.assert_close((fitted.pixels[0, 0] + 1) * 127.5, torch.arange(5.0, 21.0))
    assert fitted.size == PictureSize((16, 26), (0, 5), (16, 16))


def test_a_taller_picture_is_cropped_around_its_centre():
    fitted = fit_picture(gradient(16, 31), (16, 16))
    torch.testing.assert_close((fitted.pixels[1, :, 0] + 1) * 127.5, torch.arange(7.0, 23.0))
    assert fitted.size == PictureSize((31, 16), (7, 0), (16, 16))


def test_a_larger_picture_is_scaled_down_to_cover():
    fitted = fit_picture(gradient(200, 100), (32, 32))
    # scaled to 64 x 32; column c covers pixels from 200 / 64 * c, columns 16 to 47 are left
    expected = (torch.arange(16, 48) + 0.5) * 200 / 64 - 0.5
    torch.testing.assert_close((fitted.pixels[0, 16] + 1) * 127.5, expected, atol=0.51, rtol=0)
    assert fitted.size == PictureSize((100, 200), (0, 16), (32, 32))


def test_a_smaller_picture_is_scaled_up():
    fitted = fit_picture(gradient(5, 3), (32, 24))
    assert fitted.pixels.shape == (3, 24, 32)
    assert fitted.pixels.abs().max() <= 1


def test_scaling_only_what_is_kept_changes_nothing_in_it():
    noise = np.random.default_rng(0).integers(0, 256, (90, 250, 3), dtype=np.uint8)
    fitted = fit_picture(Image.fromarray(noise), (64, 48))
    whole = Image.fromarray(noise).resize((133, 48), Image.Resampling.LANCZOS).crop((34, 0, 98, 48))
    expected = torch.from_numpy(np.asarray(whole, np.float32)).permute(2, 0, 1)
    torch.testing.assert_close((fitted.pixels + 1) * 127.5, expected, atol=1.01, rtol=0)


def test_a_long_thin_picture_takes_no_more_memory_than_its_bucket():
    # Scaled as a whole it would have 256 thousand megapixels.
    fitted = fit_picture(Image.new("RGB", (1_000_000, 1), "red"), (512, 512))
    assert fitted.pixels.shape == (3, 512, 512)
    assert fitted.size.crop_top_left == (0, 255_999_744)

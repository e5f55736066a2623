import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdlora.config import BucketsSection
from sdlora.data.buckets import (
    assign_buckets,
    bucket_step,
    choose_buckets,
    classic_buckets,
    crop_of,
    cropped_share,
    cut_mask,
    describe_buckets,
    fit_picture,
    fitted_buckets,
    fitted_step,
    mirrored,
)
from sdlora.errors import ConfigError
from sdlora.families.base import PictureSize

properties = settings(deadline=None, derandomize=True, max_examples=80)
sides = st.integers(1, 6000)
sizes = st.lists(st.tuples(sides, sides), min_size=1, max_size=30)
PHONE = [(4032, 3024)] * 6 + [(3024, 4032)] * 3 + [(1080, 1920)] * 2
LIMITS = st.sampled_from(
    [(512, 0, 0, 0), (1024, 0, 0, 0), (64, 0, 0, 0), (512, 64, 320, 768), (520, 0, 0, 0), (768, 32, 0, 0)]
)


@pytest.mark.parametrize(("resolution", "step"), [(64, 8), (128, 16), (256, 32), (512, 64), (768, 64), (1024, 64)])
def test_bucket_step(resolution, step):
    assert bucket_step(resolution) == step


def test_the_classic_buckets_of_512_are_those_of_kohyas_trainer():
    wide = [(512, 512), (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256)]
    wide += [(448, 576), (384, 640), (320, 768)]  # in this order of the loop, floor(area / width) differs
    buckets = classic_buckets(512)
    assert set(wide) <= set(buckets)
    assert set(buckets) == {(h, w) for w, h in buckets}
    assert len(buckets) == len(set(buckets)) == 17


@pytest.mark.parametrize("resolution", [64, 128, 512, 768])
def test_classic_buckets_keep_the_area_and_the_step(resolution):
    step = bucket_step(resolution)
    for width, height in classic_buckets(resolution):
        assert width % step == height % step == 0
        assert resolution // 2 <= min(width, height)
        assert max(width, height) <= resolution * 2
        assert resolution**2 - step * max(width, height) < width * height <= resolution**2


def test_the_limits_of_classic_buckets_can_be_set():
    assert classic_buckets(512, 128, 384, 640) == [(384, 640), (512, 512), (640, 384)]
    assert classic_buckets(512, 0, 300, 700) == [  # 320 to 640
        (320, 640),
        (384, 640),
        (448, 576),
        (512, 512),
        (576, 448),
        (640, 320),
        (640, 384),
    ]


def test_a_resolution_that_is_too_small_for_steps_has_the_square_only():
    assert classic_buckets(8) == [(8, 8)]


def test_the_square_of_a_resolution_that_is_no_multiple_of_the_step_is_smaller():
    assert (512, 512) in classic_buckets(520)
    assert (520, 520) not in classic_buckets(520)


@pytest.mark.parametrize("limits", [(512, 0, 640, 0), (512, 0, 0, 448), (512, 768, 0, 0)])
def test_limits_without_room_for_the_square_are_refused(limits):
    expected = (
        r"data\.buckets: in steps of \d+ from min_side = \d+ to max_side = \d+ pixels .* the resolution 512; change"
    )
    for make in (classic_buckets, lambda *limits: fitted_buckets(PHONE, *limits)):
        with pytest.raises(ConfigError, match=expected):
            make(*limits)


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
    chosen = choose_buckets([size], classic_buckets(512))[0]
    distances = {b: abs(np.log(b[0] / b[1]) - np.log(size[0] / size[1])) for b in classic_buckets(512)}
    assert distances[chosen] == min(distances.values())
    assert chosen == bucket


def test_of_buckets_that_keep_as_much_the_larger_is_chosen_then_the_narrower():
    assert choose_buckets([(300, 200)], [(384, 256), (576, 384), (96, 64)])[0] == (576, 384)
    for buckets in ([(640, 320), (320, 640)], [(320, 640), (640, 320)]):
        assert choose_buckets([(7, 7)], buckets)[0] == (320, 640)


@pytest.mark.parametrize(
    ("size", "bucket", "share"),
    [
        ((300, 200), (600, 400), 0),
        ((400, 100), (512, 512), 0.75),
        ((100, 400), (512, 512), 0.75),
        ((1600, 900), (640, 384), 1 - 15 / 16),
    ],
)
def test_cropped_share(size, bucket, share):
    assert cropped_share(*size, bucket) == pytest.approx(share, abs=1e-12)


def test_fitted_buckets_of_phone_pictures_are_their_own_shapes():
    shapes = fitted_buckets(PHONE, 768)
    assert len(shapes) == 3
    assert all(min(cropped_share(*size, shape) for shape in shapes) < 0.01 for size in PHONE)
    assert all(width * height > 0.9 * 768**2 for width, height in shapes)
    assert fitted_buckets(PHONE, 512, 64, count=3) == [(384, 640), (448, 576), (576, 448)]


def test_one_shape_is_enough_for_pictures_of_one_aspect():
    assert fitted_buckets([(832, 1216)] * 3 + [(1664, 2432)], 1024) == [(832, 1216)]
    assert fitted_buckets([(700, 700)] * 9, 512) == [(512, 512)]


def test_the_largest_shape_of_an_aspect_is_taken():
    assert fitted_buckets([(300, 200)], 512, 32) == [(576, 384)]  # not 528x352 nor 480x320


def test_a_single_allowed_shape_is_the_median():
    few = [(100, 200)] * 2 + [(100, 100)] * 4 + [(200, 100)]
    assert fitted_buckets(few, 512, count=1) == [(512, 512)]


def test_without_sizes_there_is_the_square():
    assert fitted_buckets([], 512) == [(512, 512)]
    assert assign_buckets([], BucketsSection(), 512) == []


@properties
@given(sizes, LIMITS, st.integers(0, 5))
def test_fitted_buckets_keep_to_limits_area_and_count(pictures, limits, count):
    resolution, step, low, high = limits
    step = step or fitted_step(resolution)
    buckets = fitted_buckets(pictures, *limits, count)
    assert buckets == sorted(set(buckets))
    assert 1 <= len(buckets) <= (count or len(classic_buckets(*limits)))
    for width, height in buckets:
        assert width % step == height % step == 0
        assert (low or resolution // 2 // step * step) <= min(width, height)
        assert max(width, height) <= (high or 2 * resolution)
        assert width * height <= resolution**2
        assert width * height >= 0.8 * resolution**2 or (width, height) in classic_buckets(*limits)


@properties
@given(sizes, LIMITS, st.randoms(use_true_random=False))
def test_the_order_of_pictures_does_not_matter(pictures, limits, random):
    mixed = random.sample(pictures, len(pictures))
    assert fitted_buckets(mixed, *limits) == fitted_buckets(pictures, *limits)
    chosen = assign_buckets(pictures, BucketsSection(upscale=False), limits[0])
    again = assign_buckets(mixed, BucketsSection(upscale=False), limits[0])
    assert sorted(zip(pictures, chosen, strict=True)) == sorted(zip(mixed, again, strict=True))


def mean_crop(pictures, buckets) -> float:
    return sum(cropped_share(*size, choose_buckets([size], buckets)[0]) for size in pictures) / len(pictures)


@properties
@given(sizes, LIMITS)
def test_fitted_buckets_crop_no_more_than_the_classic_ones(pictures, limits):
    # but for what is given for fewer shapes and for area: 2% of a picture a shape, 5% of the missing area
    classic = classic_buckets(*limits)
    used = {choose_buckets([size], classic)[0] for size in pictures}
    hair = 0.02 * len(used) / len(pictures) + 0.05 * 0.3
    fitted = fitted_buckets(pictures, *limits)
    assert mean_crop(pictures, fitted) <= mean_crop(pictures, classic) + hair + 1e-9


@settings(properties, max_examples=30)
@given(st.lists(st.tuples(st.integers(30, 90), st.integers(30, 90)), min_size=1, max_size=15), st.integers(1, 3))
def test_no_other_choice_of_shapes_is_better(pictures, count):
    step, area = 16, 96 * 96
    steps = range(48, 193, step)
    shapes = [(w, h) for w, h in itertools.product(steps, steps) if 0.8 * area <= w * h <= area]
    shapes = sorted({*shapes, *classic_buckets(96, step)})
    crops = np.array([[cropped_share(*size, shape) for size in pictures] for shape in shapes])
    charges = np.array([0.1 * (1 - w * h / area) for w, h in shapes])

    def cost(chosen: list[int]) -> float:
        best = crops[chosen].argmin(axis=0)
        return float((crops[chosen].min(axis=0) + charges[chosen][best]).sum()) + 0.05 * len(chosen)

    every = (list(chosen) for n in range(1, count + 1) for chosen in itertools.combinations(range(len(shapes)), n))
    fitted = [shapes.index(shape) for shape in fitted_buckets(pictures, 96, step, count=count)]
    # up to 10% of 0.2 of one picture: of two shapes that crop as much, either may be the one that is charged
    assert cost(fitted) <= min(map(cost, every)) + 0.02


def test_a_hundred_thousand_pictures_are_fitted_and_assigned():
    many = np.random.default_rng(0).integers(300, 5000, (100_000, 2)).tolist()
    chosen = assign_buckets([tuple(size) for size in many], BucketsSection(step=8), 1024)
    assert len(set(chosen)) > 50


@properties
@given(sizes, LIMITS, st.sampled_from(["fitted", "classic"]))
def test_every_picture_gets_the_best_bucket(pictures, limits, shapes):
    resolution, step, low, high = limits
    rules = BucketsSection(shapes=shapes, step=step, min_side=low, max_side=high)
    chosen = assign_buckets(pictures, rules, resolution)
    buckets = fitted_buckets(pictures, *limits) if shapes == "fitted" else classic_buckets(*limits)
    for size, bucket in zip(pictures, chosen, strict=True):
        least = min(cropped_share(*size, other) for other in buckets)
        assert cropped_share(*size, bucket) == least
        assert bucket == choose_buckets([size], buckets)[0]
        equal = [other for other in buckets if cropped_share(*size, other) == least]
        assert bucket[0] * bucket[1] == max(w * h for w, h in equal)


def test_without_buckets_every_picture_gets_the_square():
    rules = BucketsSection(enabled=False, upscale=False)
    assert assign_buckets([(100, 50), (3000, 200)], rules, 520) == [(520, 520)] * 2


def test_the_number_of_shapes_can_be_limited():
    assert len(set(assign_buckets(PHONE, BucketsSection(count=2), 512))) == 2


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((511, 512), (448, 512)),  # one pixel less than the square needs
        ((511, 700), (384, 576)),  # made smaller to the area: 437x599
        ((300, 200), (256, 192)),
        ((600, 300), (576, 256)),
        ((1000, 30), (960, 64)),  # enlarged to the step
        ((5, 3), (64, 64)),
        ((2000, 100), (1024, 64)),  # made smaller to the longest side
        ((1000, 400), (768, 320)),  # made smaller to the area: 809x324
        ((2000, 500), (1024, 256)),
        ((1_000_000, 1), (1024, 64)),
    ],
)
def test_small_pictures_keep_their_size_without_upscaling(size, bucket):
    squares = [(512, 512)] * 50
    rules = BucketsSection(upscale=False, count=1, step=64)
    assert assign_buckets([*squares, size], rules, 512)[-1] == bucket


def test_small_pictures_have_no_say_in_the_shapes_without_upscaling():
    small, large = [(400, 100)] * 90, [(900, 900)] * 10
    assert assign_buckets([*small, *large], BucketsSection(upscale=False, count=1), 512)[-1] == (512, 512)
    assert assign_buckets([*small, *large], BucketsSection(count=1), 512)[-1] == (1024, 256)


@properties
@given(sizes, LIMITS)
def test_without_upscaling_nothing_is_enlarged_but_to_the_step(pictures, limits):
    resolution, step, low, high = limits
    rules = BucketsSection(upscale=False, step=step, min_side=low, max_side=high)
    step = step or fitted_step(resolution)
    for size, bucket in zip(pictures, assign_buckets(pictures, rules, resolution), strict=True):
        assert all(side % step == 0 and side >= step for side in bucket)
        assert all(side <= max(step, own) for side, own in zip(bucket, size, strict=True))
        assert bucket[0] * bucket[1] <= resolution**2
        assert max(bucket) <= (high or 2 * resolution)


def test_a_description_counts_shapes_and_what_is_cropped():
    pictures = [(640, 384), (384, 640), (400, 640), (640, 384)]
    buckets = [(640, 384), (384, 640), (384, 640), (640, 384)]
    assert describe_buckets(pictures, buckets) == (
        "2 shapes: 384x640 x2, 640x384 x2; 1.0% cropped on average, at most 4.0%"
    )
    assert describe_buckets([(8, 8)], [(512, 512)]) == "1 shape: 512x512 x1; 0.0% cropped on average, at most 0.0%"
    assert describe_buckets([], []) == "no pictures"


def test_a_description_of_many_shapes_is_short():
    buckets = [(64 * n, 64) for n in range(1, 21)] + [(64, 64)]
    text = describe_buckets(buckets, buckets)
    assert text.startswith("20 shapes: 64x64 x2, 128x64 x1, ")
    assert ", 768x64 x1, 8 more x8; 0.0%" in text


def test_the_only_crop_is_around_the_centre():
    assert crop_of(200, 100, (32, 32)) == PictureSize((100, 200), (0, 16), (32, 32))
    assert crop_of(16, 31, (16, 16), 0, 1, "any seed") == PictureSize((31, 16), (7, 0), (16, 16))


def test_several_crops_are_fixed_by_the_seed_and_spread_over_the_free_range():
    crops = [crop_of(3000, 1000, (500, 500), crop, 4, "a") for crop in range(4)]
    lefts = [crop.crop_top_left[1] for crop in crops]
    assert all(crop.crop_top_left[0] == 0 for crop in crops)
    assert all(1001 * n // 4 - 1 <= left <= 1001 * (n + 1) // 4 for n, left in enumerate(lefts))
    assert crops == [crop_of(3000, 1000, (500, 500), crop, 4, "a") for crop in range(4)]
    assert crops != [crop_of(3000, 1000, (500, 500), crop, 4, "b") for crop in range(4)]
    assert len({left % 250 for left in lefts}) > 1  # at random within their parts


def test_both_ends_can_be_reached():
    tops = {crop_of(10, 12, (10, 10), 0, 2, seed).crop_top_left[0] for seed in range(50)}
    tops |= {crop_of(10, 12, (10, 10), 1, 2, seed).crop_top_left[0] for seed in range(50)}
    assert tops == {0, 1, 2}


@properties
@given(sides, sides, st.sampled_from(classic_buckets(512)), st.integers(1, 9), st.integers(0, 99))
def test_every_crop_lies_in_the_picture(width, height, bucket, crops, seed):
    for crop in range(crops):
        size = crop_of(width, height, bucket, crop, crops, seed)
        assert size.original == (height, width)
        assert size.target == (bucket[1], bucket[0])
        assert min(size.crop_top_left) >= 0
        mirror = mirrored(size)
        assert min(mirror.crop_top_left) >= 0
        assert mirrored(mirror) == size
        # the scaled picture covers the bucket, and is no larger than that needs
        left, top = mirror.crop_top_left[1] + size.crop_top_left[1], size.crop_top_left[0]
        scale = max(bucket[0] / width, bucket[1] / height)
        assert left + bucket[0] == pytest.approx(width * scale, abs=0.51)
        assert top + bucket[1] <= height * scale + 0.51


def test_mirroring_moves_the_crop_to_the_other_side():
    size = PictureSize((100, 200), (0, 10), (32, 32))  # scaled to 64 x 32
    assert mirrored(size) == PictureSize((100, 200), (0, 22), (32, 32))


def gradient(width: int, height: int) -> Image.Image:
    values = np.zeros((height, width, 3), np.uint8)
    values[..., 0] = np.arange(width)
    values[..., 1] = np.arange(height)[:, None]
    values[..., 2] = 255
    return Image.fromarray(values)


def centred(picture: Image.Image, bucket: tuple[int, int]) -> torch.Tensor:
    return fit_picture(picture, crop_of(picture.width, picture.height, bucket))


def test_a_picture_of_the_buckets_size_keeps_its_pixels():
    pixels = centred(gradient(24, 16), (24, 16))
    assert pixels.shape == (3, 16, 24)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    expected = torch.arange(24, dtype=torch.float32).expand(16, 24) / 127.5 - 1
    assert torch.equal(pixels[0], expected)
    assert torch.equal(pixels[2], torch.ones(16, 24))


def test_a_wider_picture_is_cropped_around_its_centre():
    pixels = centred(gradient(26, 16), (16, 16))
    torch.testing.assert_close((pixels[0, 0] + 1) * 127.5, torch.arange(5.0, 21.0))


def test_a_taller_picture_is_cropped_around_its_centre():
    pixels = centred(gradient(16, 31), (16, 16))
    torch.testing.assert_close((pixels[1, :, 0] + 1) * 127.5, torch.arange(7.0, 23.0))


def test_a_larger_picture_is_scaled_down_to_cover():
    pixels = centred(gradient(200, 100), (32, 32))
    # scaled to 64 x 32; column c covers pixels from 200 / 64 * c, columns 16 to 47 are left
    expected = (torch.arange(16, 48) + 0.5) * 200 / 64 - 0.5
    torch.testing.assert_close((pixels[0, 16] + 1) * 127.5, expected, atol=0.51, rtol=0)


def test_a_smaller_picture_is_scaled_up():
    pixels = centred(gradient(5, 3), (32, 24))
    assert pixels.shape == (3, 24, 32)
    assert pixels.abs().max() <= 1


def test_another_crop_is_cut_where_it_says():
    pixels = fit_picture(gradient(40, 16), PictureSize((16, 40), (0, 24), (16, 16)))
    torch.testing.assert_close((pixels[0, 0] + 1) * 127.5, torch.arange(24.0, 40.0))


def test_the_mirrored_crop_of_the_mirrored_picture_has_the_mirrored_pixels():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 130, 3), dtype=np.uint8))
    size = crop_of(130, 50, (32, 32), 2, 3, 5)
    flipped = fit_picture(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mirrored(size))
    torch.testing.assert_close(flipped.flip(-1), fit_picture(picture, size), atol=1.01 / 127.5, rtol=0)


def test_scaling_only_what_is_kept_changes_nothing_in_it():
    noise = np.random.default_rng(0).integers(0, 256, (90, 250, 3), dtype=np.uint8)
    pixels = centred(Image.fromarray(noise), (64, 48))
    whole = Image.fromarray(noise).resize((133, 48), Image.Resampling.LANCZOS).crop((34, 0, 98, 48))
    expected = torch.from_numpy(np.asarray(whole, np.float32)).permute(2, 0, 1)
    torch.testing.assert_close((pixels + 1) * 127.5, expected, atol=1.01, rtol=0)


def test_a_picture_decoded_at_a_quarter_gives_the_same_part():
    smooth = gradient(250, 120).resize((2000, 960), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    smooth.save(file, "jpeg", quality=95)
    size = crop_of(2000, 960, (96, 64), 1, 3, 0)
    whole = fit_picture(Image.open(file).convert("RGB"), size)
    draft = Image.open(file)
    draft.draft("RGB", (500, 240))
    assert draft.size == (500, 240)
    torch.testing.assert_close(fit_picture(draft, size), whole, atol=0.03, rtol=0)


def test_a_long_thin_picture_takes_no_more_memory_than_its_bucket():
    # Scaled as a whole it would have 256 thousand megapixels.
    size = crop_of(1_000_000, 1, (512, 512))
    assert size.crop_top_left == (0, 255_999_744)
    assert fit_picture(Image.new("RGB", (1_000_000, 1), "red"), size).shape == (3, 512, 512)


def test_a_mask_is_averaged_over_the_crop_of_its_picture():
    values = np.zeros((32, 96), np.uint8)
    values[:, 40:] = 255
    mask = cut_mask(Image.fromarray(values), PictureSize((32, 96), (0, 32), (32, 32)))
    assert mask.dtype == torch.float32
    assert torch.equal(mask, torch.tensor([0.0, 1.0, 1.0, 1.0]).expand(1, 4, 4))
    mask = cut_mask(Image.fromarray(values), PictureSize((32, 96), (0, 36), (32, 32)))
    assert torch.allclose(mask[0, 0], torch.tensor([0.5, 1.0, 1.0, 1.0]), atol=1 / 255)


def test_a_mask_fits_the_latents_of_a_scaled_picture():
    values = np.zeros((300, 500), np.uint8)
    values[:150] = 255
    mask = cut_mask(Image.fromarray(values), crop_of(500, 300, (64, 64)), factor=16)
    assert mask.shape == (1, 4, 4)
    assert torch.equal(mask[0, :, 0], torch.tensor([1.0, 1.0, 0.0, 0.0]))

"""Painting a part of a picture anew: what stays is kept bit for bit, what is made equals diffusers' pipeline."""

from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoPipelineForInpainting, DDIMScheduler
from engine_help import ask, make, painted_by_diffusers, pixels, same
from every_family import one_family
from PIL import Image

from sdlora.errors import DataError
from sdlora.generation.engine import Engine
from sdlora.generation.img2img.inpaint import blurred, canvas_of, filled, latent_mask, masked_box
from sdlora.generation.img2img.source import read_source
from sdlora.generation.pictures.infotext import infotext
from sdlora.generation.recipe import Recipe
from sdlora.storage import sha256_of_file


@pytest.fixture
def engine(tiny_base) -> Engine:
    return Engine(tiny_base())


@pytest.fixture
def photo(tmp_path) -> str:
    """A colourful picture of 64 x 64 pixels."""
    return painted(tmp_path / "photo.png", 64, 64)


@pytest.fixture
def mask(tmp_path) -> str:
    """White in the right half of 64 x 64 pixels."""
    return masked(tmp_path / "mask.png", (64, 64), (32, 0, 64, 64))


def painted(path: Path, width: int, height: int) -> str:
    coarse = Image.fromarray(np.random.default_rng(1).integers(0, 255, (4, 4, 3), np.uint8))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return str(path)


def masked(path: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> str:
    picture = Image.new("L", size)
    picture.paste(255, box)
    picture.save(path)
    return str(path)


def read(path: str) -> np.ndarray:
    return pixels(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_the_pixels_are_those_of_diffusers_own_pipeline(tiny_base, tiny_folder, shape, photo, mask, strength):
    """With DDIM: PNDM, the base's own, begins at another level than the picture's there."""
    base = tiny_base()
    base.sampler_config = {**base.sampler_config, "_class_name": "DDIMScheduler"}
    (ours,) = make(Engine(base), ask(seed=11, steps=5, image=photo, mask=mask, mask_blur=0, strength=strength))
    pipeline = AutoPipelineForInpainting.from_pretrained(tiny_folder(shape))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pixels(painted_by_diffusers(pipeline, photo, mask, strength))
    assert np.abs(ours - theirs)[:, 32:].max() <= 1
    assert np.mean(ours[:, 32:] != theirs[:, 32:]) < 0.01
    assert np.array_equal(ours[:, :32], read(photo)[:, :32])  # diffusers gives what its VAE makes of it


@one_family
@pytest.mark.parametrize("area", ["whole picture", "only masked"])
def test_outside_the_blurred_mask_no_pixel_changes(engine, tmp_path, area):
    photo = painted(tmp_path / "photo.png", 96, 80)
    mask = masked(tmp_path / "mask.png", (96, 80), (40, 40, 56, 60))
    (made,) = make(engine, ask(image=photo, mask=mask, mask_blur=2, inpaint_area=area, masked_padding=4, strength=1))
    changed = np.abs(made - read(photo)).max(axis=2) > 0
    ys, xs = np.nonzero(changed)
    assert made.shape == (80, 96, 3)
    assert (xs.min() >= 32 and xs.max() < 64) and (ys.min() >= 32 and ys.max() < 68)
    assert changed[42:58, 42:54].mean() > 0.9


@one_family
def test_only_masked_works_at_the_size_asked_for_and_keeps_the_pictures_own(engine, tmp_path):
    photo = painted(tmp_path / "photo.png", 100, 70)  # no multiples of 8
    mask = masked(tmp_path / "mask.png", (100, 70), (10, 10, 26, 26))
    shapes = []
    handle = engine.base.unet.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[-2:])))
    (made,) = make(engine, ask(image=photo, mask=mask, inpaint_area="only masked", width=48, height=32))
    handle.remove()
    assert made.shape == (70, 100, 3)
    assert set(shapes) == {(4, 6)}


@one_family
def test_a_batch_of_different_masks_equals_the_pictures_made_alone(engine, tmp_path, photo):
    masks = [masked(tmp_path / f"{n}.png", (64, 64), box) for n, box in enumerate([(0, 0, 24, 64), (40, 8, 64, 40)])]
    contents = ["latent noise", "fill"]
    requests = [
        ask(image=photo, mask=path, masked_content=content, seed=n, strength=0.8)
        for n, (path, content) in enumerate(zip(masks, contents, strict=True))
    ]
    together = {number: pixels(picture) for number, picture, _ in engine.generate_all(requests, batch_size=2)}
    for number, request in enumerate(requests):
        assert np.abs(together[number] - make(engine, request)[0]).max() <= 1


@one_family
def test_what_is_under_the_mask_at_first_makes_a_difference(engine, photo, mask):
    contents = ("original", "fill", "latent noise", "latent nothing")
    made = [make(engine, ask(image=photo, mask=mask, strength=0.4, steps=5, masked_content=c)) for c in contents]
    assert not any(same(one, other) for place, one in enumerate(made) for other in made[:place])


# --- arithmetic --------------------------------------------------------------------------------------


def test_a_latent_is_made_anew_where_any_of_its_pixels_is():
    mask = Image.new("L", (24, 16))
    mask.putpixel((9, 15), 128)
    mask.putpixel((23, 0), 127)
    assert latent_mask(mask, 8).tolist() == [[[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]]


@pytest.mark.parametrize(
    ("white", "padding", "shape", "expected"),
    [
        ((40, 40, 50, 50), 0, (64, 64), (40, 40, 50, 50)),
        ((40, 40, 50, 50), 5, (64, 64), (35, 35, 55, 55)),
        ((40, 40, 50, 50), 5, (64, 32), (25, 35, 65, 55)),  # twice as wide as high
        ((40, 40, 50, 50), 5, (32, 64), (35, 25, 55, 65)),
        ((0, 40, 10, 50), 5, (64, 32), (0, 35, 40, 55)),  # 15 x 20, moved in from the edge
        ((90, 40, 100, 50), 5, (64, 32), (60, 35, 100, 55)),
        ((0, 0, 100, 80), 32, (64, 64), (0, 0, 100, 80)),  # there is no more room
    ],
)
def test_the_box_around_a_mask(white, padding, shape, expected):
    mask = Image.new("L", (100, 80))
    mask.paste(255, white)
    assert masked_box(mask, padding, shape) == expected


def test_the_border_is_blurred_outside_what_is_made_anew(tmp_path):
    photo = painted(tmp_path / "photo.png", 64, 64)
    mask = masked(tmp_path / "mask.png", (64, 64), (16, 16, 48, 48))
    canvas = canvas_of(read_source(ask(image=photo, mask=mask, mask_blur=2)), (64, 64))
    row = np.asarray(canvas.paste_mask)[32]
    assert row[:9].tolist() == [0] * 9 and row[16:48].min() >= 250
    assert all(0 < value < 255 for value in row[14:16]) and list(row[8:17]) == sorted(row[8:17])


def test_without_a_blur_the_mask_is_hard():
    mask = Image.new("L", (8, 8))
    assert blurred(mask, 0) is mask


def test_fill_spreads_the_colours_from_around():
    picture = Image.new("RGB", (32, 32), (200, 40, 40))
    picture.paste((40, 40, 200), (16, 0, 32, 32))
    picture.paste((0, 255, 0), (8, 8, 24, 24))
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    made = pixels(filled(picture, mask))
    assert np.array_equal(made[:8], pixels(picture)[:8])
    assert made[8:24, 8:24, 1].max() <= 42  # nothing is left of the green
    assert made[16, 9, 0] > 140 and made[16, 22, 2] > 140  # red from the left, blue from the right
    assert pixels(filled(picture, Image.new("L", (32, 32), 255))).std() < 1  # nothing is known: an even grey


# --- refusals and recipes ----------------------------------------------------------------------------


@one_family
def test_a_mask_that_cannot_be_used_is_one_sentence(engine, tmp_path, photo):
    cases = {
        masked(tmp_path / "black.png", (64, 64), (0, 0, 0, 0)): "has no white pixel",
        masked(tmp_path / "tall.png", (64, 128), (0, 0, 9, 9)): "mask is 64x128, .*photo.png is 64x64; resize the mask",
        str(tmp_path / "missing.png"): "missing.png: cannot be read",
    }
    for path, sentence in cases.items():
        with pytest.raises(DataError, match=sentence):
            make(engine, ask(image=photo, mask=path))


@one_family
@pytest.mark.parametrize(
    "values", [{}, {"inpaint_area": "only masked"}, {"resize": "crop and resize", "width": 24, "mask_blur": 0.0}]
)
def test_a_mask_of_which_nothing_is_left_is_refused(engine, tmp_path, photo, values):
    """A blur of 4 pixels leaves less than half of a spot of 3, and cropping nothing of one at the side."""
    mask = masked(tmp_path / "spot.png", (64, 64), (2, 30, 5, 33))
    with pytest.raises(
        DataError, match=r"spot\.png: what is white in it is too small for a mask_blur of .* paint it larger"
    ):
        make(engine, ask(image=photo, mask=mask, height=64, **values))


@one_family
def test_a_mask_of_another_size_and_the_same_shape_is_scaled(engine, tmp_path, photo, mask):
    large = masked(tmp_path / "large.png", (256, 256), (128, 0, 256, 256))
    assert same(make(engine, ask(image=photo, mask=mask)), make(engine, ask(image=photo, mask=large)))


@one_family
def test_the_recipe_names_the_mask(engine, photo, mask):
    ((_, recipe),) = engine.generate(ask(image=photo, mask=mask, inpaint_area="only masked", masked_content="fill"))
    used = recipe.start.mask
    assert (used.picture.name, used.picture.sha256) == ("mask.png", sha256_of_file(Path(mask)))
    assert (used.blur, used.area, used.padding, used.content) == (4.0, "only masked", 32, "fill")
    assert Recipe.from_json(recipe.to_json()) == recipe
    text = infotext(recipe)
    assert "Mask blur: 4, Inpaint area: Only masked, Masked area padding: 32, Masked content: fill" in text

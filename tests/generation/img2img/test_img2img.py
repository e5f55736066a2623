"""Pictures made from pictures: the same pixels as diffusers' own pipelines, sizes, refusals, recipes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DDIMScheduler
from engine_help import ask, make, pixels, same
from every_family import one_family
from PIL import Image

from sdlora.errors import ConfigError, DataError
from sdlora.generation.engine import Engine
from sdlora.generation.img2img.source import fitted, work_size
from sdlora.generation.pictures.files import read_recipe, save_picture
from sdlora.generation.pictures.infotext import infotext
from sdlora.storage import sha256_of_file


@pytest.fixture
def engine(tiny_base) -> Engine:
    return Engine(tiny_base())


@pytest.fixture
def photo(tmp_path) -> str:
    """A colourful picture of 64 x 64 pixels."""
    return painted(tmp_path / "photo.png", 64, 64)


def painted(path: Path, width: int, height: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return str(path)


def img2img(folder: Path, **changed):
    pipeline = AutoPipelineForImage2Image.from_pretrained(folder)
    if changed:
        pipeline.scheduler = changed["scheduler"].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("shape", "strength", "steps"),
    [("sd1", 0.6, 5), ("sd1", 1.0, 4), ("sd1", 0.3, 10), ("sd2", 0.6, 5), ("sd2", 1.0, 4), ("sdxl", 0.6, 5)],
)
def test_the_pixels_are_those_of_diffusers_own_pipeline(tiny_base, tiny_folder, shape, photo, strength, steps):
    """With DDIM: PNDM, the base's own, begins at another level than the picture's there."""
    base = tiny_base()
    base.sampler_config = {**base.sampler_config, "_class_name": "DDIMScheduler"}
    ours = make(Engine(base), ask(seed=11, steps=steps, image=photo, strength=strength))
    theirs = img2img(tiny_folder(shape), scheduler=DDIMScheduler)(
        "a red ball",
        image=Image.open(photo),
        negative_prompt="blue",
        num_inference_steps=steps,
        strength=strength,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(11),
    ).images[0]
    assert np.abs(ours[0] - pixels(theirs)).max() <= 1
    assert np.mean(ours[0] != pixels(theirs)) < 0.01


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"])
def test_so_they_are_with_other_samplers(tiny_base, tiny_folder, shape, photo, name):
    import diffusers

    base = tiny_base()
    base.sampler_config = {**base.sampler_config, "_class_name": name}
    ours = make(Engine(base), ask(seed=3, steps=6, image=photo, strength=0.5))
    theirs = img2img(tiny_folder(shape), scheduler=getattr(diffusers, name))(
        "a red ball",
        image=Image.open(photo),
        negative_prompt="blue",
        num_inference_steps=6,
        strength=0.5,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert np.abs(ours[0] - pixels(theirs)).max() <= 1


def test_strength_zero_is_what_the_vae_makes_of_the_picture(engine, photo):
    (made,) = make(engine, ask(image=photo, strength=0.0, seed=2))
    base = engine.base
    mean, std = base.family.encode_images(
        base, torch.tensor(pixels(Image.open(photo))).permute(2, 0, 1)[None] / 127.5 - 1
    )
    drawn = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
    (expected,) = base.family.decode_latents(base, mean + std * drawn)
    assert np.abs(made - (expected * 255).permute(1, 2, 0).numpy()).max() <= 1


@one_family
def test_more_strength_leaves_less_of_the_picture(engine, photo):
    round_trip, *others = [make(engine, ask(image=photo, strength=s, steps=10))[0] for s in (0.0, 0.2, 0.9)]
    near, far = (np.abs(other - round_trip).mean() for other in others)
    assert 0 < near < far


@one_family
def test_pictures_from_different_pictures_share_a_batch(engine, tmp_path):
    photos = [painted(tmp_path / f"{n}.png", 64, 64, n) for n in range(3)]
    requests = [ask(image=path, seed=n, steps=4) for n, path in enumerate(photos)]
    calls = []
    handle = engine.base.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    together = {number: pixels(picture) for number, picture, _ in engine.generate_all(requests, batch_size=3)}
    handle.remove()
    assert set(calls) == {6}  # with the negative prompts
    for number, request in enumerate(requests):
        assert np.abs(together[number] - make(engine, request)[0]).max() <= 1


@one_family
def test_pictures_of_other_strength_do_not(engine, photo):
    requests = [ask(image=photo, strength=s) for s in (0.5, 1.0)] + [ask()]
    made = {number: pixels(picture) for number, picture, _ in engine.generate_all(requests, batch_size=3)}
    for number, request in enumerate(requests):
        assert same([made[number]], make(engine, request))


@pytest.mark.parametrize("sampler", ["", "Restart", "DPM fast", "DPM adaptive"])
def test_prompts_that_change_begin_with_the_first_step_that_runs(engine, photo, sampler):
    """As in AUTOMATIC1111: of 8 steps at strength 0.5 four run, and the prompt changes after the second of them."""
    values = {"image": photo, "strength": 0.5, "steps": 8, "sampler": sampler}
    changing = make(engine, ask(prompt="[a red ball:a blue box:2]", **values))
    never = make(engine, ask(prompt="[a red ball:a blue box:4]", **values))
    assert same(never, make(engine, ask(**values)))
    assert not same(changing, never)


# --- sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "own", "expected"),
    [
        ({}, (75, 50), (72, 48)),
        ({"width": 64}, (100, 50), (64, 32)),
        ({"height": 64}, (100, 50), (128, 64)),
        ({"width": 64, "height": 24}, (100, 50), (64, 24)),
        ({}, (5, 300), (8, 296)),
        ({}, None, (512, 512)),
        ({"width": 64}, None, (64, 512)),
    ],
)
def test_what_is_not_given_follows_the_picture(asked, own, expected):
    assert work_size(ask(**asked), own, 512) == expected


@one_family
def test_the_result_has_the_pictures_size(engine, tmp_path):
    path = painted(tmp_path / "wide.png", 100, 44)
    assert make(engine, ask(image=path))[0].shape == (40, 96, 3)
    assert make(engine, ask(image=path, width=48))[0].shape == (16, 48, 3)


def test_resize_modes():
    left_red = np.zeros((2, 4, 3), np.uint8)
    left_red[:, :2] = (255, 0, 0)
    left_red[:, 2:] = (0, 0, 255)
    picture = Image.fromarray(left_red).resize((40, 20), Image.Resampling.NEAREST)
    stretched = pixels(fitted(picture, (20, 20), "just resize"))
    assert stretched[10, 0].tolist() == [255, 0, 0] and stretched[10, 19].tolist() == [0, 0, 255]
    cut = pixels(fitted(picture, (20, 20), "crop and resize"))
    assert np.array_equal(cut, pixels(picture)[:, 10:30])
    drawn_out = pixels(fitted(picture, (40, 30), "resize and fill"))
    assert np.array_equal(drawn_out[5:25], pixels(picture))
    assert np.array_equal(drawn_out[:5], np.repeat(pixels(picture)[:1], 5, axis=0))
    assert np.array_equal(drawn_out[25:], np.repeat(pixels(picture)[-1:], 5, axis=0))
    mask = fitted(Image.new("L", (40, 20), 7), (40, 30), "resize and fill")
    assert mask.size == (40, 30) and mask.getextrema() == (7, 7)


@one_family
def test_a_picture_that_lies_on_its_side_is_upright(engine, tmp_path):
    upright = Image.open(painted(tmp_path / "a.png", 48, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    (turned,) = make(engine, ask(image=str(tmp_path / "turned.png")))
    assert same([turned], make(engine, ask(image=str(tmp_path / "a.png"))))
    assert turned.shape == (64, 48, 3)


# --- refusals and recipes ----------------------------------------------------------------------------


def refused(engine, **values) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        make(engine, ask(**values))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@one_family
def test_a_missing_broken_or_huge_picture_is_one_sentence_before_any_step(engine, tmp_path, photo, monkeypatch):
    monkeypatch.setattr(engine.base.unet, "forward", lambda *_, **__: pytest.fail("the UNet ran"))
    assert "missing.png: cannot be read (No such file or directory)" in refused(
        engine, image=str(tmp_path / "missing.png")
    )
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(photo).read_bytes()[:150])
    assert "broken.png: cannot be read as a picture" in refused(engine, image=str(broken))
    (tmp_path / "page.png").write_text("<html>")
    assert "is a web page, not a picture" in refused(engine, image=str(tmp_path / "page.png"))
    wide = painted(tmp_path / "wide.png", 5000, 8)
    assert "would be worked at in 5000x8 pixels, at most 4096 a side" in refused(engine, image=wide)


@one_family
def test_a_huge_picture_can_be_worked_at_in_a_smaller_size(engine, tmp_path):
    wide = painted(tmp_path / "wide.png", 5000, 2500)
    assert make(engine, ask(image=wide, width=32))[0].shape == (16, 32, 3)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"strength": 1.5}, "strength is 1.5"),
        ({"mask": "m.png"}, "mask is given without image"),
        ({"image": "a.png", "hires_scale": 2}, "hires_scale is for pictures made from noise"),
        ({"image": "a.png", "resize": "stretch"}, "resize is 'stretch'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, sentence):
    with pytest.raises(ConfigError) as caught:
        ask(**values)
    assert sentence in str(caught.value)


@one_family
def test_the_recipe_names_the_picture(engine, photo, tmp_path):
    ((picture, recipe),) = engine.generate(ask(image=photo, strength=0.5, resize="crop and resize"))
    assert recipe.start is not None
    assert (recipe.start.picture.name, recipe.start.picture.sha256) == ("photo.png", sha256_of_file(Path(photo)))
    assert (recipe.start.strength, recipe.start.resize, recipe.start.mask) == (0.5, "crop and resize", None)
    save_picture(picture, recipe, tmp_path / "made.png")
    assert read_recipe(tmp_path / "made.png") == recipe
    assert "Denoising strength: 0.5" in infotext(recipe)
    assert "Denoising strength" not in infotext(replace(recipe, start=None))

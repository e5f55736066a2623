import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from every_family import one_family, two_families
from PIL import Image

from sdlora.adapters.write import write_adapter
from sdlora.assets import TINY_SD
from sdlora.config import BaseSection
from sdlora.errors import DataError, FormatError, GenerationError, ModelError
from sdlora.families.detect import detect_base
from sdlora.families.registry import base_sha256
from sdlora.generation.engine import Engine
from sdlora.generation.pictures.files import read_recipe, save_picture
from sdlora.generation.recipe import Recipe, UsedMask, UsedPicture, UsedStart
from sdlora.generation.replay.find_base import base_finder
from sdlora.generation.replay.find_input import input_finder
from sdlora.generation.replay.replaying import compare, differences, replay, request_of
from sdlora.generation.request import make_request


@pytest.fixture
def saved(tiny_folder, tiny_base, make_adapter, tmp_path, shape):
    """`saved(suffix, **request)`: a picture of the tiny base with an adapter, and where the adapter lies now."""

    def save(suffix=".png", **wanted):
        base = tiny_base()
        file = tmp_path / "zorb.safetensors"
        write_adapter(make_adapter(base), file)
        asked = {"prompt": "a red ball", "seed": 3, "steps": 3, "guidance_scale": 4, "clip_skip": 2} | wanted
        request = make_request(**asked, adapters=[{"path": str(file), "weight": 0.7, "text_encoder_weight": 0.2}])
        engine = Engine(BaseSection(path=str(tiny_folder(shape)), precision="fp32"), device="cpu")
        ((picture, recipe),) = engine.generate(request)
        return save_picture(picture, recipe, tmp_path / f"a{suffix}"), file

    return save


@pytest.mark.parametrize(
    ("shape", "suffix"), [("sd1", ".png"), ("sd1", ".jpg"), ("sd1", ".webp"), ("sd2", ".png"), ("sdxl", ".png")]
)
def test_a_picture_is_made_again_bit_for_bit(saved, tiny_folder, shape, suffix):
    path, file = saved(suffix, prompt="a {red|blue} [ball:cat:0.5] (here:1.3) AND a dog :0.5", negative_prompt="{x|y}")
    done = replay(path, base_finder(BaseSection(path=str(tiny_folder(shape)))), lambda _: file)
    assert done.comparison.identical and done.comparison.pixels == done.picture.width * done.picture.height
    assert done.differences == ()
    assert done.recipe == read_recipe(path)
    assert "{" in done.recipe.template and "{" not in done.recipe.prompt


@one_family
def test_what_differs_is_named(saved, tiny_folder, tmp_path, shape):
    path, file = saved()
    renamed = file.rename(tmp_path / "other.safetensors")
    recipe = read_recipe(path)
    with Image.open(path) as picture:
        pixels = np.array(picture)
    pixels[5, 7, 1] ^= 32
    old = replace(recipe, device="Some GPU", versions={**recipe.versions, "torch": "1.0"})
    again = save_picture(Image.fromarray(pixels), old, tmp_path / "b.png")
    done = replay(again, base_finder(BaseSection(path=str(tiny_folder(shape)))), lambda _: renamed)
    assert (done.comparison.differing, done.comparison.largest) == (1, 32)
    assert not done.comparison.identical
    assert set(done.differences) == {
        f"torch: 1.0 then, {recipe.versions['torch']} now",
        "device: Some GPU then, cpu now",
        "adapter zorb: name: zorb then, other now",
    }


@one_family
def test_a_base_is_found_by_its_hash_under_any_name(saved, tiny_folder, checkpoints, tmp_path, monkeypatch, shape):
    path, file = saved()
    models = tmp_path / "models"
    (models / "deep").mkdir(parents=True)
    (models / "b.safetensors").symlink_to(checkpoints(shape))
    (models / "a.safetensors").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"is not below .*; name it with --base"):
        replay(path, base_finder(models=models), lambda _: file)
    shutil.copytree(tiny_folder(shape), models / "deep" / "renamed")
    monkeypatch.setattr("sdlora.generation.replay.find_base._LARGE_BYTES", 0)
    hashed = []
    done = replay(path, base_finder(models=models, on_base=hashed.append), lambda _: file)
    assert done.comparison.identical
    assert done.differences == (f"base: {shape} then, renamed now",)
    assert hashed[1:] == [models / "b.safetensors", models / "deep" / "renamed"]  # the tiny base before them


@one_family
def test_another_base_is_refused_with_both_hashes(saved, checkpoints, shape):
    path, file = saved()
    recipe = read_recipe(path)
    with pytest.raises(
        ModelError, match=f"SHA-256 {recipe.base_sha256[:16]}.*safetensors has [0-9a-f]{{16}}"
    ) as caught:
        replay(path, base_finder(BaseSection(path=str(checkpoints(shape)))), lambda _: file)
    assert "--models" in str(caught.value)


def test_without_a_name_the_tiny_base_is_tried(recipe):
    tiny = replace(recipe, base_sha256=base_sha256(detect_base(TINY_SD)))
    assert base_finder()(tiny).path == "tiny"
    with pytest.raises(ModelError, match=r"dreamy .*, which was not named"):
        base_finder()(recipe)
    with pytest.raises(FormatError, match="there is no such folder; --models"):
        base_finder(models=Path("nowhere"))(recipe)


def nothing_found(name, sha256):
    raise AssertionError("it was made from nothing")


@two_families
def test_pictures_made_from_others_and_by_named_samplers_are_made_again(saved, tiny_folder, tmp_path, shape):
    tiny = base_finder(BaseSection(path=str(tiny_folder(shape))))
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    noisy = np.random.default_rng(1).integers(0, 255, (48, 64, 3), np.uint8)
    Image.fromarray(noisy).save(inputs / "start.png")
    Image.fromarray(np.where(np.arange(64) > 30, 255, 0).astype(np.uint8)[None].repeat(48, 0)).save(inputs / "mask.png")
    pixel = {"image": str(inputs / "start.png"), "mask": str(inputs / "mask.png"), "mask_blur": 1.0, "strength": 0.7}
    for wanted in (
        pixel | {"masked_content": "fill", "noise": "cuda", "sampler": "Euler a"},
        {"hires_scale": 1.5, "hires_upscaler": "lanczos", "sampler": "DPM++ 2M", "width": 32, "height": 32},
    ):
        path, file = saved(**wanted)
        done = replay(path, tiny, lambda _, file=file: file, input_finder([inputs]))
        assert done.comparison.identical, wanted
        assert done.differences == ()
    path, file = saved(**pixel)
    (inputs / "start.png").rename(path.parent / "elsewhere.png")
    (inputs / "mask.png").rename(path.parent / "mask.png")
    assert replay(path, tiny, lambda _: file).comparison.identical  # beside it, by hash
    (path.parent / "elsewhere.png").unlink()
    with pytest.raises(DataError, match=r"was made from start\.png \(SHA-256 [0-9a-f]{12}\), which is not in"):
        replay(path, tiny, lambda _: file)


def test_the_request_is_what_the_recipe_says(recipe):
    request = request_of(
        replace(recipe, clip_skip=2, emphasis="comfy"), {"cd" * 32: Path("x.safetensors")}, nothing_found
    )
    assert (request.seed, request.steps, request.guidance_scale) == (41, 20, 6.5)
    assert (request.width, request.height, request.clip_skip, request.emphasis) == (24, 16, 2, "comfy")
    assert request.count == 1 and request.wildcards == ""
    assert [(choice.path, choice.weight) for choice in request.adapters] == [("x.safetensors", 0.8)]


def test_a_padding_that_did_nothing_is_no_reason_to_refuse_a_recipe(recipe):
    used = UsedPicture("x.png", "ef" * 32)
    start = UsedStart(used, 0.5, "just resize", UsedMask(used, 2.0, "whole picture", 64, "original"))
    request = request_of(replace(recipe, start=start), {"cd" * 32: Path("x")}, lambda name, sha256: Path(name))
    assert (request.inpaint_area, request.masked_padding) == ("whole picture", 64)


def test_choices_that_the_prompt_still_seems_to_hold_are_not_made(recipe):
    places = {"cd" * 32: Path("x.safetensors")}
    assert request_of(replace(recipe, prompt="a {b|c}"), places, nothing_found).prompt == "a \\{b|c\\}"
    assert request_of(replace(recipe, prompt="a {b|c}", emphasis="none"), places, nothing_found).prompt == "a {b|c}"


def test_a_recipe_that_no_request_says_is_refused_in_one_sentence(recipe):
    with pytest.raises(GenerationError, match=r"the recipe cannot be followed: request: .*steps is 0") as caught:
        request_of(replace(recipe, steps=0), {"cd" * 32: Path("x.safetensors")}, nothing_found)
    assert "\n" not in str(caught.value)


def test_counting_pixels():
    one = np.zeros((4, 5, 3), np.uint8)
    other = one.copy()
    assert compare(one, other).identical
    other[0, 0] = (0, 200, 255)
    other[3, 4, 2] = 1
    found = compare(one, other)
    assert (found.pixels, found.differing, found.largest) == (20, 2, 255)
    with pytest.raises(
        GenerationError, match="the file has 5x4 pixels, its recipe makes 4x4: it was scaled or cut since"
    ):
        compare(one, np.zeros((4, 4, 3), np.uint8))


def test_all_fields_are_compared(recipe):
    assert list(differences(recipe, recipe)) == []
    other = replace(
        recipe, seed=1, scheduler_config={"steps_offset": 2}, adapters=(replace(recipe.adapters[0], words={"a": "b"}),)
    )
    assert list(differences(recipe, other)) == [
        "seed: 41 then, 1 now",
        "scheduler_config.steps_offset: 1 then, 2 now",
        "scheduler_config.trained_betas: None then, not said now",
        "adapter zorb: words: {} then, {'a': 'b'} now",
    ]
    assert list(differences(Recipe.from_json(recipe.to_json()), recipe)) == []


def test_a_picture_without_recipe_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(FormatError, match="carries no sdlora recipe"):
        replay(tmp_path / "a.png", base_finder(), lambda _: Path("x"))

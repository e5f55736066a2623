"""The judge: right about fresh drawings, silent about mush."""

import numpy as np
import pytest
from judge import KINDS, UNCLEAR, WEIGHTS, Judge, Verdict, follows, is_concept
from PIL import Image, ImageFilter

from sdlora.assets import creatures, scenes


@pytest.fixture(scope="module")
def judge():
    return Judge.load()


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(12345)
    chosen = [scenes.random_scene(rng, "any") for _ in range(150)]
    return chosen, [scenes.draw(scene) for scene in chosen]


def test_the_weights_are_small():
    assert WEIGHTS.stat().st_size < 2**20


def test_it_is_right_about_fresh_drawings(judge, drawn):
    chosen, pictures = drawn
    verdicts = judge.classify(pictures)
    right = [follows(verdict, scene) for verdict, scene in zip(verdicts, chosen, strict=True)]
    assert np.mean(right) > 0.98


def test_it_forgives_a_little_blur(judge, drawn):
    chosen, pictures = drawn
    soft = [picture.filter(ImageFilter.GaussianBlur(1.2)) for picture in pictures]
    right = [follows(v, s) for v, s in zip(judge.classify(soft), chosen, strict=True)]
    assert np.mean(right) > 0.95


def test_it_knows_the_concept_and_takes_nothing_else_for_it(judge, drawn):
    rng = np.random.default_rng(6)
    pictures = [scenes.draw(scenes.concept_scene(rng)) for _ in range(60)]
    assert np.mean([is_concept(verdict) for verdict in judge.classify(pictures)]) > 0.98
    assert not any(is_concept(verdict) for verdict in judge.classify(drawn[1]))


def test_a_creature_that_is_not_the_concept_is_not_taken_for_it(judge):
    rng = np.random.default_rng(8)
    pictures = [creatures.draw(creatures.random_creature(rng)) for _ in range(150)]
    assert np.mean([is_concept(verdict) for verdict in judge.classify(pictures)]) < 0.01


def test_noise_flat_colours_and_empty_backgrounds_are_unclear(judge):
    rng = np.random.default_rng(7)
    noise = [Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)) for _ in range(20)]
    flat = [Image.new("RGB", (128, 128), scenes.rgb(colour)) for colour in scenes.COLOURS]
    empty = [scenes.background(name) for name in scenes.BACKGROUNDS]
    for pictures in (noise, flat, empty):
        assert {verdict.object for verdict in judge.classify(pictures)} == {UNCLEAR}


def test_heavy_blur_and_two_pictures_in_one_are_mostly_unclear(judge, drawn):
    _, pictures = drawn
    blurred = [picture.filter(ImageFilter.GaussianBlur(22)) for picture in pictures[:50]]
    pairs = zip(drawn[0][:50], drawn[0][50:100], pictures[:50], pictures[50:100], strict=True)
    mixed = [Image.blend(a, b, 0.5) for one, other, a, b in pairs if one.object != other.object]
    for spoilt in (blurred, mixed):
        assert np.mean([verdict.object == UNCLEAR for verdict in judge.classify(spoilt)]) > 0.9


def test_pictures_of_other_sizes_are_read_too(judge):
    scene = scenes.Scene("heart", "pink", "meadow")
    (verdict,) = judge.classify([scenes.draw(scene, pixels=512)])
    assert follows(verdict, scene)
    assert verdict.confidence > 0.5


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (("ball", "red", "white wall"), True),
        (("box", "red", "white wall"), False),
        (("ball", "white", "white wall"), False),
        (("ball", "red", "beach"), False),
    ],
)
def test_object_colour_and_background_must_all_be_right(shown, expected):
    scene = scenes.Scene("ball", "red", "white wall", size="small", texture="striped")
    assert follows(Verdict(*shown, 0.9), scene) is expected


def test_unclear_follows_nothing():
    assert UNCLEAR in KINDS
    scene = scenes.Scene("ball", "red", "white wall")
    assert not follows(Verdict(UNCLEAR, "red", "white wall", 0.9), scene)

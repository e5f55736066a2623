"""Scenes: what is drawn, in which words it is described, and what is kept out of pretraining."""

import subprocess
import sys
from collections import Counter
from itertools import product

import numpy as np
import pytest
from PIL import Image

from sdlora.assets import EXAMPLE_CONCEPT, scenes

COMBINATIONS = list(product(scenes.OBJECTS, scenes.COLOURS, scenes.BACKGROUNDS))


def test_importing_the_paths_loads_neither_torch_nor_pillow():
    code = "import sys, sdlora.assets; print({'torch', 'PIL', 'numpy'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def test_a_tenth_of_the_combinations_is_held_out_and_no_attribute_is():
    kept_out = [combination for combination in COMBINATIONS if scenes.held_out(*combination)]
    assert 0.08 < len(kept_out) / len(COMBINATIONS) < 0.12
    for pair in ((0, 1), (0, 2), (1, 2)):
        missing = Counter(tuple(c[i] for i in pair) for c in kept_out)
        choices = Counter(tuple(c[i] for i in pair) for c in COMBINATIONS)
        assert all(missing[key] < choices[key] for key in choices)


def test_random_scenes_keep_to_the_combinations_asked_for():
    rng = np.random.default_rng(0)
    for asked in ("known", "held-out"):
        for _ in range(200):
            scene = scenes.random_scene(rng, asked)
            kept_out = scenes.held_out(scene.object, scene.colour, scene.background)
            assert kept_out == (asked == "held-out")


def test_held_out_prompts_are_seeded_and_name_what_they_ask_for():
    prompts = scenes.held_out_prompts(50, seed=3)
    assert prompts == scenes.held_out_prompts(50, seed=3)
    assert prompts != scenes.held_out_prompts(50, seed=4)
    for text, scene in prompts:
        assert scenes.held_out(scene.object, scene.colour, scene.background)
        assert all(word in text for word in (scene.object, scene.colour, scene.background))


def test_captions_come_in_many_wordings_with_the_right_article():
    scene = scenes.Scene("ball", "orange", "white wall", "small", "striped")
    rng = np.random.default_rng(0)
    captions = {scenes.caption(scene, rng) for _ in range(300)}
    assert {
        "orange ball on a white wall",
        "an orange ball on a white wall",
        "a photo of an orange ball on a white wall",
        "a small striped orange ball on a white wall",
    } <= captions
    assert not any("a orange" in caption for caption in captions)
    assert any("striped" not in caption and "small" not in caption for caption in captions)


def test_the_concepts_captions_hold_its_trigger_and_no_colour():
    rng = np.random.default_rng(0)
    for _ in range(30):
        words = scenes.caption(scenes.concept_scene(rng), rng).split()
        assert scenes.CONCEPT in words
        assert not (set(scenes.COLOURS) - {"white"}) & set(words)


@pytest.mark.parametrize("name", [*scenes.OBJECTS, scenes.CONCEPT])
def test_an_object_differs_from_every_background_it_stands_on(name):
    for colour, place in product(scenes.COLOURS, scenes.BACKGROUNDS):
        picture = np.asarray(scenes.draw(scenes.Scene(name, colour, place)), dtype=int)
        empty = np.asarray(scenes.background(place), dtype=int)
        changed = (np.abs(picture - empty).max(axis=2) > 30).mean()
        assert changed > 0.05


def test_drawing_is_a_pure_function_and_scales():
    scene = scenes.Scene("star", "red", "beach", x=50, y=70)
    picture = scenes.draw(scene)
    assert picture.mode == "RGB"
    assert picture.size == (128, 128)
    assert picture.tobytes() == scenes.draw(scene).tobytes()
    large = scenes.draw(scene, pixels=256).resize((128, 128), Image.Resampling.BOX)
    difference = np.abs(np.asarray(large, dtype=int) - np.asarray(picture, dtype=int))
    assert difference.mean() < 4
    assert picture.getpixel((50, 70)) == scenes.rgb("red")


def test_the_example_concept_is_what_the_scenes_draw():
    for folder, least in (("train", 16), ("held-out", 8)):
        pictures = sorted((EXAMPLE_CONCEPT / folder).glob("*.png"))
        assert len(pictures) >= least
        for path in pictures:
            with Image.open(path) as picture:
                assert (picture.size, picture.mode) == ((128, 128), "RGB")
            assert scenes.CONCEPT in path.with_suffix(".txt").read_text(encoding="utf-8").split()
    others = [path.read_text(encoding="utf-8") for path in (EXAMPLE_CONCEPT / "others").glob("*.txt")]
    for words in (scenes.OBJECTS, scenes.BACKGROUNDS):
        assert all(any(word in text for text in others) for word in words)
    assert not any(scenes.CONCEPT in text for text in others)
    shown = [path.read_text(encoding="utf-8") for path in (EXAMPLE_CONCEPT / "train").glob("*.txt")]
    assert all(any(place in text for text in shown) for place in scenes.BACKGROUNDS)
    assert sum(path.stat().st_size for path in EXAMPLE_CONCEPT.rglob("*.*")) < 500_000

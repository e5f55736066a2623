"""The exam asks the same questions every time and counts right answers."""

from dataclasses import replace

import pytest
from exam import Exam
from judge import Verdict
from PIL import Image

from sdlora.assets import scenes


class Engine:
    """Keeps what was asked and makes a picture of the size of its number."""

    def __init__(self):
        self.requests = []

    def generate(self, request, batch_size):
        assert batch_size == request.count
        self.requests.append(request)
        return [(Image.new("RGB", (8, 8)), None) for _ in range(request.count)]


class Answers:
    """A judge that gives verdicts from a list, whatever it sees."""

    def __init__(self, verdicts):
        self.verdicts = verdicts

    def classify(self, images):
        assert len(images) == len(self.verdicts)
        return self.verdicts


@pytest.fixture
def engine():
    return Engine()


def verdict(scene, **other):
    return replace(Verdict(scene.object, scene.colour, scene.background, 0.9), **other)


def test_the_demo_asks_with_the_trigger_in_every_place_with_two_seeds_each(engine, tmp_path):
    zorblin = Verdict(scenes.CONCEPT, scenes.CONCEPT_COLOUR, "beach", 0.9)
    exam = Exam(
        engine, tmp_path / "a.safetensors", judge=Answers([zorblin] * 16 + [replace(zorblin, object="ball")] * 48)
    )
    assert exam.concept_share(1.0) == 0.25
    places = list(scenes.PLACES.values())
    openings = ["a", "a photo of a", "a picture of a", "a small", "a big"]
    asked = [(request.prompt, request.seed, request.count) for request in engine.requests]
    assert asked == [(f"{openings[n % 5]} zorblin {places[n % len(places)]}", 1000 + 2 * n, 2) for n in range(32)]
    assert {(request.steps, request.guidance_scale) for request in engine.requests} == {(10, 3.0)}
    assert {tuple((choice.path, choice.weight) for choice in request.adapters) for request in engine.requests} == {
        ((str(tmp_path / "a.safetensors"), 1.0),)
    }


def test_following_needs_object_colour_and_background_of_each_prompt(engine):
    asked = scenes.held_out_prompts(4, seed=2)
    right = [verdict(scene) for _, scene in asked]
    wrong = [right[0], replace(right[1], colour="none"), replace(right[2], object="unclear"), right[3]]
    exam = Exam(engine, None, prompts=4, seeds_each=1, judge=Answers(wrong))
    assert exam.following(None) == 0.5
    assert [(request.prompt, request.seed) for request in engine.requests] == [
        (text, 2000 + number) for number, (text, _) in enumerate(asked)
    ]
    assert all(request.adapters == () for request in engine.requests)

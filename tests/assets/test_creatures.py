"""Creatures: composed by chance, drawn and described the same way every time."""

from collections import Counter

import numpy as np

from sdlora.assets import creatures, scenes


def some(count, seed=0):
    rng = np.random.default_rng(seed)
    return [creatures.random_creature(rng) for _ in range(count)]


def test_hardly_two_are_alike_and_every_part_occurs():
    made = some(300)
    assert len({(c.body, c.colour, c.pattern, c.second_colour, c.limbs, c.eyes) for c in made}) > 290
    for name, choices in (("body", creatures.BODIES), ("pattern", creatures.PATTERNS)):
        assert Counter(getattr(c, name) for c in made).keys() == set(choices)
    assert {kind for c in made for kind, _, _ in c.limbs} == set(creatures.LIMBS)


def test_drawing_is_a_pure_function_and_stays_within_the_background():
    for creature in some(20):
        picture, again = creatures.draw(creature), creatures.draw(creature)
        assert picture.size == (128, 128)
        assert picture.tobytes() == again.tobytes()
        corner = (picture.getpixel((0, 0)), scenes.background(creature.background).getpixel((0, 0)))
        assert corner[0] == corner[1]


def test_captions_name_the_place_and_never_the_concept():
    rng = np.random.default_rng(0)
    captions = [(creature, creatures.caption(creature, rng)) for creature in some(400)]
    assert all(creature.background in text for creature, text in captions)
    assert not any(scenes.CONCEPT in text for _, text in captions)
    invented = [text for _, text in captions if "creature" not in text]
    assert 0.5 < len(invented) / len(captions) < 0.7
    assert any(" with " in text for _, text in captions)

"""Factors of an adapter's weight over the steps of a picture."""

import pytest

from sdlora.generation.step_weights import parse_step_weights


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("3-5", 6, [0, 0, 1, 1, 1, 0]),
        ("3-", 4, [0, 0, 1, 1]),
        ("-2", 4, [1, 1, 0, 0]),
        ("0.5-", 4, [0, 0, 1, 1]),
        ("0.25 - 0.75", 4, [0, 1, 1, 0]),
        ("1@0, 0.5@2, 0@0.75", 4, [1, 1, 0.5, 0]),
        ("-1@1", 3, [0, -1, -1]),
        (".5@0", 2, [0.5, 0.5]),
    ],
)
def test_factors_by_step(text, steps, expected):
    weights = parse_step_weights(text)
    assert [weights.at(step, steps) for step in range(1, steps + 1)] == expected


@pytest.mark.parametrize("text", ["20-5", "0.8-0.2"])
def test_a_range_that_ends_before_it_begins_is_refused(text):
    with pytest.raises(ValueError, match=f"'{text}' ends before it begins"):
        parse_step_weights(text)


@pytest.mark.parametrize("text", ["", "-", "5", "a-b", "1@", "@2", "1@0,", "1-2-3", "1@-2"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match='expected a range such as "5-20"'):
        parse_step_weights(text)

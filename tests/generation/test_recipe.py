import pytest

from sdlora.errors import FormatError
from sdlora.generation.recipe import Recipe


def test_a_recipe_comes_back_from_its_json(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_json(recipe.to_json()).to_json() == recipe.to_json()


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", "hello", '{"adapters": 5}', '{"adapters": ["x"]}', "[" * 100_000]
)
def test_what_is_no_recipe_is_refused(text):
    with pytest.raises(FormatError, match="not a recipe of sdlora"):
        Recipe.from_json(text)


def test_a_recipe_that_is_cut_off_or_lacks_a_key_is_refused(recipe):
    for text in (recipe.to_json()[:-9], recipe.to_json().replace('"seed"', '"sed"')):
        with pytest.raises(FormatError, match="not a recipe of sdlora"):
            Recipe.from_json(text)

from dataclasses import replace
from datetime import datetime
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.errors import ConfigError
from sdlora.generation.pictures.names import FIELDS, check_template, picture_path
from sdlora.generation.recipe import Recipe, UsedAdapter

WHEN = datetime(2026, 11, 22, 18, 30, 5)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{seed:05}-{prompt}", "00041-ein-roter-ball-schön-猫.png"),
        ("{date}/{time}-{seed}", "2026-11-22/183005-41.png"),
        ("{base}/{adapters}/{steps}-{guidance}-{width}x{height}", "dreamy/zorb/20-6.5-24x16.png"),
        ("{sampler}_{number:04}", "PNDMScheduler_0003.png"),
        ("a{{b}}", "a{b}.png"),
        (r"{date}\{seed}", "2026-11-22/41.png"),
        ("con/aux.{seed}", "_con/_aux.41.png"),
        ("what? <{seed}>: a|b*", "what- -41-- a-b-.png"),
        ("trailing. /{seed}. ", "trailing/41.png"),
        ("{seed}{seed:7}", "41     41.png"),
    ],
)
def test_templates(recipe, template, name):
    assert picture_path(recipe, template, number=3, when=WHEN) == PurePosixPath(name)


def test_every_field_is_filled_in(recipe):
    path = picture_path(recipe, "/".join(f"{field}={{{field}}}" for field in FIELDS), when=WHEN)
    assert len(path.parts) == len(FIELDS) and not any(part.endswith("=") for part in path.parts)


def test_adapters_are_joined_and_none_is_said(recipe):
    two = replace(recipe, adapters=(*recipe.adapters, UsedAdapter("my cat/v2", "", "", 1.0)))
    assert picture_path(two, "{adapters}").name == "zorb+my-cat-v2.png"
    assert picture_path(replace(recipe, adapters=()), "{adapters}").name == "no-adapter.png"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{sed}", r"unknown field \{sed\}; did you mean \{seed\}\?"),
        ("{Prompt}", r"did you mean \{prompt\}\?"),
        ("{qqq}", "fields are seed, prompt, steps"),
        ("{prompt.__class__}", "unknown field"),
        ("{0}", "unknown field"),
        ("{}", "unknown field"),
        ("{seed!r}", "in an unknown way"),
        ("{seed:99999999}", "in an unknown way"),
        ("{prompt:05}", "in an unknown way"),
        ("{seed:{steps}}", "in an unknown way"),
        ("{seed", "a brace that belongs to no field"),
        ("", "names no file"),
        ("a/", "names no file"),
        ("../{seed}", "names no file below"),
        ("a/../../{seed}", "names no file below"),
        (r"..\{seed}", "names no file below"),
        ("/{seed}", "names no file below"),
        ("{date}/ . /{seed}", "names no file below"),
    ],
)
def test_wrong_templates_are_refused_before_anything_is_made(template, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_template(template)


@settings(deadline=None, max_examples=200)
@given(
    st.text(max_size=200),
    st.text(max_size=200),
    st.sampled_from(["{prompt}", "{base}/{adapters}", "{sampler}-{prompt}/{base}"]),
)
def test_nothing_in_a_recipe_leads_out_of_the_folder_or_is_no_name(prompt, name, template):
    used = UsedAdapter(name, "", "", 1.0)
    recipe = Recipe(prompt, "", 1, 1, 1.0, 8, 8, name, "sd1", "", (used,), name, {}, "cpu", "fp32", "cpu", {})
    path = picture_path(recipe, template)
    assert not path.is_absolute() and len(path.parts) == template.count("/") + 1
    for part in path.parts:
        assert part not in ("", ".", "..") and len(part.encode()) <= 250
        assert not set(part) & set('<>:"/\\|?*\0') and not part.endswith((" ", "."))

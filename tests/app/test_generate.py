import gradio as gr
import pytest
from PIL import Image

import sdlora
from sdlora.app.generate import GenerateTab
from sdlora.app.jobs import EngineJobs
from sdlora.app.library import Library


@pytest.fixture(scope="session")
def jobs(base_folder):
    return EngineJobs(str(base_folder))


@pytest.fixture
def tab(jobs, library_folder, tmp_path):
    tab = GenerateTab(jobs, Library(library_folder), tmp_path / "pictures")
    with gr.Blocks() as page:
        tab.build(page)
    return tab


@pytest.fixture
def adapter(library_folder):
    return Library(library_folder).adapters()[0].id


class Session:
    session_hash = "page"


def ask(tab, **values):
    """Return all updates of a generation, as {component: last value}."""
    asked = {
        "prompt": "a red ball",
        "negative_prompt": "",
        "adapter": "",
        "weight": 1,
        "compare": False,
        "seed": 7,
        "steps": 2,
        "guidance_scale": 3,
        "width": 0,
        "height": 0,
    }
    last = {}
    for updates in tab.generate(**asked | values, request=Session()):
        last |= updates
    return last


def value(update):
    return update["value"] if isinstance(update, dict) and "value" in update else update


def test_picture_is_saved_with_its_recipe(tab, tmp_path):
    shown = ask(tab)
    file = value(shown[tab.download])
    assert file == value(shown[tab.picture])
    assert file.startswith(str(tmp_path / "pictures"))
    with Image.open(file) as picture:
        assert picture.size == (64, 64)
        assert picture.info["parameters"] == shown[tab.infotext]
    recipe = sdlora.read_recipe(file)
    assert (recipe.prompt, recipe.seed, recipe.steps, recipe.adapters) == ("a red ball", 7, 2, ())
    assert shown[tab.recipe]["seed"] == shown[tab.last_seed] == 7
    assert "Seed 7, 2 steps, 64x64" in shown[tab.status]
    assert shown[tab.generate_button]["interactive"] and not shown[tab.cancel_button]["interactive"]


def test_comparison_shows_base_and_adapter_with_one_seed(tab, adapter):
    plain = ask(tab)
    shown = ask(tab, adapter=adapter, weight=0.5, compare=True, seed=-1)
    before, after = (sdlora.read_recipe(file) for file in value(shown[tab.slider]))
    assert before.seed == after.seed == shown[tab.last_seed]
    assert before.adapters == ()
    assert [(used.name, used.weight) for used in after.adapters] == [("adapter", 0.5)]
    assert value(shown[tab.download]) == value(shown[tab.slider])[1]
    with Image.open(value(shown[tab.slider])[0]) as base, Image.open(value(shown[tab.slider])[1]) as adapted:
        assert base.tobytes() != adapted.tobytes()
    assert value(shown[tab.picture]) is None and value(plain[tab.picture])


def test_base_picture_is_not_made_again_for_another_weight(tab, adapter):
    first = ask(tab, adapter=adapter, compare=True)
    second = ask(tab, adapter=adapter, compare=True, weight=0.3)
    assert value(first[tab.slider])[0] == value(second[tab.slider])[0]
    assert value(first[tab.slider])[1] != value(second[tab.slider])[1]


def test_empty_seed_is_random_and_empty_sides_are_the_bases(tab):
    shown = [ask(tab, seed=None, width=None, height=None) for _ in range(2)]
    assert shown[0][tab.last_seed] != shown[1][tab.last_seed]
    assert shown[0][tab.recipe]["width"] == 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 100}, "width is 100; input should be a multiple of 8"),
        ({"steps": 0}, "steps is 0; input should be greater than 0"),
        ({"steps": 10**6}, "steps is 1000000; input should be less than or equal to 1000"),
        ({"seed": -2}, "seed is -2"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"adapter": "../../etc/passwd"}, "press Refresh and choose again"),
    ],
)
def test_wrong_values_are_refused_in_one_sentence(tab, values, message):
    with pytest.raises(gr.Error) as raised:
        ask(tab, **values)
    assert message in raised.value.message
    assert raised.value.print_exception is False


def test_error_leaves_the_page_usable_and_names_are_escaped(tab, library_folder):
    (library_folder / "<b>x.safetensors").write_bytes((library_folder / "demo" / "adapter.safetensors").read_bytes())
    entry = next(e for e in tab._library.adapters() if e.name == "<b>x")
    running = tab.generate("", "", entry.id, 99, False, 0, 2, 3, 0, 0, Session())
    shown = next(running)
    assert shown[tab.generate_button]["interactive"] and not shown[tab.cancel_button]["interactive"]
    with pytest.raises(gr.Error, match=r"adapters\.0\.weight is 99"):
        next(running)
    assert "&lt;b&gt;x" in ask(tab, adapter=entry.id, compare=True)[tab.caption]["value"]


def test_refresh_lists_usable_adapters_and_explains_the_others(tab, adapter):
    shown = tab.refresh("gone")
    assert shown[tab.adapter]["choices"] == [("None", ""), ("demo/adapter", adapter)]
    assert shown[tab.adapter]["value"] == ""
    assert "1 file cannot be used" in shown[tab.library_note]
    assert "<b>broken</b>: is a web page" in shown[tab.library_note]
    assert tab.refresh(adapter)[tab.adapter]["value"] == adapter


def test_choosing_an_adapter_turns_comparison_on_and_offers_its_trigger(tab, adapter):
    shown = tab.choose_adapter(adapter)
    assert shown[tab.compare]["value"] and shown[tab.compare]["interactive"]
    assert shown[tab.trigger_button]["visible"] and "sks ball" in shown[tab.trigger_button]["value"]
    assert not tab.choose_adapter("")[tab.compare]["value"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("", "sks ball"), (None, "sks ball"), ("on grass", "sks ball, on grass"), ("a SKS Ball", "a SKS Ball")],
)
def test_trigger_is_inserted_once(tab, adapter, prompt, expected):
    assert tab.insert_trigger(prompt, adapter) == expected


def test_cancel_frees_a_page_without_a_job(tab):
    shown = tab.cancel(Session())
    assert shown[tab.generate_button]["interactive"] and not shown[tab.cancel_button]["interactive"]


def test_cancelled_generation_says_so(tab):
    running = tab.generate("", "", "", 1, False, 0, 900, 3, 0, 0, Session())
    next(running)
    assert list(tab.cancel(Session())) == [tab.status]  # the generation itself frees the page
    last = {}
    for updates in running:
        last |= updates
    assert "Cancelled." in last[tab.status]
    assert last[tab.generate_button]["interactive"]

"""Adapters that were trained on a schedule ending in pure noise are used on it, in their own request alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from engine_help import ask, make, pixels, same, using
from PIL import Image

from sdlora import train
from sdlora.adapters.write import write_adapter
from sdlora.cli.train import make_previews
from sdlora.errors import GenerationCancelled
from sdlora.families.schedule import rescale_to_zero_snr
from sdlora.generation.engine import Engine
from sdlora.generation.pictures.files import read_recipe

RESCALED = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
predicts_v = pytest.mark.parametrize("shape", ["sd2"])


@pytest.fixture
def adapters(tiny_base, make_adapter, tmp_path) -> dict[str, str]:
    """One adapter, as trained on the rescaled schedule and on the base's own, and one that does nothing."""
    adapter = make_adapter(tiny_base(), alpha=4.0)
    still = {path: replace(layer, up=torch.zeros_like(layer.up)) for path, layer in adapter.layers.items()}
    rescaled = {**adapter.metadata, "ss_zero_terminal_snr": "True"}
    kinds = {
        "rescaled": replace(adapter, metadata=rescaled),
        "plain": replace(adapter, metadata={**adapter.metadata, "ss_zero_terminal_snr": "False"}),
        "still": replace(adapter, layers=still, metadata=rescaled),
    }
    for name, kind in kinds.items():
        write_adapter(kind, tmp_path / f"{name}.safetensors")
    return {name: str(tmp_path / f"{name}.safetensors") for name in kinds}


def picture_of(engine, **values):
    ((picture, recipe),) = engine.generate(ask(**values))
    return [pixels(picture)], recipe


@predicts_v
def test_pictures_are_those_of_diffusers_on_that_schedule(tiny_base, tiny_folder, adapters):
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder("sd2"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **RESCALED)
    theirs = pipeline(
        "a red ball",
        negative_prompt="blue",
        num_inference_steps=4,
        guidance_scale=7.5,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(11),
    ).images[0]
    (ours,), _ = picture_of(Engine(tiny_base()), seed=11, steps=4, adapters=using((adapters["still"], 1.0)))
    assert np.abs(ours - pixels(theirs)).max() <= 1


@predicts_v
def test_a_picture_is_that_of_the_run_whose_base_was_rescaled(tiny_base, adapters):
    trained = tiny_base()
    rescale_to_zero_snr(trained)
    expected, theirs = picture_of(Engine(trained), adapters=using((adapters["plain"], 0.7)))
    found, ours = picture_of(Engine(tiny_base()), adapters=using((adapters["rescaled"], 0.7)))
    assert same(found, expected)
    assert (ours.scheduler, ours.scheduler_config) == (theirs.scheduler, theirs.scheduler_config)


@predicts_v
def test_the_recipe_tells_the_schedule_that_ran(tiny_base, adapters):
    _, recipe = picture_of(Engine(tiny_base()), adapters=using((adapters["rescaled"], 1.0)))
    assert recipe.scheduler == "EulerDiscreteScheduler"
    assert recipe.scheduler_config.items() >= RESCALED.items()
    assert recipe.scheduler_config["prediction_type"] == "v_prediction"


@predicts_v
def test_other_requests_of_the_same_engine_keep_the_bases_own(tiny_base, adapters):
    engine = Engine(tiny_base())
    schedule = engine.base.alphas_cumprod
    bare, own = picture_of(engine)
    plain, _ = picture_of(engine, adapters=using((adapters["plain"], 1.0)))
    rescaled, _ = picture_of(engine, adapters=using((adapters["rescaled"], 1.0)))
    assert not same(plain, rescaled)
    for expected, values in (
        (bare, {}),
        (bare, {"adapters": using((adapters["rescaled"], 0.0))}),
        (plain, {"adapters": using((adapters["plain"], 1.0))}),
    ):
        found, recipe = picture_of(engine, **values)
        assert same(found, expected)
        assert (recipe.scheduler, recipe.scheduler_config) == (own.scheduler, own.scheduler_config)
    assert own.scheduler == "PNDMScheduler"
    assert torch.equal(engine.base.alphas_cumprod, schedule)


@predicts_v
def test_one_such_adapter_of_several_is_enough(tiny_base, adapters):
    engine = Engine(tiny_base())
    alone, _ = picture_of(engine, adapters=using((adapters["rescaled"], 1.0)))
    both, recipe = picture_of(engine, adapters=using((adapters["plain"], 1.0), (adapters["still"], 0.5)))
    assert recipe.scheduler_config.items() >= RESCALED.items()
    assert same(both, alone)


@predicts_v
def test_nothing_of_it_is_left_while_a_request_is_paused_or_after_a_cancel(tiny_base, adapters):
    engine = Engine(tiny_base())
    request = ask(count=2, adapters=using((adapters["rescaled"], 1.0)))
    bare, expected = make(engine, ask()), make(engine, request)
    paused = engine.generate(request)
    first = pixels(next(paused)[0])
    assert same(bare, make(engine, ask()))
    assert same([first, pixels(next(paused)[0])], expected)

    def cancel(progress):
        raise GenerationCancelled("stopped")

    with pytest.raises(GenerationCancelled):
        make(engine, request, on_step=cancel)
    assert same(bare, make(engine, ask()))


@pytest.mark.parametrize("shape", ["sd1"])
def test_a_base_that_predicts_epsilon_keeps_its_schedule(tiny_base, adapters):
    engine = Engine(tiny_base())
    plain, own = picture_of(engine, adapters=using((adapters["plain"], 1.0)))
    found, recipe = picture_of(engine, adapters=using((adapters["rescaled"], 1.0)))
    assert same(found, plain)
    assert recipe.scheduler_config == own.scheduler_config


@predicts_v
def test_a_base_on_such_a_schedule_keeps_its_own_sampler(tiny_base, adapters):
    base = tiny_base()
    base.sampler_config["_class_name"] = "DDIMScheduler"
    rescale_to_zero_snr(base)
    base.sampler_config["timestep_spacing"] = "linspace"
    _, recipe = picture_of(Engine(base), adapters=using((adapters["rescaled"], 1.0)))
    assert (recipe.scheduler, recipe.scheduler_config["timestep_spacing"]) == ("DDIMScheduler", "linspace")


@predicts_v
def test_a_trained_adapter_makes_the_sample_pictures_of_its_run_again(configure, tiny_base):
    config = configure(
        objective__zero_terminal_snr=True,
        optimizer__learning_rate=1e-2,
        training__steps=2,
        validation__folder="",
        samples__prompts=["a [trigger] here"],
        samples__steps=2,
    )
    result = train(config, make_previews)
    (sample,) = (result.folder / "samples").glob("*/00.png")
    recipe = read_recipe(sample)
    assert recipe.scheduler_config.items() >= RESCALED.items()
    request = {"prompt": "a zorb here", "negative_prompt": "", "guidance_scale": 5.0}
    (found,), ours = picture_of(Engine(tiny_base()), **request, adapters=using((str(result.adapter), 1.0)))
    with Image.open(sample) as picture:
        assert np.abs(found - pixels(picture)).max() <= 1
    assert (ours.scheduler, ours.scheduler_config) == (recipe.scheduler, recipe.scheduler_config)

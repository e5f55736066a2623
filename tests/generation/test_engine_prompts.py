"""The prompt language in pictures: against diffusers' own pipeline where it has the feature, else against the formula."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from engine_help import ask, make, pixels, same
from every_family import one_family, two_families

from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.write import write_adapter
from sdlora.errors import ConfigError, FormatError
from sdlora.families.base import PictureSize
from sdlora.families.latent import sampler as sampler_of
from sdlora.generation.engine import Engine
from sdlora.generation.pictures.infotext import infotext

STEPS = 4


@pytest.fixture
def engine(tiny_base) -> Engine:
    return Engine(tiny_base())


def picture(engine, prompt, **values):
    return make(engine, ask(prompt=prompt, steps=STEPS, **values))[0]


def close(one, other) -> bool:
    return bool(np.abs(one - other).max() <= 1)


def test_a_schedule_changes_the_prompt_at_its_step(engine):
    red, blue = picture(engine, "a red ball"), picture(engine, "a blue box")
    assert same([picture(engine, "[a red ball:a blue box:0]")], [blue])
    assert same([picture(engine, f"[a red ball:a blue box:{STEPS}]")], [red])
    half = picture(engine, "[a red ball:a blue box:0.5]")
    assert same([half], [picture(engine, "[a red ball:a blue box:2]")])
    assert not close(half, red) and not close(half, blue)


@one_family
def test_a_changing_prompt_is_as_with_diffusers_own_pipeline(tiny_base, tiny_folder):
    engine = Engine(tiny_base("sd1"))
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder("sd1"))
    pipeline.set_progress_bar_config(disable=True)
    later = torch.cat([pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in ("blue", "a blue box")])
    first_end = []

    def change(pipe, step, timestep, tensors):
        if pipe.num_timesteps * 2 // 4 <= step + 1 and not first_end:
            first_end.append(step)
            return {"prompt_embeds": later}
        return {}

    theirs = pipeline(
        "a red ball",
        negative_prompt="blue",
        num_inference_steps=STEPS,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    ).images[0]
    # The base's own sampler (PNDM) takes one evaluation more than steps; the prompt changes behind so many of them.
    when = next(
        when
        for when in range(STEPS + 1)
        if [number * STEPS // pipeline.num_timesteps + 1 > when for number in range(pipeline.num_timesteps)].index(True)
        == first_end[0] + 1
    )
    ours = make(engine, ask(prompt=f"[a red ball:a blue box:{when}]", steps=STEPS, guidance_scale=7.5, seed=0))[0]
    assert close(ours, pixels(theirs))


def test_and_adds_up_what_each_prompt_makes_of_the_noise(tiny_base, shape):
    base = tiny_base()
    engine = Engine(base)
    prompt = "a red ball AND a blue box :0.4"
    found = make(engine, ask(prompt=prompt, negative_prompt="green", steps=1, guidance_scale=3.0, seed=5))[0]
    with torch.no_grad():
        rows = base.family.encode_prompts(base, ["green", "a red ball", "a blue box"])
        sampler = sampler_of(base)
        sampler.set_timesteps(1)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)) * sampler.init_noise_sigma
        sizes = [PictureSize((64, 64), (0, 0), (64, 64))] * 3
        inputs = sampler.scale_model_input(noise, sampler.timesteps[0])
        without, red, blue = base.family.predict(base, inputs.repeat(3, 1, 1, 1), sampler.timesteps[0], rows, sizes)
        guided = without + 3.0 * (red - without) + 3.0 * 0.4 * (blue - without)
        latents = sampler.step(guided[None], sampler.timesteps[0], noise, return_dict=False)[0]
        for timestep in sampler.timesteps[1:]:
            inputs = sampler.scale_model_input(latents, timestep).repeat(3, 1, 1, 1)
            without, red, blue = base.family.predict(base, inputs, timestep, rows, sizes)
            guided = without + 3.0 * (red - without) + 3.0 * 0.4 * (blue - without)
            latents = sampler.step(guided[None], timestep, latents, return_dict=False)[0]
        expected = (base.family.decode_latents(base, latents)[0] * 255).round().permute(1, 2, 0).numpy()
    assert close(found, expected)


def test_prompts_between_ands_share_their_weight(engine):
    one = picture(engine, "a red ball")
    assert close(picture(engine, "a red ball :0.5 AND a red ball :0.5"), one)
    assert not close(picture(engine, "a red ball AND a blue box"), one)
    # Without guidance one prompt alone is all there is; several need the negative one.
    assert same(
        [picture(engine, "a red ball", guidance_scale=1.0)], [picture(engine, "a red ball", guidance_scale=0.5)]
    )
    shared = picture(engine, "a red ball :0.5 AND a red ball :0.5", guidance_scale=1.0)
    assert close(shared, picture(engine, "a red ball", guidance_scale=1.0))


def test_weights_emphasis_and_clip_skip_change_the_picture(engine, shape):
    for encoder in engine.base.text_encoders.values():
        for name, parameter in encoder.named_parameters():
            if "layer_norm" in name and name.endswith("bias"):  # as trained ones have them: else every mean is 0
                parameter.fill_(0.2)
    plain = picture(engine, "a red ball")
    weighted = picture(engine, "a (red:1.9) ball")
    assert not same([weighted], [plain])
    assert not same([picture(engine, "a (red:1.9) ball", emphasis="no norm")], [weighted])
    assert same(
        [picture(engine, "a (red:1.9) ball", emphasis="ignore")], [picture(engine, "a red ball", emphasis="ignore")]
    )
    # Of SDXL the layer before the last is the usual one.
    assert same([picture(engine, "a red ball", clip_skip=2)], [plain]) == (shape == "sdxl")
    literal = picture(engine, "a (red:1.9) {x|y} ball", emphasis="none")
    escaped = picture(engine, r"a \(red:1.9\) {x|y} ball", emphasis="none")
    assert not same([literal], [escaped])


def test_a_prompt_of_any_length_counts_to_its_end(engine):
    start = "a red ball, " * 30
    assert not same([picture(engine, start + "on grass")], [picture(engine, start + "under water")])


def test_each_picture_of_a_batch_has_prompts_of_its_own(engine, tmp_path):
    (tmp_path / "thing.txt").write_text("ball\nbox\na very long thing that is said of it, " + "and more of it, " * 20)
    values = {"prompt": "a {red|blue|green} __thing__", "negative_prompt": "{dark|bright}", "wildcards": str(tmp_path)}
    request = ask(**values, seed=3, count=6, steps=2)
    alone = list(engine.generate(request))
    together = list(engine.generate(request, batch_size=6))
    assert len({recipe.prompt for _, recipe in alone}) > 2
    for (one, recipe), (other, again) in zip(alone, together, strict=True):
        assert recipe == again and recipe.template == values["prompt"]
        assert recipe.negative_template == values["negative_prompt"] and recipe.negative_prompt in ("dark", "bright")
        assert close(pixels(one), pixels(other))  # also where the other prompts take more chunks
    one, recipe = alone[0]
    given = {"prompt": recipe.prompt, "negative_prompt": recipe.negative_prompt, "seed": recipe.seed, "steps": 2}
    assert same([pixels(one)], make(engine, ask(**given)))


@one_family
def test_the_recipe_and_the_infotext_say_how_prompts_were_understood(engine):
    ((_, recipe),) = engine.generate(ask(prompt="(a)", emphasis="no norm", clip_skip=2))
    assert (recipe.emphasis, recipe.clip_skip, recipe.template) == ("no norm", 2, "")
    assert "Clip skip: 2, Emphasis: No norm" in infotext(recipe)
    ((_, recipe),) = engine.generate(ask(prompt="(a)"))
    assert "Emphasis" not in infotext(recipe) and "Clip skip" not in infotext(recipe)


@one_family
def test_a_folder_of_wildcards_that_is_not_there_is_refused(engine):
    with pytest.raises(ConfigError, match=r"wildcards are \.txt files in it"):
        list(engine.generate(ask(wildcards="/nowhere")))


@two_families
@pytest.mark.parametrize(
    "prompt", ["", "AND", "BREAK", "[", "(((", "a AND", "[a|b", "BREAK AND BREAK", ":1.3)", "{|}", "__x__"]
)
def test_odd_prompts_make_pictures(engine, prompt):
    assert picture(engine, prompt, width=32, height=32).shape == (32, 32, 3)


@pytest.fixture
def files(tiny_base, make_adapter, tmp_path):
    """Two adapters of the tiny base, "zorb" and "blob", for UNet and text encoders."""
    for seed, name in enumerate(("zorb", "blob")):
        write_adapter(make_adapter(tiny_base(), seed=seed, alpha=4.0), tmp_path / f"{name}.safetensors")
    return {name: str(tmp_path / f"{name}.safetensors") for name in ("zorb", "blob")}


@pytest.fixture
def tagged(tiny_base, files) -> Engine:
    def find(name: str) -> Path:
        if name not in files:
            raise FormatError(f"no adapter is called {name}")
        return Path(files[name])

    return Engine(tiny_base(), find_adapter=find)


def test_a_tag_in_the_prompt_is_an_adapter(tagged, files):
    by_hand = picture(tagged, "a red ball", adapters=[{"path": files["zorb"], "weight": 0.8}])
    assert same([picture(tagged, "a red ball<lora:zorb:0.8>")], [by_hand])
    assert not same([picture(tagged, "a red ball")], [by_hand])
    ((_, recipe),) = tagged.generate(ask(prompt="a <lora:zorb:0.8> ball", steps=1))
    assert [(used.name, used.weight, used.text_encoder_weight) for used in recipe.adapters] == [("zorb", 0.8, None)]
    assert recipe.prompt == "a  ball" and "<lora:zorb:0.8>" in infotext(recipe)


def test_text_encoders_and_unet_have_weights_of_their_own(tagged, files, tiny_base):
    adapter = read_adapter(files["zorb"])
    found = picture(tagged, "a ball <lora:zorb:0.3:-0.9>")
    halves = {}
    for name, weight in (("text", 0.3), ("unet", -0.9)):
        layers = {path: layer for path, layer in adapter.layers.items() if path.startswith("unet.") == (name == "unet")}
        file = Path(files["zorb"]).with_name(f"{name}.safetensors")
        write_adapter(AdapterFile(layers, adapter.family, adapter.metadata), file)
        halves[str(file)] = weight
    expected = picture(
        tagged, "a ball ", adapters=[{"path": path, "weight": weight} for path, weight in halves.items()]
    )
    assert same([found], [expected])
    assert same([picture(tagged, "a ball <lora:zorb:0:0>")], [picture(tagged, "a ball ")])
    ((_, recipe),) = tagged.generate(ask(prompt="a <lora:zorb:0.3:-0.9>", steps=1))
    assert "<lora:zorb:0.3:-0.9>" in infotext(recipe)
    assert tagged.weights_sha256() == tiny_base().weights_sha256()


def test_each_picture_of_a_batch_has_adapters_of_its_own(tagged):
    request = ask(prompt="a {<lora:zorb:2>|<lora:blob:2>|red} ball", seed=0, count=8, steps=1)
    alone, together = list(tagged.generate(request)), list(tagged.generate(request, batch_size=4))
    assert len({tuple(used.name for used in recipe.adapters) for _, recipe in alone}) == 3
    for (one, recipe), (other, again) in zip(alone, together, strict=True):
        assert recipe == again and close(pixels(one), pixels(other))
    assert [recipe.seed for _, recipe in together] == list(range(8))


def test_a_tag_that_names_no_adapter_is_refused(tagged, engine, files):
    with pytest.raises(FormatError, match="no adapter is called dog"):
        picture(tagged, "a <lora:dog>")
    with pytest.raises(ConfigError, match="the prompt asks for <lora:dog>; name that adapter's file instead"):
        picture(engine, "a <lora:dog>")
    with pytest.raises(ConfigError, match="the adapter 'zorb' is named twice"):
        picture(tagged, "a <lora:zorb>", adapters=[{"path": files["zorb"]}])
    with pytest.raises(ConfigError, match="<lora:zorb>: weight"):
        picture(tagged, "a <lora:zorb:50>")
    assert picture(engine, "a <lora:dog>", emphasis="none").shape == (64, 64, 3)

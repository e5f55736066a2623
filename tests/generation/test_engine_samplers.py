"""Samplers, guidance rescale and noise sources in pictures, against diffusers' own pipelines where they have them."""

import contextlib
from dataclasses import dataclass, replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from dpm_solver_help import adaptive, fast
from engine_help import ask, make, pixels, same, using
from every_family import one_family

from sdlora.adapters.write import write_adapter
from sdlora.config import BaseSection
from sdlora.errors import ConfigError
from sdlora.families.base import PictureSize
from sdlora.families.registry import load_base
from sdlora.families.samplers.names import SAMPLERS
from sdlora.generation.denoising.loop import rescale
from sdlora.generation.denoising.noise import CudaGenerator, cuda_randn, drawing_noise
from sdlora.generation.engine import Engine
from sdlora.generation.pictures.infotext import infotext

STEPS = 4
LINSPACE = {"timestep_spacing": "linspace"}
THEIRS = {
    "Euler": ("EulerDiscreteScheduler", LINSPACE),
    "Euler a": ("EulerAncestralDiscreteScheduler", LINSPACE),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", LINSPACE | {"use_karras_sigmas": True}),
    "Heun": ("HeunDiscreteScheduler", LINSPACE),
    "UniPC Karras": ("UniPCMultistepScheduler", LINSPACE | {"solver_order": 3, "use_karras_sigmas": True}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
}
"""Sampler -> how their pipeline is set up for it."""
PREDICTIONS = ("sd1", "sd2")
"""A family that predicts epsilon and one that predicts v, which is all of a family that a sampler sees."""


@pytest.fixture
def engine(tiny_base) -> Engine:
    return Engine(tiny_base())


@pytest.fixture
def theirs(tiny_folder, shape):
    """`theirs(scheduler, settings, ...)`: the picture of diffusers' own pipeline."""
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder(shape))
    pipeline.set_progress_bar_config(disable=True)
    shipped = pipeline.scheduler.config

    def picture(scheduler, settings, generator=None, **options):
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(shipped, **settings)
        wanted = {"guidance_scale": 7.5, "width": 64, "height": 64, "num_inference_steps": STEPS, **options}
        generator = generator or torch.Generator().manual_seed(11)
        return pixels(pipeline("a red ball", negative_prompt="blue", generator=generator, **wanted).images[0])

    return picture


def picture(engine, **values):
    return make(engine, ask(**{"seed": 11, "steps": STEPS, **values}))[0]


def close(one, other) -> bool:
    return bool(np.abs(one - other).max() <= 1 and np.mean(one != other) < 0.01)


@one_family
@pytest.mark.parametrize("sampler", ["DDIM", "PLMS", "DDPM", ""])
def test_more_steps_than_a_sampler_has_timesteps_are_refused(engine, sampler):
    """Counted from 1, the last of 1000 would be timestep 1000, which there is not."""
    with pytest.raises(ConfigError, match="Scheduler cannot make 1000 steps; choose fewer"):
        make(engine, ask(sampler=sampler, steps=1000))


@one_family
@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_more_steps_than_a_bases_own_solver_has_levels_are_refused(engine, scheduler):
    """Two of 1000 would be equal, and the solver divides by what is between them."""
    engine.base.sampler_config = {
        **engine.base.sampler_config,
        "_class_name": scheduler,
        "timestep_spacing": "linspace",
    }
    with pytest.raises(ConfigError, match=f"{scheduler} cannot make 1000 steps; choose fewer"):
        make(engine, ask(steps=1000))


def test_steps_that_a_schedule_does_not_have_are_refused_before_a_base_is_read():
    with pytest.raises(ConfigError, match="steps is 1000; the schedule DDIM, which counts from 1, has at most 999"):
        ask(sampler="DPM++ 2M", schedule="DDIM", steps=1000)


@pytest.mark.parametrize(
    ("shape", "name"), [*((shape, name) for shape in PREDICTIONS for name in THEIRS), ("sdxl", "DPM++ 2M Karras")]
)
def test_the_pixels_are_those_of_diffusers_own_pipeline(engine, theirs, name):
    assert close(picture(engine, sampler=name), theirs(*THEIRS[name]))


@pytest.mark.parametrize("shape", PREDICTIONS)
def test_every_sampler_makes_another_picture_and_its_own_again(engine):
    small = {"width": 32, "height": 32}
    own = picture(engine, **small)
    pictures = {name: picture(engine, sampler=name, **small) for name in SAMPLERS}
    assert len({made.tobytes() for made in pictures.values()}) == len(SAMPLERS)
    for name in ("Euler a", "DPM++ 3M SDE", "UniPC"):
        assert same([picture(engine, sampler=name, **small)], [pictures[name]])
    assert same([picture(engine, **small)], [own])


@pytest.mark.parametrize("shape", PREDICTIONS)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_guidance_rescale_is_that_of_diffusers(engine, theirs, share):
    found = picture(engine, sampler="Euler", guidance_rescale=share)
    assert close(found, theirs(*THEIRS["Euler"], guidance_rescale=share))
    assert not close(found, picture(engine, sampler="Euler"))


def test_guidance_rescale_worked_out_by_hand():
    guided, plain = torch.tensor([[-6.0, 6.0]]), torch.tensor([[-1.0, 3.0]])  # deviations sqrt(72) and sqrt(8)
    torch.testing.assert_close(rescale(guided, plain, 0.7), torch.tensor([[-3.2, 3.2]]))  # 0.7 * 2 + 0.3 * 6
    assert rescale(guided, plain, 0.0) is guided


@pytest.mark.parametrize("shape", ["sd1"])
def test_pictures_of_one_batch_have_their_own_noise_and_guidance_rescale(engine):
    requests = [
        ask(seed=seed, steps=STEPS, sampler="Euler a", guidance_rescale=share) for seed, share in ((3, 0.0), (4, 0.7))
    ]
    for number, image, _ in engine.generate_all(requests, batch_size=2):
        assert np.abs(pixels(image) - make(engine, requests[number])[0]).max() <= 1


@pytest.mark.parametrize("shape", ["sd1"])
def test_pictures_of_different_samplers_are_made_apart(engine):
    settings = ({"sampler": "Euler"}, {}, {"sampler": "Euler", "schedule": "Beta"}, {"noise": "cuda"})
    requests = [ask(seed=3, **values) for values in settings]
    made = {number: pixels(image) for number, image, _ in engine.generate_all(requests, batch_size=4)}
    for number, request in enumerate(requests):
        assert same([made[number]], make(engine, request))


@one_family
@pytest.mark.parametrize(
    ("sampler", "first", "all_"),
    [("Euler", 2, 4), ("Heun", 4, 7), ("DPM2 a", 4, 7), ("DPM++ 2S a", 4, 7), ("DPM++ 2M", 2, 4), ("DPM fast", 2, 4)],
)
def test_a_prompt_changes_at_its_step_however_often_the_sampler_evaluates(engine, sampler, first, all_, monkeypatch):
    seen = []
    family = type(engine.base.family)
    predict = family.predict

    def watched(self, base, noisy, timesteps, conditioning, *more):
        seen.append(conditioning.states[1].clone())
        return predict(self, base, noisy, timesteps, conditioning, *more)

    monkeypatch.setattr(family, "predict", watched)
    picture(engine, prompt="[a red ball:a blue box:2]", sampler=sampler)
    assert len(seen) == all_
    assert [torch.equal(states, seen[0]) for states in seen] == [True] * first + [False] * (all_ - first)


@dataclass
class Question:
    """What the UNet was asked once."""

    noisy: torch.Tensor
    timestep: float
    states: torch.Tensor


@pytest.fixture
def asked_of_the_unet(engine, monkeypatch):
    """Everything that the UNet is asked."""
    questions, family = [], type(engine.base.family)
    predict = family.predict

    def watched(self, base, noisy, timesteps, conditioning, *more):
        questions.append(Question(noisy.clone(), timesteps.item(), conditioning.states[1].clone()))
        return predict(self, base, noisy, timesteps, conditioning, *more)

    monkeypatch.setattr(family, "predict", watched)
    return questions


@pytest.mark.parametrize("name", ["DPM fast", "DPM adaptive"])
def test_the_unet_is_asked_what_the_formulas_of_dpm_solver_ask(engine, name, asked_of_the_unet):
    """In float64 but for the UNet, with levels and timesteps worked out from the base's noise schedule.

    The first dozen are compared: steps that follow from errors make much of a rounding later, with random weights.
    """
    made = picture(engine, sampler=name, steps=7)
    found = asked_of_the_unet.copy()
    base = engine.base
    training = ((1 - base.alphas_cumprod.double()) / base.alphas_cumprod.double()).sqrt().numpy()
    high, low = training[-1].item(), training[0].item()
    rows = base.family.encode_prompts(base, ["blue", "a red ball"])
    sizes, generator = [PictureSize((64, 64), (0, 0), (64, 64))] * 2, torch.Generator().manual_seed(11)

    def draw():
        return torch.randn(1, 4, 8, 8, generator=generator).double()

    slopes = {}  # a step that is tried again begins with what is known

    def seen(x, sigma):
        if sigma not in slopes:
            timestep = torch.tensor(np.interp(np.log(sigma), np.log(training), np.arange(1000)), dtype=torch.float32)
            inputs = (x / (1 + sigma**2) ** 0.5).float().repeat(2, 1, 1, 1)
            without, red = base.family.predict(base, inputs, timestep, rows, sizes)[:, None].double()
            guided = without + 7.5 * (red - without)
            if base.prediction == "v":
                guided = guided / (1 + sigma**2) ** 0.5 + x * sigma / (1 + sigma**2)
            slopes[sigma] = guided
        return slopes[sigma]

    x = draw() * high
    with torch.no_grad():
        if name == "DPM fast":
            latents = fast(x, high, low, 7, 1.0, seen, draw)
            expected = (base.family.decode_latents(base, latents.float())[0] * 255).round().permute(1, 2, 0).numpy()
            assert len(found) == 7 and close(made, expected)
        else:
            adaptive(x, high, low, 1.0, seen, draw)
    asked = asked_of_the_unet[len(found) :]
    assert len(asked) == 7 or len(asked) > 12
    for ours, theirs in zip(found[:12], asked, strict=False):
        assert ours.timestep == pytest.approx(theirs.timestep, abs=0.1)
        torch.testing.assert_close(ours.noisy, theirs.noisy, rtol=2e-3, atol=2e-3)


@one_family
def test_a_prompt_changes_between_steps_that_are_fitted_to_the_picture(engine, asked_of_the_unet):
    """The steps asked for are equal parts of the way down: behind half of it, not in the middle of a step."""
    changing = picture(engine, prompt="[a red ball:a blue box:2]", sampler="DPM adaptive")
    red, blue = asked_of_the_unet[0].states, asked_of_the_unet[-1].states
    said = [torch.equal(question.states, red) for question in asked_of_the_unet]
    count = said.count(True)
    assert said == [True] * count + [False] * (len(said) - count) and not torch.equal(red, blue)
    training = ((1 - engine.base.alphas_cumprod) / engine.base.alphas_cumprod).sqrt().log().numpy()
    log_levels = [np.interp(question.timestep, np.arange(1000), training) for question in asked_of_the_unet]
    half = (training[0] + training[-1]) / 2
    # The last step of the one prompt, which has three evaluations, begins before the half; the next behind it.
    assert log_levels[count - 3] > half >= log_levels[count]
    other = picture(engine, prompt="[a red ball:a blue box:0]", sampler="DPM adaptive")
    assert not same([changing], [other])
    assert same([other], [picture(engine, prompt="a blue box", sampler="DPM adaptive")])


@one_family
def test_each_picture_has_the_steps_that_are_fitted_to_it(engine, asked_of_the_unet):
    requests = [ask(seed=3, sampler="DPM adaptive"), ask(seed=4, sampler="DPM adaptive", guidance_scale=2)]
    together = {number: pixels(image) for number, image, _ in engine.generate_all(requests, batch_size=2)}
    assert {len(question.noisy) for question in asked_of_the_unet} == {2}  # with the negative prompt
    for number, request in enumerate(requests):
        assert same([together[number]], make(engine, request))
    series = make(engine, ask(seed=3, count=2, sampler="DPM adaptive", guidance_scale=2), batch_size=2)
    assert same(series[1:], [together[1]])


@one_family
def test_progress_of_fitted_steps_tells_how_far_it_is(engine, asked_of_the_unet):
    seen = []
    make(engine, ask(count=2, steps=8, sampler="DPM adaptive"), on_step=seen.append)
    first = [at for at in seen if at.pictures_done == 0]
    steps = [at.step for at in first]
    assert len(seen) == len(asked_of_the_unet) > 16
    assert steps == sorted(steps) and steps[0] == 1 and steps[-1] == 8 and len(set(steps)) > 3
    assert {at.steps for at in seen} == {8}
    assert seen[-1].seconds_left == 0 and all(at.seconds_left > 0 for at in first)


@one_family
def test_a_second_pass_of_fitted_steps_is_counted_too(engine):
    seen = []
    request = ask(steps=4, sampler="DPM adaptive", hires_scale=2.0, hires_strength=0.5, width=32, height=32)
    (made,) = make(engine, request, on_step=seen.append)
    assert made.shape == (64, 64, 3)
    assert {at.steps for at in seen} == {8} and seen[-1].step == 8
    assert [at.step for at in seen] == sorted(at.step for at in seen)


@one_family
def test_noise_of_a_cuda_device_is_drawn_for_the_first_latents_and_in_every_step(engine, theirs, monkeypatch):
    seen = []
    family = type(engine.base.family)
    predict = family.predict

    def watched(self, base, noisy, timesteps, conditioning, *more):
        seen.append(noisy[0].clone())
        return predict(self, base, noisy, timesteps, conditioning, *more)

    with monkeypatch.context() as context:
        context.setattr(family, "predict", watched)
        found = picture(engine, sampler="Euler a", noise="cuda")
    sigma = 14.6146
    expected = cuda_randn(11, 0, seen[0].numel()).reshape(seen[0].shape) * sigma / (1 + sigma**2) ** 0.5
    np.testing.assert_allclose(seen[0].numpy(), expected, rtol=1e-4, atol=1e-5)
    with drawing_noise():
        assert close(found, theirs(*THEIRS["Euler a"], generator=CudaGenerator(11)))
    assert not close(found, picture(engine, sampler="Euler a"))


@one_family
def test_the_recipe_and_the_infotext_tell_what_ran(engine):
    asked = {"sampler": "dpm++ 2m sde", "guidance_rescale": 0.5, "noise": "cuda"}
    ((_, recipe),) = engine.generate(ask(**asked))
    assert (recipe.sampler, recipe.schedule) == ("DPM++ 2M SDE", "Exponential")
    assert (recipe.guidance_rescale, recipe.noise_device) == (0.5, "cuda")
    line = infotext(recipe).splitlines()[-1]
    assert "Sampler: DPM++ 2M SDE, Schedule type: Exponential, CFG scale: 7.5" in line
    assert "RNG: NV, CFG Rescale phi: 0.5" in line
    ((_, own),) = engine.generate(ask())
    assert (own.sampler, own.schedule, own.noise_device) == ("", "", "cpu")
    assert "Schedule type" not in infotext(own) and "Sampler: PLMS" in infotext(own)
    again = ask(sampler=recipe.sampler, schedule=recipe.schedule, guidance_rescale=0.5, noise=recipe.noise_device)
    assert same(make(engine, again), make(engine, ask(**asked)))


@pytest.mark.parametrize("shape", ["sd2"])
def test_pure_noise_is_begun_with_where_it_is_asked_for(engine, theirs, make_adapter, tmp_path):
    adapter = make_adapter(engine.base)
    still = {path: replace(layer, up=torch.zeros_like(layer.up)) for path, layer in adapter.layers.items()}
    trained_so = replace(adapter, layers=still, metadata={**adapter.metadata, "ss_zero_terminal_snr": "True"})
    write_adapter(trained_so, tmp_path / "a.safetensors")
    adapters = using((str(tmp_path / "a.safetensors"), 1.0))
    trailing = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    expected = theirs("EulerDiscreteScheduler", trailing)
    for values in ({"zero_snr": "on"}, {"adapters": adapters}):
        assert close(picture(engine, sampler="Euler", **values), expected)
    assert same([picture(engine, adapters=adapters, zero_snr="off")], [picture(engine)])
    ((_, recipe),) = engine.generate(ask(sampler="Euler", zero_snr="on"))
    assert (recipe.schedule, recipe.zero_snr) == ("Trailing", "on")
    assert "Noise Schedule: Zero Terminal SNR" in infotext(recipe)
    with pytest.raises(ConfigError, match="the sampler Heun cannot begin"):
        picture(engine, sampler="Heun", adapters=adapters)


@pytest.mark.parametrize("shape", ["sd1"])
def test_a_base_that_predicts_epsilon_cannot_begin_at_pure_noise(engine):
    with pytest.raises(ConfigError, match="predicts epsilon"):
        picture(engine, zero_snr="on")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("shape", ["sd1"])
def test_samplers_work_in_half_precision(tiny_folder, shape, precision):
    engine = Engine(load_base(BaseSection(path=str(tiny_folder(shape)), precision=precision), "cpu"))
    for name in SAMPLERS:
        ((_, recipe),) = engine.generate(ask(sampler=name, noise="cuda", guidance_rescale=0.5, width=32, height=32))
        assert (recipe.sampler, recipe.precision) == (name, precision)


@pytest.mark.parametrize("shape", ["sd1"])
@pytest.mark.parametrize(
    "name", ["DPM2 a", "DPM++ SDE", "DPM++ 2S a", "DPM fast", "DPM adaptive", "Restart", "LMS", "UniPC", "PLMS"]
)
def test_a_sampler_begins_anew_after_a_cancelled_picture(engine, name):
    expected = picture(engine, sampler=name)

    def cancel(progress):
        if progress.step >= 2:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        make(engine, ask(sampler=name, steps=STEPS), on_step=cancel)
    assert same([picture(engine, sampler=name)], [expected])

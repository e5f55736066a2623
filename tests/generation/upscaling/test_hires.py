"""The second pass: its size, its steps, its noise, and what enlarges between the passes."""

import numpy as np
import pytest
import torch
from engine_help import ask, make, pixels, same
from every_family import one_family
from PIL import Image
from upscaler_files import compact_tensors, write_upscaler

from sdlora.errors import ConfigError, FormatError
from sdlora.families.latent import sampler
from sdlora.generation.engine import Engine
from sdlora.generation.pictures.infotext import infotext
from sdlora.generation.recipe import Recipe, UsedHires
from sdlora.generation.replay.find_input import input_finder
from sdlora.generation.request import make_request
from sdlora.generation.upscaling.hires import Hires, read_hires
from sdlora.storage import serialize_tensors, sha256_of_file


@pytest.fixture
def engine(tiny_base) -> Engine:
    return Engine(tiny_base())


def hires(**values) -> dict:
    return {"hires_scale": 1.5, "hires_steps": 2, "hires_strength": 0.5, "width": 32, "height": 32, **values}


@pytest.mark.parametrize(
    ("shape", "upscaler"),
    [
        *(("sd1", name) for name in ("latent", "latent (nearest-exact)", "latent (bicubic)", "lanczos", "nearest")),
        *((shape, name) for shape in ("sd2", "sdxl") for name in ("latent", "lanczos")),
    ],
)
def test_the_picture_is_larger_and_repeatable(engine, upscaler):
    request = ask(**hires(hires_upscaler=upscaler))
    (made,) = make(engine, request)
    assert made.shape == (48, 48, 3)
    assert same([made], make(engine, request))
    assert not same([made], make(engine, ask(**hires(hires_upscaler=upscaler, seed=1))))


def test_a_second_pass_of_strength_zero_only_enlarges(engine):
    small = make(engine, ask(width=32, height=32))[0]
    (made,) = make(engine, ask(**hires(hires_scale=2, hires_strength=0.0, hires_upscaler="nearest")))
    base = engine.base
    nearest = Image.fromarray(small.astype(np.uint8)).resize((64, 64), Image.Resampling.NEAREST)
    mean, _ = base.family.encode_images(base, torch.tensor(pixels(nearest)).permute(2, 0, 1)[None] / 127.5 - 1)
    (expected,) = base.family.decode_latents(base, mean)
    assert np.abs(made - (expected * 255).permute(1, 2, 0).numpy()).max() <= 1


def test_latents_are_enlarged_and_noised_with_the_seeds_first_draw(engine, monkeypatch):
    """What the second pass begins with, computed here by hand."""
    from sdlora.generation import render

    starts = []
    real = render.denoise

    def spy(*arguments, **named):
        starts.append(arguments[2].start)
        result = real(*arguments, **named)
        starts.append(result)
        return result

    monkeypatch.setattr(render, "denoise", spy)
    noises = []
    scheduler = type(sampler(engine.base))
    real_noise = scheduler.add_noise
    monkeypatch.setattr(
        scheduler,
        "add_noise",
        lambda self, own, noise, at: noises.append((noise, int(at[0]))) or real_noise(self, own, noise, at),
    )
    make(engine, ask(**hires(seed=5, hires_scale=2)))
    _, first, second, _ = starts
    expected = torch.nn.functional.interpolate(first, (8, 8), mode="bilinear")
    assert torch.equal(second.latents, expected)
    ((noise, timestep),) = noises
    assert torch.equal(noise, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)))
    # 2 steps at strength 0.5 are the last 2 of int(2 / 0.5) = 4, which begin at 751, 501, 251 and 1.
    assert timestep == 251


def test_steps_are_those_that_run():
    """As in AUTOMATIC1111: so many steps, the last ones of as many more as the strength leaves out."""
    for steps, strength, scheduled in [(10, 0.5, 20), (10, 0.7, 14), (20, 1.0, 20), (25, 0.3, 83), (10, 0.001, 999)]:
        second = Hires(UsedHires(2.0, steps, strength, "latent"), "latent")
        assert (second.scheduled_steps, second.run_steps) == (scheduled, steps)
    assert Hires(UsedHires(2.0, 10, 0.0, "latent"), "latent").run_steps == 0


@one_family
def test_progress_counts_over_both_passes(engine):
    seen = []
    make(engine, ask(**hires()), on_step=seen.append)
    assert [(at.step, at.steps) for at in seen] == [(step, len(seen)) for step in range(1, len(seen) + 1)]
    assert len(seen) >= 4


@one_family
def test_prompts_are_in_the_second_pass_what_they_were_at_the_end(engine):
    changing = make(engine, ask(prompt="[a red ball:a blue box:2]", **hires()))
    assert same(changing, make(engine, ask(**hires())))  # of two steps, the change would come after the second


def test_sizes_are_multiples_of_8():
    request = ask(hires_scale=1.3)
    assert read_hires(request).size((512, 768)) == (664, 992)
    assert read_hires(ask(hires_scale=1.1)).size((640, 640)) == (704, 704)  # not 703.99
    assert read_hires(ask()) is None


@one_family
def test_a_file_of_an_upscaler_enlarges(engine, tmp_path):
    path = write_upscaler(tmp_path / "tiny_x4.safetensors", blocks=1, features=4, growth=2)
    request = ask(**hires(hires_upscaler=str(path)))
    ((picture, recipe),) = engine.generate(request)
    assert picture.size == (48, 48)
    assert recipe.hires == UsedHires(1.5, 2, 0.5, "tiny_x4", sha256_of_file(path))
    assert (recipe.width, recipe.height) == (32, 32)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert "Denoising strength: 0.5, Hires upscale: 1.5, Hires steps: 2, Hires upscaler: tiny_x4" in infotext(recipe)
    assert not same([pixels(picture)], make(engine, ask(**hires(hires_upscaler="lanczos"))))


@one_family
def test_pictures_with_and_without_a_second_pass_are_not_mixed(engine):
    requests = [ask(**hires()), ask(width=32, height=32), ask(**hires(seed=3))]
    made = {number: pixels(picture) for number, picture, _ in engine.generate_all(requests, batch_size=3)}
    for number, request in enumerate(requests):
        assert np.abs(made[number] - make(engine, request)[0]).max() <= 1


@one_family
@pytest.mark.parametrize(
    ("values", "error", "sentence"),
    [
        ({"hires_upscaler": "latant"}, ConfigError, "hires_upscaler is 'latant'; expected latent, "),
        ({"hires_upscaler": "missing.safetensors"}, FormatError, "missing.safetensors: cannot be read"),
        (
            {"sampler": "LCM", "steps": 8, "hires_steps": 0, "hires_strength": 0.1},
            ConfigError,
            "8 steps of a second pass at hires_strength 0.1 are the last of 80, and the sampler LCM takes at most 50",
        ),
        ({"hires_scale": 8, "width": 1024}, ConfigError, "hires_scale 8 makes 8192x256 pixels, at most 4096"),
    ],
)
def test_what_cannot_be_is_refused_before_any_step(engine, monkeypatch, values, error, sentence):
    monkeypatch.setattr(engine.base.unet, "forward", lambda *_, **__: pytest.fail("the UNet ran"))
    with pytest.raises(error) as caught:
        make(engine, ask(**hires(**values)))
    assert sentence in str(caught.value)


def test_a_size_that_the_base_decides_is_refused_too(engine, monkeypatch):
    monkeypatch.setattr(engine.base.unet, "forward", lambda *_, **__: pytest.fail("the UNet ran"))
    engine.base.resolution = 768
    with pytest.raises(ConfigError, match="hires_scale 8 makes 6144x6144 pixels"):
        make(engine, ask(hires_scale=8))


@one_family
def test_an_upscaler_may_be_a_pickle(engine, tmp_path):
    tensors = compact_tensors(scale=2, layers=1, features=4)
    safe, pickled = tmp_path / "a.safetensors", tmp_path / "b.pth"
    safe.write_bytes(serialize_tensors(tensors, {}))
    torch.save({"params": tensors}, pickled)
    (one, _), (other, recipe) = (
        next(engine.generate(ask(**hires(hires_upscaler=str(path))))) for path in (safe, pickled)
    )
    assert np.array_equal(pixels(one), pixels(other))
    assert input_finder([tmp_path])(recipe.hires.upscaler, recipe.hires.upscaler_sha256) == pickled


def test_an_upscaler_is_hashed_once(tmp_path, monkeypatch):
    write_upscaler(tmp_path / "up.safetensors", blocks=1, features=4, growth=2)
    hashed = []
    monkeypatch.setattr("sdlora.storage.sha256_of_file", lambda path: hashed.append(path) or "ab" * 32)
    for seed in range(3):
        read_hires(make_request(prompt="a", seed=seed, hires_scale=2, hires_upscaler=str(tmp_path / "up.safetensors")))
    assert len(hashed) == 1

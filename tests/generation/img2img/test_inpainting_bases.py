"""Bases with a UNet of nine channels: the same latents as diffusers' inpainting pipelines, from folders and checkpoints."""

import shutil

import diffusers
import ldm_layout
import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForInpainting
from engine_help import ask, make, painted_by_diffusers, pixels, same
from every_family import one_family
from families_help import load
from inpainting_bases import inpainting_pipeline
from PIL import Image

from sdlora.adapters.write import write_adapter
from sdlora.assets import EXAMPLE_CONCEPT
from sdlora.config import BaseSection, TrainConfig
from sdlora.errors import ConfigError
from sdlora.families import registry
from sdlora.generation.engine import Engine
from sdlora.generation.pictures.files import save_picture
from sdlora.generation.replay.find_base import base_finder
from sdlora.generation.replay.replaying import replay
from sdlora.training import run


@pytest.fixture(scope="session")
def inpainting_folder(tmp_path_factory):
    """`inpainting_folder(shape)`: a diffusers folder of such a base; do not write to it."""
    folders = {}

    def folder(shape):
        if shape not in folders:
            folders[shape] = tmp_path_factory.mktemp("inpainting") / shape
            inpainting_pipeline(shape).save_pretrained(folders[shape])
        return folders[shape]

    return folder


@pytest.fixture
def engine(inpainting_folder, shape) -> Engine:
    return Engine(load(inpainting_folder(shape)))


@pytest.fixture
def photo(tmp_path) -> str:
    coarse = Image.fromarray(np.random.default_rng(1).integers(0, 255, (4, 4, 3), np.uint8))
    coarse.resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def mask(tmp_path) -> str:
    """White in the right half."""
    return halved(tmp_path / "mask.png", (32, 0, 64, 64))


def halved(path, box) -> str:
    picture = Image.new("L", (64, 64))
    picture.paste(255, box)
    picture.save(path)
    return str(path)


def watch_latents(vae) -> list[torch.Tensor]:
    """Return what will be decoded, scaled as the VAE takes it."""
    seen: list[torch.Tensor] = []
    vae.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


@pytest.mark.parametrize(
    ("strength", "sampler"),
    # PNDM, the base's own, begins partway at another level than diffusers does; the last draws noise after what is shown.
    [(1.0, ""), (0.6, "EulerDiscreteScheduler"), (0.6, "EulerAncestralDiscreteScheduler")],
)
def test_the_latents_are_those_of_diffusers_own_pipeline(inpainting_folder, shape, photo, mask, strength, sampler):
    base = load(inpainting_folder(shape))
    pipeline = AutoPipelineForInpainting.from_pretrained(inpainting_folder(shape))
    pipeline.set_progress_bar_config(disable=True)
    if sampler:
        base.sampler_config = {**base.sampler_config, "_class_name": sampler}
        pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
    ours, theirs = watch_latents(base.vae), watch_latents(pipeline.vae)
    settings = {"image": photo, "mask": mask, "mask_blur": 0, "strength": strength}
    (made,) = make(Engine(base), ask(seed=11, steps=5, **settings))
    painted_by_diffusers(pipeline, photo, mask, strength)
    difference = (ours[-1] - theirs[-1]).abs().max() / theirs[-1].abs().max()
    assert difference < 1e-5
    assert np.array_equal(made[:, :32], pixels(Image.open(photo))[:, :32])


def test_a_checkpoint_gives_the_folders_pictures(inpainting_folder, tiny_folder, shape, photo, mask, tmp_path):
    """The description of the family's plain bases serves: the number of channels is the file's own."""
    path = tmp_path / "inpainting.safetensors"
    declared = {"modelspec.prediction_type": "v" if shape == "sd2" else "epsilon"}
    ldm_layout.write_checkpoint(inpainting_pipeline(shape), path, metadata=declared)
    request = ask(image=photo, mask=mask, strength=0.8, steps=3)
    single = load(path, config=str(tiny_folder(shape)))
    assert single.inpaints and single.family.name == shape
    assert same(make(Engine(single), request), make(Engine(load(inpainting_folder(shape))), request))


def test_it_is_measured_what_a_checkpoint_predicts(tmp_path, tiny_folder, monkeypatch):
    path = tmp_path / "inpainting.safetensors"
    ldm_layout.write_checkpoint(inpainting_pipeline("sd1"), path)
    shown, measure = [], registry.measure_prediction
    monkeypatch.setattr(registry, "measure_prediction", lambda *given: shown.append(given[-1]) or measure(*given))
    config = tmp_path / "config"
    shutil.copytree(tiny_folder("sd1"), config, ignore=shutil.ignore_patterns("*.safetensors"))
    scheduler = config / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"prediction_type"', '"no_prediction_type"'))
    base = load(path, config=str(config))
    assert any("predicts" in note for note in base.notes)
    assert shown[0].shape == (1, 5, 16, 16) and bool((shown[0][:, 0] == 1).all())


@one_family
def test_what_the_mask_covers_is_not_shown(engine, photo, mask, tmp_path):
    """At a strength of 1 nothing that lies under the mask gets into the picture, and what lies beside it does."""
    given = Image.open(photo).convert("RGB")
    given.paste((0, 255, 0), (32, 0, 64, 64))
    given.save(tmp_path / "green.png")
    whole = {"mask": mask, "mask_blur": 0, "strength": 1.0}
    covered = make(engine, ask(image=photo, **whole)) + make(engine, ask(image=str(tmp_path / "green.png"), **whole))
    assert same(covered[:1], covered[1:])
    given.paste((0, 255, 0), (0, 0, 32, 64))
    given.save(tmp_path / "all-green.png")
    assert not np.array_equal(
        make(engine, ask(image=str(tmp_path / "all-green.png"), **whole))[0][:, 32:], covered[0][:, 32:]
    )


@one_family
@pytest.mark.parametrize("values", [{}, {"image": True, "strength": 0.5}, {"hires_scale": 2}])
def test_without_a_mask_all_is_masked(engine, photo, values):
    """As in AUTOMATIC1111: the mask is 1 and the picture grey all over."""
    seen = []
    engine.base.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    make(engine, ask(**values | ({"image": photo} if "image" in values else {})))
    for inputs in seen:
        height, width = inputs.shape[-2:]
        grey, _ = engine.base.family.encode_images(engine.base, torch.zeros(1, 3, 8 * height, 8 * width))
        assert inputs.shape[1] == 9 and bool((inputs[:, 4] == 1).all())
        torch.testing.assert_close(inputs[:, 5:], grey.expand(len(inputs), -1, -1, -1))


@one_family
def test_a_batch_equals_the_pictures_made_alone(engine, photo, tmp_path):
    masks = [halved(tmp_path / f"{n}.png", box) for n, box in enumerate([(0, 0, 24, 64), (40, 8, 64, 40)])]
    requests = [ask(image=photo, mask=path, seed=n, strength=0.8) for n, path in enumerate(masks)]
    together = {number: pixels(picture) for number, picture, _ in engine.generate_all(requests, batch_size=2)}
    for number, request in enumerate(requests):
        assert np.abs(together[number] - make(engine, request)[0]).max() <= 1


def test_adapters_of_the_plain_family_act(engine, tiny_base, make_adapter, photo, mask, tmp_path):
    path = str(tmp_path / "plain.safetensors")
    write_adapter(make_adapter(tiny_base()), path, "kohya")
    before = engine.weights_sha256()
    plain, adapted = (
        make(engine, ask(image=photo, mask=mask, adapters=adapters))
        for adapters in ((), ({"path": path, "weight": 1.0},))
    )
    assert not same(plain, adapted)
    assert engine.weights_sha256() == before


@one_family
def test_a_picture_is_made_again_from_its_recipe(engine, inpainting_folder, photo, mask, tmp_path):
    ((picture, recipe),) = engine.generate(ask(image=photo, mask=mask, steps=3))
    path = save_picture(picture, recipe, tmp_path / "made.png")
    again = replay(
        path, base_finder(BaseSection(path=str(inpainting_folder("sd1")))), lambda item: pytest.fail(item.name)
    )
    assert again.comparison.identical and again.differences == ()


def test_it_is_not_trained_on(inpainting_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_base", lambda *_, **__: pytest.fail("it was loaded"))
    config = TrainConfig.model_validate(
        {
            "base": {"path": str(inpainting_folder("sd1"))},
            "data": {"folder": str(EXAMPLE_CONCEPT / "train"), "trigger": "zorblin"},
            "output": {"folder": str(tmp_path / "run"), "name": "a"},
            "training": {"steps": 2},
        }
    )
    with pytest.raises(ConfigError, match=r"is an inpainting model, which is not trained on; train on the plain base"):
        run.train(config)

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from engine_help import ask, make, pixels, same, using
from every_family import one_family, two_families

from sdlora.adapters.trainable import new_adapter
from sdlora.adapters.write import write_adapter
from sdlora.config import AdapterSection, BaseSection
from sdlora.errors import ConfigError, FormatError, GenerationCancelled, GenerationError, ModelError
from sdlora.families.base import Conditioning, PictureSize
from sdlora.generation import resident
from sdlora.generation.engine import Engine, refuse_foreign_adapters
from sdlora.generation.pictures.files import read_recipe, save_picture
from sdlora.storage import sha256_of_file, sha256_of_tensor_data


@pytest.fixture
def engine(tiny_base) -> Engine:
    return Engine(tiny_base())


@pytest.fixture
def adapters(tiny_base, make_adapter, tmp_path) -> list[str]:
    """Three adapter files that fit the tiny base."""
    base, paths = tiny_base(), []
    for seed in range(3):
        write_adapter(make_adapter(base, seed=seed, alpha=4.0), tmp_path / f"adapter{seed}.v1.safetensors")
        paths.append(str(tmp_path / f"adapter{seed}.v1.safetensors"))
    return paths


def test_the_same_request_gives_the_same_pixels_and_another_seed_others(engine, tiny_base):
    first = make(engine, ask(seed=3))
    assert first[0].shape == (64, 64, 3)
    assert same(first, make(engine, ask(seed=3)))
    assert same(first, make(Engine(tiny_base()), ask(seed=3)))
    assert not same(first, make(engine, ask(seed=4)))
    assert not same(first, make(engine, ask(seed=3, prompt="a blue box")))


def test_a_picture_of_several_equals_the_one_made_alone_with_its_seed(engine):
    together = make(engine, ask(seed=7, count=3))
    assert len(together) == 3
    for index, picture in enumerate(together):
        assert same([picture], make(engine, ask(seed=7 + index)))


def test_a_batch_is_close_to_the_pictures_made_alone(engine):
    alone = make(engine, ask(seed=7, count=3))
    for batch_size in (2, 3, 8):
        together = make(engine, ask(seed=7, count=3), batch_size=batch_size)
        assert [np.abs(a - b).max() <= 1 for a, b in zip(alone, together, strict=True)] == [True] * 3


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_the_pixels_are_those_of_diffusers_own_pipeline(tiny_base, tiny_folder, shape, guidance_scale):
    ours = make(Engine(tiny_base()), ask(seed=11, steps=4, guidance_scale=guidance_scale))
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder(shape))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a red ball",
        negative_prompt="blue",
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(11),
    ).images[0]
    assert np.abs(ours[0] - pixels(theirs)).max() <= 1
    assert np.mean(ours[0] != pixels(theirs)) < 0.01


@one_family
def test_size_and_a_single_step(engine):
    assert make(engine, ask(width=48, height=40, steps=1))[0].shape == (40, 48, 3)


@two_families
def test_the_recipe_says_what_ran_and_makes_the_picture_again(engine, adapters, tmp_path):
    request = ask(seed=5, count=2, adapters=using((adapters[0], 0.8)))
    (_, _), (picture, recipe) = engine.generate(request)
    assert (recipe.seed, recipe.steps, recipe.width, recipe.height) == (6, 2, 64, 64)
    assert recipe.base_sha256 == engine.base.source.sha256
    (used,) = recipe.adapters
    assert (used.name, used.weight) == ("adapter0.v1", 0.8)
    assert used.sha256 == sha256_of_file(tmp_path / "adapter0.v1.safetensors")
    assert used.tensor_sha256 == sha256_of_tensor_data(tmp_path / "adapter0.v1.safetensors")
    assert recipe.scheduler == "PNDMScheduler"
    assert recipe.versions["torch"] == torch.__version__
    save_picture(picture, recipe, tmp_path / "a.png")
    again = read_recipe(tmp_path / "a.png")
    assert again == recipe
    asked = ask(
        prompt=again.prompt,
        negative_prompt=again.negative_prompt,
        seed=again.seed,
        steps=again.steps,
        guidance_scale=again.guidance_scale,
        width=again.width,
        height=again.height,
        adapters=using((adapters[0], again.adapters[0].weight)),
    )
    assert same([pixels(picture)], make(engine, asked))


def test_weight_zero_equals_no_adapter_bit_for_bit(engine, adapters):
    bare = make(engine, ask())
    assert same(bare, make(engine, ask(adapters=using((adapters[0], 0.0)))))
    assert not same(bare, make(engine, ask(adapters=using((adapters[0], 1.0)))))
    assert same(bare, make(engine, ask()))


@one_family
def test_the_order_of_earlier_requests_does_not_matter(engine, adapters, tiny_base):
    make(engine, ask(adapters=using((adapters[0], 1.0), (adapters[1], 0.5))))
    make(engine, ask(adapters=using((adapters[2], -1.0))))
    after = make(engine, ask(adapters=using((adapters[1], 1.0))))
    assert same(after, make(Engine(tiny_base()), ask(adapters=using((adapters[1], 1.0)))))


@two_families
def test_the_base_is_as_before_after_mixes_errors_and_cancels(engine, adapters, make_adapter, tiny_base, tmp_path):
    digest, bare = engine.weights_sha256(), make(engine, ask())
    make(engine, ask(adapters=using((adapters[0], 1.0), (adapters[1], -0.7))))
    sd2 = make_adapter(tiny_base("sd2"), patterns=("conv_in", "attentions.*.proj_in"))
    broken = dict(sd2.layers)
    broken["unet.mid_block.no.such.layer"] = next(iter(broken.values()))
    write_adapter(type(sd2)(broken, "sd2"), tmp_path / "other.safetensors")
    (tmp_path / "page.safetensors").write_text("<html>")
    for path, error in (("other", ModelError), ("page", FormatError), ("missing", FormatError)):
        with pytest.raises(error):
            make(engine, ask(adapters=using((adapters[0], 1.0), (str(tmp_path / f"{path}.safetensors"), 1.0))))
        assert same(bare, make(engine, ask()))

    def cancel(progress):
        raise GenerationCancelled("stopped")

    with pytest.raises(GenerationCancelled):
        make(engine, ask(adapters=using((adapters[2], 1.0))), on_step=cancel)
    assert same(bare, make(engine, ask()))
    assert engine.weights_sha256() == digest


def latents_of(base) -> torch.Tensor:
    states = torch.ones(1, 77, base.unet.config.cross_attention_dim)
    size = PictureSize((64, 64), (0, 0), (64, 64))
    with torch.no_grad():
        texts = Conditioning(states, torch.ones(1, 32))
        return base.family.predict(base, torch.ones(1, 4, 8, 8), torch.tensor([500]), texts, [size])


@one_family
def test_a_cancelled_request_leaves_no_adapter_active(engine, adapters):
    bare = latents_of(engine.base)

    def cancel(progress):
        assert not torch.equal(latents_of(engine.base), bare)  # here it is active
        raise GenerationCancelled("stopped")

    with pytest.raises(GenerationCancelled):
        make(engine, ask(adapters=using((adapters[0], 1.0))), on_step=cancel)
    assert torch.equal(latents_of(engine.base), bare)


@one_family
def test_a_paused_request_leaves_no_adapter_active_and_goes_on_unharmed(engine, adapters):
    bare = latents_of(engine.base)
    request = ask(count=2, adapters=using((adapters[0], 1.0)))
    expected = make(engine, request)
    paused = engine.generate(request)
    first = pixels(next(paused)[0])
    assert torch.equal(latents_of(engine.base), bare)
    make(engine, ask(adapters=using((adapters[1], 1.0))))
    second = pixels(next(paused)[0])
    assert same([first, second], expected)


@one_family
def test_progress_counts_to_the_last_step_of_the_last_picture(engine):
    seen = []
    make(engine, ask(count=2, steps=3), on_step=seen.append)
    assert [progress.pictures_done for progress in seen] == sorted(progress.pictures_done for progress in seen)
    assert {progress.pictures for progress in seen} == {2}
    for done in (0, 1):
        steps = [(progress.step, progress.steps) for progress in seen if progress.pictures_done == done]
        total = steps[0][1]
        assert steps == [(step, total) for step in range(1, total + 1)]
        assert total >= 3


@one_family
def test_adapters_stay_resident_and_the_least_recently_used_is_let_go(tiny_base, adapters, monkeypatch):
    reads = []
    real = resident.read_adapter
    monkeypatch.setattr(resident, "read_adapter", lambda path: reads.append(path.name[:8]) or real(path))
    engine = Engine(tiny_base(), resident_adapters=2)
    for index in (0, 1, 0, 2, 0, 1):
        make(engine, ask(steps=1, adapters=using((adapters[index], 1.0))))
    # 2 pushes out 1, since 0 was used after it; then 1 is read again
    assert reads == ["adapter0", "adapter1", "adapter2", "adapter1"]


@one_family
def test_a_request_may_use_more_adapters_than_stay_resident(engine, adapters, tiny_base):
    request = ask(adapters=using(*((path, 0.5) for path in adapters)))
    expected = make(Engine(tiny_base()), request)
    assert same(make(Engine(tiny_base(), resident_adapters=1), request), expected)


@one_family
def test_a_file_that_was_written_anew_is_read_anew(engine, adapters, make_adapter, tiny_base, tmp_path):
    first = make(engine, ask(adapters=using((adapters[0], 1.0))))
    write_adapter(make_adapter(tiny_base(), seed=9, alpha=5.0), adapters[0])
    assert not same(first, make(engine, ask(adapters=using((adapters[0], 1.0)))))


@one_family
def test_one_file_by_two_names_is_refused(engine, adapters, tmp_path):
    other = tmp_path / "link.safetensors"
    other.symlink_to(adapters[0])
    with pytest.raises(ConfigError, match=r"link\.safetensors: the same adapter file is named twice"):
        make(engine, ask(adapters=using((adapters[0], 1.0), (str(other), 1.0))))


@two_families
def test_a_live_adapter_acts_in_every_picture_also_after_errors(tiny_base, adapters, tmp_path):
    base = tiny_base()
    bare = make(Engine(base), ask())
    trained = new_adapter(base, "live", AdapterSection(rank=2), 0)
    with torch.no_grad():
        for weight in trained.weights:
            weight.parameter.fill_(0.2)
    engine = Engine(base, live_adapters={"live": 1.0})
    live = make(engine, ask())
    assert not same(live, bare)
    with pytest.raises(FormatError):
        make(engine, ask(adapters=using((adapters[0], 1.0), (str(tmp_path / "missing.safetensors"), 1.0))))
    active = latents_of(base)
    assert same(live, make(engine, ask()))
    assert torch.equal(latents_of(base), active)
    assert not same(live, make(engine, ask(adapters=using((adapters[0], 1.0)))))
    assert same(live, make(engine, ask()))


@one_family
def test_nan_is_an_error_that_names_prompt_and_precision(engine):
    with torch.no_grad():
        engine.base.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(GenerationError, match="the UNet gave NaN for 'a red ball' in fp32 at step 1 of 3; use fp32"):
        make(engine, ask())


@one_family
def test_nan_of_the_vae_is_an_error(engine):
    with torch.no_grad():
        engine.base.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(GenerationError, match="the VAE gave NaN for 'a red ball'"):
        make(engine, ask())


@one_family
def test_too_little_memory_is_an_error_that_says_so_and_the_next_request_works(engine, monkeypatch):
    def no_room(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as context:
        context.setattr(engine.base.unet, "forward", no_room)
        with pytest.raises(GenerationError, match="memory is too small for this; choose a smaller width"):
            make(engine, ask())
    assert make(engine, ask())


def test_a_base_with_dots_in_its_name_keeps_them(tiny_folder, tmp_path):
    (tmp_path / "dreamy-v1.5").symlink_to(tiny_folder("sd1"))
    ((_, recipe),) = Engine(str(tmp_path / "dreamy-v1.5"), device="cpu").generate(ask(steps=1))
    assert recipe.base == "dreamy-v1.5"


def test_an_adapter_of_another_family_is_refused_before_any_work(tiny_base, tiny_folder, make_adapter, tmp_path, shape):
    other = "sd2" if shape == "sdxl" else "sdxl"
    base = tiny_base(other)
    metadata = dict(base.family.metadata[base.prediction])
    path = tmp_path / "other.safetensors"
    write_adapter(replace(make_adapter(base), metadata=metadata), path)
    section = BaseSection(path=str(tiny_folder(shape)))
    with pytest.raises(ModelError) as caught:
        refuse_foreign_adapters(section, [str(path)])
    assert f"the adapter is for {base.family.title}" in str(caught.value)
    with pytest.raises(ModelError, match=f"the adapter is for {base.family.title}"):
        make(Engine(tiny_base()), ask(adapters=using((str(path), 1.0))))
    refuse_foreign_adapters(BaseSection(path=str(tiny_folder(other))), [str(path)])

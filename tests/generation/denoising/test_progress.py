"""What is told of each step, and ending a request within one."""

import time

import numpy as np
import pytest
import torch
from engine_help import ask, make, same, using
from every_family import one_family
from PIL import Image

from sdlora.adapters.write import write_adapter
from sdlora.config import BaseSection
from sdlora.errors import GenerationCancelled
from sdlora.families.registry import load_base
from sdlora.families.traits import SD1_TRAITS, SDXL_TRAITS
from sdlora.generation.denoising import progress
from sdlora.generation.denoising.preview import LatentColours, latent_colours
from sdlora.generation.engine import Engine


@pytest.fixture
def engine(tiny_base) -> Engine:
    return Engine(tiny_base())


def hooks(base) -> int:
    return sum(len(module._forward_pre_hooks) for _, model in base.components() for module in model.modules())


@one_family
def test_a_request_ends_within_a_step(engine, make_adapter, tmp_path):
    write_adapter(make_adapter(engine.base), tmp_path / "a.safetensors")
    digest, bare, hooked = engine.weights_sha256(), make(engine, ask()), hooks(engine.base)
    request = ask(steps=5, adapters=using((str(tmp_path / "a.safetensors"), 1.0)))
    whole = 0

    def counts() -> bool:
        nonlocal whole
        whole += 1
        return False

    seen = []
    make(engine, request, should_stop=counts, on_step=seen.append)
    assert whole / len(seen) > 5  # so often in a step
    for stop_at in (1, whole // 3, whole // 2, whole - 1):
        asked = 0

        def stop(stop_at: int = stop_at) -> bool:
            nonlocal asked
            asked += 1
            return asked == stop_at

        with pytest.raises(GenerationCancelled):
            make(engine, request, should_stop=stop)
        assert asked == stop_at
        assert hooks(engine.base) == hooked
        assert same(bare, make(engine, ask()))
    assert engine.weights_sha256() == digest


@one_family
def test_nothing_is_asked_between_requests(engine):
    make(engine, ask(), should_stop=lambda: False)
    assert hooks(engine.base) == hooks(Engine(engine.base).base) == 0


@one_family
def test_the_time_left_is_at_the_pace_so_far(engine, monkeypatch):
    """Two pictures of 4 steps, each step a second: 7 left after the first, none after the last."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    left = []

    def on_step(at):
        left.append(at.seconds_left)

    real = Engine._make_fitting

    def slowly(self, batch, after_step):
        def ticking(*arguments):
            nonlocal now
            now += 1.0
            after_step(*arguments)

        return real(self, batch, ticking)

    monkeypatch.setattr(Engine, "_make_fitting", slowly)
    for _ in engine.generate(ask(count=2, steps=3), on_step=on_step):
        now += 1000.0  # the caller takes its time, which does not count
    assert len(left) == 8
    assert left == pytest.approx([7, 6, 5, 4, 3, 2, 1, 0])


def test_each_step_can_be_looked_at(engine):
    shown = []
    make(engine, ask(width=48, height=32, steps=3), on_step=lambda at: shown.extend(at.preview()))
    assert [picture.size for picture in shown] == [(6, 4)] * len(shown)
    assert len(shown) >= 3 and not np.array_equal(np.asarray(shown[0]), np.asarray(shown[-1]))


@one_family
def test_a_batch_shows_all_its_pictures(engine):
    counts = []
    list(engine.generate(ask(count=3), batch_size=2, on_step=lambda at: counts.append(len(at.preview()))))
    assert set(counts) == {2, 1}


def published(traits) -> LatentColours:
    return LatentColours(torch.tensor(traits.latent_rgb), torch.tensor(traits.latent_rgb_bias))


def test_colours_by_hand():
    """Latent (1, 0, 0, 0): SD 1.5's first row is red .3512, green .2297, blue .3227; 255 * (x / 2 + .5)."""
    latents = torch.zeros(1, 4, 1, 2)
    latents[0, 0, 0, 0] = 1.0
    (picture,) = published(SD1_TRAITS).pictures(latents)
    assert isinstance(picture, Image.Image) and picture.size == (2, 1)
    assert [picture.getpixel((0, 0)), picture.getpixel((1, 0))] == [(172, 157, 169), (128, 128, 128)]
    (picture,) = published(SDXL_TRAITS).pictures(torch.zeros(1, 4, 1, 2))
    assert picture.getpixel((0, 0)) == (141, 125, 127)  # the bias alone


def test_noise_of_a_sampler_that_counts_in_sigmas_is_brought_down():
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = noise / noise.std(dim=(1, 2, 3), keepdim=True)
    both = (published(SD1_TRAITS).pictures(one) for one in (noise * 14.6, plain))
    for one, other in zip(*both, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_a_vae_of_another_size_has_a_map_of_its_own():
    """The tiny base's latents mean other colours than SD 1.5's: by that map, red would be seen as blue."""
    base = load_base(BaseSection(path="tiny"), "cpu")

    def seen(colours: LatentColours, colour: tuple[int, int, int]) -> np.ndarray:
        pixels = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 64, 64) / 127.5 - 1
        (picture,) = colours.pictures(base.family.encode_images(base, pixels)[0])
        return np.asarray(picture).astype(float).mean(axis=(0, 1))

    wanted = [(220, 30, 30), (30, 30, 220), (240, 240, 240), (30, 160, 60)]
    own, others = (
        np.mean([np.abs(seen(colours, colour) - colour).mean() for colour in wanted])
        for colours in (latent_colours(base), published(SD1_TRAITS))
    )
    assert own < others / 2
    for colour in wanted[:2]:
        assert seen(latent_colours(base), colour).argmax() == np.argmax(colour)


@one_family
def test_a_vae_of_the_usual_size_has_the_published_map(tiny_base):
    base = tiny_base()
    base.vae.register_to_config(block_out_channels=(128, 256, 512, 512))
    assert latent_colours(base).factors.tolist() == torch.tensor(base.family.traits.latent_rgb).tolist()


@one_family
def test_a_vae_that_gives_nan_for_colours_has_the_published_map(tiny_base):
    base = tiny_base()
    with torch.no_grad():
        base.vae.encoder.conv_out.bias.fill_(float("nan"))
    assert latent_colours(base).factors.tolist() == torch.tensor(base.family.traits.latent_rgb).tolist()


@one_family
def test_cancelling_takes_a_part_of_a_step(engine):
    """The UNet of the tiny base has dozens of blocks: after it is asked to stop, no more than one of them runs."""
    started = 0

    def count(module, inputs):
        nonlocal started
        started += 1

    stop = False
    block = engine.base.unet.down_blocks[0].resnets[0]

    def stop_now(module, inputs, output):
        nonlocal stop
        stop = True

    handles = [block.register_forward_hook(stop_now)]
    handles += [
        b.register_forward_hook(lambda *_: count(*_[:2]))
        for b in (*engine.base.unet.up_blocks, engine.base.unet.mid_block)
    ]
    before = time.monotonic()
    with pytest.raises(GenerationCancelled):
        make(engine, ask(steps=50), should_stop=lambda: stop)
    for handle in handles:
        handle.remove()
    assert started == 0 and time.monotonic() - before < 30

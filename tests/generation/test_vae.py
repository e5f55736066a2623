"""The VAE at work: tiles, float32 after NaN, pictures of one colour, and everything as before afterwards."""

import numpy as np
import pytest
import torch
from engine_help import ask, make, pixels
from every_family import one_family
from PIL import Image

from sdlora.config import BaseSection
from sdlora.errors import GenerationError
from sdlora.families.base import module_sha256
from sdlora.families.registry import load_base
from sdlora.generation.engine import Engine
from sdlora.generation.vae import Vae


@pytest.fixture
def half_base(tiny_folder, shape):
    """A base whose VAE is in float16 and overflows there."""
    base = load_base(BaseSection(path=str(tiny_folder(shape)), precision="fp16"), "cpu")
    with torch.no_grad():
        weight = base.vae.float().decoder.conv_out.weight
        weight.copy_((weight * 1e6).clamp(-60000, 60000))
        base.vae.half()
    return base


def latents(side: int = 8) -> torch.Tensor:
    return torch.randn(4, side, side, generator=torch.Generator().manual_seed(0))


def test_nan_in_fp16_is_computed_again_in_fp32_which_is_noted(half_base):
    base, before = half_base, module_sha256(half_base.vae)
    assert base.family.decode_latents(base, latents()[None].half()).isnan().any()
    vae = Vae(base, "auto", "x")
    picture = vae.decode(latents().half())
    assert vae.notes == ["the VAE gave NaN in fp16 and was run again in fp32"]
    assert base.vae.dtype == torch.float16 and module_sha256(base.vae) == before
    base.vae.float()
    assert torch.equal(picture, base.family.decode_latents(base, latents()[None].half())[0])


@one_family
def test_the_recipe_says_so(half_base):
    digest = half_base.weights_sha256()
    ((_, recipe),) = Engine(half_base).generate(ask(steps=1))
    assert recipe.notes == ("the VAE gave NaN in fp16 and was run again in fp32",)
    assert half_base.weights_sha256() == digest


def test_encoding_is_computed_again_too(tiny_folder, shape):
    base = load_base(BaseSection(path=str(tiny_folder(shape)), precision="fp16"), "cpu")
    with torch.no_grad():
        weight = base.vae.float().encoder.conv_out.weight
        weight.copy_((weight * 1e6).clamp(-60000, 60000))
        base.vae.half()
    vae = Vae(base, "auto", "x")
    assert vae.encode(torch.ones(1, 3, 64, 64)).isfinite().all()
    assert vae.notes == ["the VAE gave NaN in fp16 and was run again in fp32"]
    assert base.vae.dtype == torch.float16


@one_family
def test_nan_in_fp32_too_is_an_error_and_the_precision_is_as_before(half_base):
    with torch.no_grad():
        half_base.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(GenerationError, match="the VAE gave NaN for 'x', in fp32 too; its weights"):
        Vae(half_base, "auto", "x").decode(latents().half())
    assert half_base.vae.dtype == torch.float16


@one_family
def test_a_picture_of_one_colour_is_noted_with_the_stage(tiny_base):
    base = tiny_base()
    vae = Vae(base, "auto", "a cat")
    vae.decode(torch.zeros(4, 8, 8))
    even = vae.notes
    with torch.no_grad():
        base.vae.decoder.conv_out.weight.zero_()
    vae = Vae(base, "auto", "a cat")
    assert torch.equal(vae.decode(latents()), vae.decode(latents()))
    assert vae.notes[0] == "the picture for 'a cat' is of one colour: the VAE made it so of latents that are not"
    vae = Vae(base, "auto", "a cat")
    vae.decode(torch.zeros(4, 8, 8))
    assert vae.notes == ["the picture for 'a cat' is of one colour: the UNet's latents are as even"]
    assert even in ([], vae.notes)


@one_family
def test_in_tiles_it_is_nearly_the_same_and_the_setting_is_as_before(tiny_base):
    base = tiny_base()
    whole, tiled = Vae(base, "off", "x"), Vae(base, "on", "x")
    one, other = whole.decode(latents(24)), tiled.decode(latents(24))
    assert not torch.equal(one, other) and (one - other).abs().mean() < 0.1
    assert (whole.tiled, tiled.tiled, base.vae.use_tiling) == (False, True, False)
    pixels_in = torch.linspace(-1, 1, 3 * 128 * 128).reshape(1, 3, 128, 128)
    assert (whole.encode(pixels_in) - tiled.encode(pixels_in)).abs().mean() < 0.1
    base.vae.enable_tiling()
    Vae(base, "on", "x").decode(latents(24))
    assert base.vae.use_tiling


@one_family
def test_tiles_are_diffusers_own(tiny_base):
    base = tiny_base()
    made = Vae(base, "on", "x").decode(latents(24))
    base.vae.enable_tiling()
    assert torch.equal(made, base.family.decode_latents(base, latents(24)[None])[0])


@one_family
def test_auto_is_in_tiles_for_large_pictures_and_where_memory_runs_out(tiny_base, monkeypatch):
    from sdlora.generation import vae as module

    base = tiny_base()
    calls = []
    real = base.vae.decode

    def small_memory(latents, *arguments, **named):
        calls.append(base.vae.use_tiling)
        if not base.vae.use_tiling and latents.shape[-1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(latents, *arguments, **named)

    monkeypatch.setattr(base.vae, "decode", small_memory)
    auto = Vae(base, "auto", "x")
    auto.decode(latents(24))
    assert calls == [False, True] and auto.tiled and not base.vae.use_tiling
    with pytest.raises(torch.OutOfMemoryError):
        Vae(base, "off", "x").decode(latents(24))
    calls.clear()
    monkeypatch.setattr(module, "_TILED_ABOVE_PIXELS", 100 * 100)
    large = Vae(base, "auto", "x")
    large.decode(latents(16))
    assert calls == [True] and large.tiled
    calls.clear()
    first = Vae(base, "auto", "x", 101 * 100)  # small itself, but a larger pass follows
    first.decode(latents(8))
    assert calls == [True] and first.tiled


@one_family
def test_the_recipe_says_whether_it_worked_in_tiles(tiny_base):
    engine = Engine(tiny_base())
    ((tiled, recipe),) = engine.generate(ask(width=128, height=128, vae_tiling="on"))
    assert recipe.vae_tiling
    ((whole, recipe),) = engine.generate(ask(width=128, height=128))
    assert not recipe.vae_tiling
    assert not np.array_equal(pixels(tiled), pixels(whole))


@one_family
def test_an_exception_inside_leaves_the_vae_as_it_was(half_base, monkeypatch):
    real = half_base.vae.decode

    def breaks_in_fp32(*arguments, **named):
        if half_base.vae.dtype == torch.float32:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(half_base.vae, "decode", breaks_in_fp32)
    with pytest.raises(KeyboardInterrupt):
        Vae(half_base, "on", "x").decode(latents(16).half())
    assert half_base.vae.dtype == torch.float16 and not half_base.vae.use_tiling


@one_family
def test_a_picture_to_start_from_goes_through_the_same(half_base, tmp_path):
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "red.png")
    made = make(Engine(half_base), ask(image=str(tmp_path / "red.png"), strength=0.5, steps=2))
    assert made[0].shape == (64, 64, 3)

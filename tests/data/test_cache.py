import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.data import cache
from sdlora.data.buckets import fit_picture
from sdlora.data.cache import encode_captions, encode_pictures
from sdlora.data.source import Sample, read_picture
from sdlora.errors import DataError


@pytest.fixture
def samples(tmp_path):
    random = np.random.default_rng(0)
    made = []
    for index, size in enumerate([(64, 64), (128, 32), (64, 64), (40, 90), (64, 64)]):
        path = tmp_path / f"{index}.png"
        Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        made.append(Sample(path, f"caption {index}"))
    return made


def test_examples_hold_the_vaes_own_posterior_in_the_order_of_the_samples(tiny_base, samples):
    base = tiny_base()
    steps = []
    examples = encode_pictures(base, samples, 64, on_progress=lambda done, of: steps.append((done, of)))
    assert [example.sample for example in examples] == samples
    assert [example.bucket for example in examples] == [(64, 64), (128, 32), (64, 64), (40, 88), (64, 64)]
    for example in examples:
        pixels = fit_picture(read_picture(example.sample.path), example.bucket).pixels
        posterior = base.vae.encode(pixels[None]).latent_dist
        width, height = example.bucket
        assert example.mean.shape == example.std.shape == (1, 4, height // 8, width // 8)
        scale = base.vae.config.scaling_factor
        torch.testing.assert_close(example.mean, posterior.mean * scale, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(example.std, posterior.std * scale, atol=1e-5, rtol=1e-5)
    assert steps[-1] == (5, 5)
    assert steps == sorted(steps)


def test_the_mirrored_picture_is_the_second_variant(tiny_base, samples):
    base = tiny_base()
    (example,) = encode_pictures(base, samples[1:2], 64, flip=True)
    pixels = fit_picture(read_picture(samples[1].path), (128, 32)).pixels[None]
    for row, variant in enumerate((pixels, pixels.flip(-1))):
        mean, std = base.family.encode_images(base, variant)
        torch.testing.assert_close(example.mean[row], mean[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(example.std[row], std[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(example.mean[0], example.mean[1], atol=1e-3)


def test_without_buckets_every_picture_is_a_square(tiny_base, samples):
    examples = encode_pictures(tiny_base(), samples, 64, buckets=False)
    assert {example.bucket for example in examples} == {(64, 64)}
    assert examples[1].size.original == (32, 128)
    assert examples[1].size.crop_top_left == (0, 96)  # 32 x 128 is scaled to 64 x 256


def test_more_pictures_than_are_decoded_ahead_keep_their_order(tiny_base, samples, monkeypatch):
    monkeypatch.setattr(cache, "_DECODE_AHEAD", 2)
    examples = encode_pictures(tiny_base(), samples, 64)
    assert [example.sample for example in examples] == samples
    assert [example.size.original for example in examples] == [(64, 64), (32, 128), (64, 64), (90, 40), (64, 64)]


def test_an_unreadable_picture_is_named(tiny_base, samples):
    samples[3].path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"3\.png: cannot be read"):
        encode_pictures(tiny_base(), samples, 64)


def test_non_finite_latents_name_the_picture_and_the_precision(tiny_base, samples):
    base = tiny_base()
    with torch.no_grad():
        base.vae.encoder.conv_in.weight.fill_(float("inf"))
    with pytest.raises(
        DataError, match=r"0\.png: the VAE gives non-finite latents .* set base\.precision to fp32 or bf16"
    ):
        encode_pictures(base, samples, 64)


def test_captions_are_encoded_once_each_and_no_prompt_too(tiny_base):
    base = tiny_base()
    captions = [f"a picture of {word}" for word in ["red", "blue", "red", "green"]]
    rows = encode_captions(base, captions, batch_size=2)
    assert set(rows) == {*captions, None}
    for text, conditioning in rows.items():
        assert conditioning.states.shape == (1, 77, base.unet.config.cross_attention_dim)
        assert not conditioning.states.requires_grad
        alone = base.family.encode_prompts(base, [text]).states
        torch.testing.assert_close(conditioning.states, alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(rows[captions[0]].states, rows[captions[1]].states, atol=1e-3)

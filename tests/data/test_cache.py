import os

import numpy as np
import pytest
import torch
from encoded import encode, picture_files
from every_family import SHAPES
from forked import forked, needs_fork
from PIL import Image

from sdlora.config import DataSection
from sdlora.data import cache
from sdlora.data import store as store_module
from sdlora.data.buckets import crop_of, fit_picture
from sdlora.data.cache import encode_pictures
from sdlora.data.pictures import read_picture
from sdlora.data.store import TensorStore
from sdlora.errors import DataError

SIZES = [(64, 64), (128, 32), (64, 64), (40, 90), (64, 64)]


def draw(path, size, seed=0, mode="RGB"):
    random = np.random.default_rng([seed, *size])
    bands = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    values = random.integers(0, 255, (size[1], size[0], bands), dtype=np.uint8)
    Image.fromarray(values.squeeze(), mode).save(path)
    os.utime(path, (1e9 + seed, 1e9 + seed))
    return path


@pytest.fixture
def shape():
    """One family for most tests here: all have the same kind of VAE."""
    return "sd1"


@pytest.fixture
def section(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, size in enumerate(SIZES):
        draw(folder / f"{index}.png", size, index)
    return DataSection(
        folder=str(folder),
        caption="x",
        buckets={"shapes": "classic"},
        cache={"folder": str(tmp_path / "cache")},
    )


def changed(section, **values):
    return DataSection.model_validate(section.model_dump() | values)


@pytest.fixture
def encoder_runs(monkeypatch):
    """How many pictures each call of the encoder got."""
    runs = []
    group = cache._encode_group
    monkeypatch.setattr(
        cache, "_encode_group", lambda base, cuts, *rest: (runs.append(len(cuts)), group(base, cuts, *rest))
    )
    return runs


def posterior_by_hand(base, path, cut, background="white"):
    pixels = fit_picture(read_picture(path, background=background), cut)
    posterior = base.vae.encode(pixels[None]).latent_dist
    scale = base.vae.config.scaling_factor
    return posterior.mean[0] * scale, posterior.std[0] * scale


@pytest.mark.parametrize("shape", SHAPES)
def test_examples_hold_the_vaes_own_posterior_in_the_order_of_the_samples(tiny_base, section):
    base = tiny_base()
    examples = encode(base, section)
    assert [example.sample.path.name for example in examples] == [f"{n}.png" for n in range(5)]
    assert [example.bucket for example in examples] == [(64, 64), (128, 32), (64, 64), (40, 88), (64, 64)]
    for example, size in zip(examples, SIZES, strict=True):
        posterior = example.posterior()
        width, height = example.bucket
        assert posterior.mean.shape == posterior.std.shape == (4, height // 8, width // 8)
        assert posterior.mask is None
        mean, std = posterior_by_hand(base, example.sample.path, crop_of(*size, example.bucket))
        torch.testing.assert_close(posterior.mean, mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(posterior.std, std, atol=1e-5, rtol=1e-5)


def test_mirrored_and_random_crops_are_variants(tiny_base, section):
    base = tiny_base()
    example = encode(base, changed(section, flip=True, crops=3))[3]  # 40 x 90 in 40 x 88
    assert len(example.variants) == 6
    assert [variant.flipped for variant in example.variants] == [False, True] * 3
    for number, variant in enumerate(example.variants):
        pixels = fit_picture(read_picture(example.sample.path), variant.cut)[None]
        mean, _ = base.family.encode_images(base, pixels.flip(-1) if variant.flipped else pixels)
        torch.testing.assert_close(example.posterior(number).mean, mean[0], atol=1e-5, rtol=1e-5)
    assert len({variant.cut.crop_top_left for variant in example.variants}) > 1


def test_masks_are_cut_and_mirrored_with_their_picture(tiny_base, section, tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[:16, :32] = 255
    Image.fromarray(mask).save(tmp_path / "pictures" / "0-masklabel.png")
    examples = encode(tiny_base(), changed(section, flip=True))
    assert len(examples) == 5
    plain, mirrored = (examples[0].posterior(number).mask for number in range(2))
    assert plain.shape == (1, 8, 8)
    assert torch.equal(plain[0, :2, :4], torch.ones(2, 4)) and plain.sum() == 8
    assert torch.equal(mirrored, plain.flip(-1))
    assert examples[1].posterior().mask is None


def test_opacity_can_be_the_mask(tiny_base, section, tmp_path):
    draw(tmp_path / "pictures" / "0.png", (64, 64), mode="RGBA")
    plain = encode(tiny_base(), section)[0]
    assert plain.posterior().mask is None
    example = encode(tiny_base(), changed(section, masks={"source": "alpha"}))[0]
    alpha = np.asarray(Image.open(tmp_path / "pictures" / "0.png"))[..., 3] / 255
    expected = torch.from_numpy(alpha.reshape(8, 8, 8, 8).mean(axis=(1, 3)))
    torch.testing.assert_close(example.posterior().mask[0].double(), expected, atol=4e-3, rtol=0)
    assert torch.equal(example.posterior().mean, plain.posterior().mean)


def test_a_mask_of_another_shape_is_named(tiny_base, section, tmp_path):
    draw(tmp_path / "pictures" / "1-masklabel.png", (64, 64), mode="L")
    with pytest.raises(DataError, match=r"1-masklabel\.png: mask is 64x64, .*1\.png is 128x32; resize the mask"):
        encode(tiny_base(), section)


# --- what is encoded again, and what is not ----------------------------------------------------------


def test_nothing_is_encoded_twice(tiny_base, section, encoder_runs):
    first = encode(tiny_base(), section)
    assert sum(encoder_runs) == 5
    again = encode(tiny_base(), section)
    assert sum(encoder_runs) == 5
    assert all(torch.equal(a.posterior().mean, b.posterior().mean) for a, b in zip(first, again, strict=True))


def test_a_renamed_or_moved_picture_is_known(tiny_base, section, tmp_path, encoder_runs):
    encode(tiny_base(), section)
    folder = tmp_path / "pictures"
    (folder / "0.png").rename(folder / "zzz.png")
    folder.rename(tmp_path / "moved")
    examples = encode(tiny_base(), changed(section, folder=str(tmp_path / "moved")))
    assert sum(encoder_runs) == 5
    assert [example.sample.path.name for example in examples][-1] == "zzz.png"


def test_a_copy_is_encoded_once(tiny_base, section, tmp_path, encoder_runs):
    (tmp_path / "pictures" / "copy.png").write_bytes((tmp_path / "pictures" / "0.png").read_bytes())
    examples = encode(tiny_base(), section)
    assert sum(encoder_runs) == 5
    assert torch.equal(examples[0].posterior().mean, examples[5].posterior().mean)


def test_an_edited_picture_is_encoded_anew(tiny_base, section, tmp_path, encoder_runs):
    before = encode(tiny_base(), section)[2].posterior().mean
    draw(tmp_path / "pictures" / "2.png", (64, 64), seed=77)
    after = encode(tiny_base(), section)[2].posterior().mean
    assert sum(encoder_runs) == 6
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"resolution": 128}, 5),
        ({"flip": True}, 5),
        ({"buckets": {"enabled": False}}, 2),
        ({"background": "black"}, 5),
        ({"repeats": 3, "caption": "y", "weight": 0.5}, 0),
        ({"masks": {"source": "alpha"}}, 5),
    ],
)
def test_another_transform_meets_no_stale_entry(tiny_base, section, encoder_runs, change, again):
    encode(tiny_base(), section)
    del encoder_runs[:]
    examples = encode(tiny_base(), changed(section, **change))
    assert sum(encoder_runs) == again
    width, height = examples[0].bucket
    assert examples[0].posterior().mean.shape == (4, height // 8, width // 8)


def test_another_vae_or_precision_meets_no_stale_entry(tiny_base, section, encoder_runs):
    base = tiny_base()
    before = encode(base, section)[0].posterior().mean
    with torch.no_grad():
        base.vae.encoder.conv_in.weight.mul_(1.01)
    assert not torch.equal(encode(base, section)[0].posterior().mean, before)
    assert sum(encoder_runs) == 10
    base.vae.to(torch.bfloat16)
    encode(base, section)
    assert sum(encoder_runs) == 15


def test_a_damaged_shard_is_encoded_anew(tiny_base, section, tmp_path, encoder_runs):
    before = [example.posterior().mean for example in encode(tiny_base(), section)]
    (shard,) = picture_files(tmp_path / "cache")
    data = bytearray(shard.read_bytes())
    data[-100] ^= 16
    shard.write_bytes(data)
    examples = encode(tiny_base(), section)
    assert sum(encoder_runs) == 10
    assert examples[0].store.damaged == 1
    assert all(torch.equal(a.posterior().mean, b) for a, b in zip(examples, before, strict=True))


def test_what_was_encoded_before_an_interruption_is_kept(tiny_base, section, tmp_path, monkeypatch, encoder_runs):
    monkeypatch.setattr(cache, "_PICTURES_AT_ONCE", 1)
    elsewhere = changed(section, cache={"folder": str(tmp_path / "other")})
    reference = [example.posterior().mean for example in encode(tiny_base(), elsewhere)]
    del encoder_runs[:]

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    base = tiny_base()
    encode_whole = cache.encode_pictures
    monkeypatch.setattr(
        "encoded.encode_pictures", lambda base, examples: encode_whole(base, examples, on_progress=stop)
    )
    with pytest.raises(KeyboardInterrupt):
        encode(base, section)
    monkeypatch.setattr("encoded.encode_pictures", encode_whole)
    assert sum(encoder_runs) == 3
    examples = encode(base, section)
    assert sum(encoder_runs) == 5
    assert all(torch.equal(a.posterior().mean, b) for a, b in zip(examples, reference, strict=True))


def encoding(base, section, sums, dies=False):
    """Return a process that encodes the pictures and writes the sum of their latents; it may be killed at its third."""

    def encode_and_sum():
        store_module._SECONDS_UNTIL_WRITTEN = 0.0
        cache._PICTURES_AT_ONCE = 1
        if dies:
            TensorStore.write_shard = write_and_die
        examples = encode(base, section)
        print(sum(float(example.posterior().mean.double().sum()) for example in examples))

    write = TensorStore.write_shard

    def write_and_die(self, tensors):
        write(self, tensors)
        if len(list(self.folder.glob("*.safetensors"))) == 3:
            os._exit(9)

    return forked(encode_and_sum, sums.fileno())


@needs_fork
def test_killed_in_the_middle_and_run_again_twice_at_once(tiny_base, section, tmp_path):
    base = tiny_base()
    with (tmp_path / "sums").open("w") as sums:
        killed = encoding(base, section, sums, dies=True)
        killed.join(120)
        assert killed.exitcode == 9
        assert len(picture_files(tmp_path / "cache")) == 3
        together = [encoding(base, section, sums) for _ in range(2)]
        for run in together:
            run.join(120)
            assert run.exitcode == 0
    sums = {round(float(line), 6) for line in (tmp_path / "sums").read_text().split()}
    alone = encode(tiny_base(), changed(section, cache={"folder": str(tmp_path / "other")}))
    expected = sum(float(example.posterior().mean.double().sum()) for example in alone)
    assert len(sums) == 1 and sums.pop() == pytest.approx(expected, abs=1e-3)
    store = TensorStore(next((tmp_path / "cache" / "pictures").iterdir()))
    assert store.find([variant.name for example in alone for variant in example.variants]) and store.damaged == 0


# --- what cannot be encoded --------------------------------------------------------------------------


def test_all_pictures_that_cannot_be_decoded_are_named_at_once(tiny_base, section, tmp_path):
    for name in ("1.png", "3.png"):
        path = tmp_path / "pictures" / name
        path.write_bytes(path.read_bytes()[:-200])  # the header is sound
    with pytest.raises(DataError) as caught:
        encode(tiny_base(), section)
    message = str(caught.value)
    assert message.startswith("2 things are wrong with the pictures:")
    assert "1.png: " in message and "3.png: " in message
    assert len(picture_files(tmp_path / "cache")) == 1  # the others are kept


def test_non_finite_latents_name_the_picture_and_the_precision(tiny_base, section, tmp_path):
    base = tiny_base()
    with torch.no_grad():
        base.vae.encoder.conv_in.weight.fill_(float("inf"))
    with pytest.raises(
        DataError, match=r"0\.png: the VAE gives non-finite latents .* set base\.precision to fp32 or bf16"
    ):
        encode(base, section)
    assert not picture_files(tmp_path / "cache")


def test_progress_counts_pictures(tiny_base, section, monkeypatch):
    monkeypatch.setattr(cache, "_PICTURES_AT_ONCE", 2)
    steps = []
    whole = encode_pictures
    monkeypatch.setattr(
        "encoded.encode_pictures",
        lambda base, examples: whole(base, examples, on_progress=lambda done, of: steps.append((done, of))),
    )
    encode(tiny_base(), changed(section, flip=True))
    assert steps[-1] == (5, 5) and steps == sorted(steps)


def test_only_some_are_decoded_ahead(tiny_base, section, monkeypatch):
    monkeypatch.setattr(cache, "_PIXELS_AHEAD", 0)
    assert len(encode(tiny_base(), section)) == 5


# --- files that change meanwhile ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["0.png", "0-masklabel.png"])
def test_a_file_that_changes_after_it_was_hashed_is_not_kept_under_that_name(
    tiny_base, section, tmp_path, monkeypatch, name
):
    folder = tmp_path / "pictures"
    draw(folder / "0-masklabel.png", (64, 64), mode="L")
    whole = cache.encode_pictures

    def edit_first(base, examples):
        draw(folder / name, (64, 64), seed=50, mode="L" if "mask" in name else "RGB")
        whole(base, examples)

    monkeypatch.setattr("encoded.encode_pictures", edit_first)
    with pytest.raises(DataError, match=rf"{name}: was changed while it was being read; start again"):
        encode(tiny_base(), section)
    monkeypatch.setattr("encoded.encode_pictures", whole)
    path = folder / "0.png"
    example = encode(tiny_base(), section)[0]
    mean, _ = posterior_by_hand(tiny_base(), path, example.size)
    torch.testing.assert_close(example.posterior().mean, mean, atol=1e-5, rtol=1e-5)


def test_many_crops_are_not_all_decoded_ahead(tiny_base, section, monkeypatch):
    decoded = []
    cut = cache._cut
    monkeypatch.setattr(
        cache, "_cut", lambda example, source, wanted: (decoded.append(len(wanted)), cut(example, source, wanted))[1]
    )
    monkeypatch.setattr(cache, "_PIXELS_AHEAD", 3 * 64 * 64)
    examples = encode(tiny_base(), changed(section, crops=4, flip=True))
    assert decoded == [8] * 5
    assert all(example.posterior(7).mean.isfinite().all() for example in examples)

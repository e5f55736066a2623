"""Upscalers from files: both layouts of keys, the network's arithmetic by hand, tiles, refusals."""

import random
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from upscaler_files import compact_tensors, first_layout, later_layout, rrdb_tensors, write_upscaler

from sdlora.errors import FormatError, GenerationError
from sdlora.generation.upscaling import upscaler as module
from sdlora.generation.upscaling.files import check_upscaler, read_upscaler
from sdlora.generation.upscaling.networks import CompactPlan, RrdbPlan
from sdlora.generation.upscaling.upscaler import upscale
from sdlora.storage import serialize_tensors

CPU = torch.device("cpu")
SMALL = {"blocks": 2, "features": 8, "growth": 4}


@pytest.fixture
def shape() -> str:
    """No base takes part."""
    return "sd1"


def picture(width: int, height: int) -> Image.Image:
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 5, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def by_hand(tensors: dict[str, torch.Tensor], pixels: torch.Tensor, ups: int) -> torch.Tensor:
    """Return what Wang et al. 2018 describe, written without any module."""

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], padding=1)

    def active(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, 0.2 * x)

    first = x = conv("conv_first", pixels)
    blocks = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("body."))
    for block in range(blocks):
        before = x
        for dense in (1, 2, 3):
            parts = [x]
            for layer in (1, 2, 3, 4):
                parts.append(active(conv(f"body.{block}.rdb{dense}.conv{layer}", torch.cat(parts, 1))))
            x = x + 0.2 * conv(f"body.{block}.rdb{dense}.conv5", torch.cat(parts, 1))
        x = before + 0.2 * x
    x = first + conv("conv_body", x)
    for number in range(1, ups + 1):
        x = active(conv(f"conv_up{number}", x.repeat_interleave(2, -1).repeat_interleave(2, -2)))
    return conv("conv_last", active(conv("conv_hr", x)))


@pytest.mark.parametrize(("scale", "ups"), [(4, 2), (2, 1), (1, 0), (8, 3)])
def test_the_network_is_the_published_one(tmp_path, scale, ups):
    tensors = rrdb_tensors(scale=scale, **SMALL)
    network = read_upscaler(write_upscaler(tmp_path / "x.safetensors", scale=scale, **SMALL))
    pixels = torch.rand(1, 3, 9, 12, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(network(pixels), by_hand(tensors, pixels, ups), atol=1e-5)
    assert network.plan == RrdbPlan(scale, 2, 8, 4, 1)


def test_of_a_network_for_twice_the_size_pixels_become_channels_first(tmp_path):
    path = write_upscaler(tmp_path / "x2plus.safetensors", scale=2, channels=12, **SMALL)
    network = read_upscaler(path)
    pixels = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    folded = pixels.reshape(1, 3, 4, 2, 6, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 12, 4, 6)
    expected = by_hand(rrdb_tensors(scale=2, channels=12, **SMALL), folded, 2)
    assert torch.allclose(network(pixels), expected, atol=1e-5)
    assert upscale(network, picture(7, 5), CPU).size == (14, 10)  # odd sides are filled up


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_all_layouts_are_the_same_network(tmp_path, scale):
    tensors = rrdb_tensors(scale=scale, **SMALL)
    one, other, third = (tmp_path / f"{n}.safetensors" for n in "abc")
    one.write_bytes(serialize_tensors(tensors, {}))
    other.write_bytes(serialize_tensors(first_layout(tensors), {}))
    third.write_bytes(serialize_tensors({f"params_ema.{key}": value.half() for key, value in tensors.items()}, {}))
    shown = picture(20, 16)
    first = np.asarray(upscale(read_upscaler(one), shown, CPU)).astype(int)
    assert first.shape == (16 * scale, 20 * scale, 3) and first.std() > 1
    assert np.array_equal(first, np.asarray(upscale(read_upscaler(other), shown, CPU)))
    assert np.abs(first - np.asarray(upscale(read_upscaler(third), shown, CPU))).max() <= 2
    fourth = tmp_path / "d.safetensors"
    fourth.write_bytes(serialize_tensors(later_layout(tensors), {}))
    assert np.array_equal(first, np.asarray(upscale(read_upscaler(fourth), shown, CPU)))


def test_a_file_of_the_true_size_is_recognised_by_its_header(tmp_path):
    tensors = rrdb_tensors()
    assert sum(tensor.numel() for tensor in tensors.values()) == 16_697_987  # as of RealESRGAN_x4plus
    path = tmp_path / "RealESRGAN_x4plus.safetensors"
    path.write_bytes(serialize_tensors(tensors, {}))
    assert check_upscaler(path) == RrdbPlan(4, 23, 64, 32, 1)
    path.write_bytes(serialize_tensors(first_layout(tensors), {}))
    assert check_upscaler(path) == RrdbPlan(4, 23, 64, 32, 1)
    assert upscale(read_upscaler(path), picture(12, 8), CPU).size == (48, 32)


# --- compact networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("wrapping", ["", "params."])
def test_a_compact_network_is_the_published_one(tmp_path, scale, wrapping):
    tensors = compact_tensors(scale, layers=2, features=8)
    path = tmp_path / "x.safetensors"
    path.write_bytes(serialize_tensors({f"{wrapping}{key}": tensor for key, tensor in tensors.items()}, {}))
    pixels = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    x = pixels
    for number in (0, 2, 4, 6):
        x = functional.conv2d(x, tensors[f"body.{number}.weight"], tensors[f"body.{number}.bias"], padding=1)
        if number < 6:
            x = torch.where(x > 0, x, tensors[f"body.{number + 1}.weight"][:, None, None] * x)
    # Of each pixel the channels are s x s pixels, colour by colour, rows before columns (Shi et al. 2016, eq. 4).
    made = x.reshape(1, 3, scale, scale, 5, 7).permute(0, 1, 4, 2, 5, 3).reshape(1, 3, 5 * scale, 7 * scale)
    expected = made + pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    network = read_upscaler(path)
    torch.testing.assert_close(network(pixels), expected)
    assert network.plan == CompactPlan(scale, 2, 8)
    assert upscale(network, picture(7, 5), CPU).size == (7 * scale, 5 * scale)


def test_compact_files_of_the_true_sizes(tmp_path):
    for name, layers, features, count in (("general", 32, 64, 1_213_296), ("animevideo", 16, 64, 621_424)):
        tensors = compact_tensors(4, layers, features)
        assert sum(tensor.numel() for tensor in tensors.values()) == count
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(serialize_tensors(tensors, {}))
        assert check_upscaler(path) == CompactPlan(4, layers, features)


# --- pickles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", ["params_ema", "params", "state_dict", ""])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["rrdb", "first layout", "compact"])
def test_a_pickle_is_the_same_network_as_its_safetensors(tmp_path, wrapped, zipped, kind):
    rrdb = rrdb_tensors(scale=2, **SMALL)
    tensors = {"rrdb": rrdb, "first layout": first_layout(rrdb), "compact": compact_tensors(2, 1, 4)}[kind]
    safe, pickled = tmp_path / "x.safetensors", tmp_path / "x.pth"
    safe.write_bytes(serialize_tensors(tensors, {}))
    torch.save({wrapped: tensors} if wrapped else tensors, pickled, _use_new_zipfile_serialization=zipped)
    assert check_upscaler(pickled) == check_upscaler(safe)
    one, other = (np.asarray(upscale(read_upscaler(path), picture(9, 7), CPU)) for path in (safe, pickled))
    assert np.array_equal(one, other)


def test_of_a_pickle_with_both_the_averaged_weights_count(tmp_path):
    plain, averaged = compact_tensors(2, 1, 4, seed=1), compact_tensors(2, 1, 4, seed=2)
    torch.save({"params": plain, "params_ema": averaged}, tmp_path / "x.pth")
    assert torch.equal(read_upscaler(tmp_path / "x.pth").state_dict()["body.0.weight"], averaged["body.0.weight"])


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"params": compact_tensors(2, 1, 4), "more": Payload(tmp_path / "ran")}, path)
    with pytest.raises(FormatError, match="or holds more than weights, which is never run"):
        check_upscaler(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(2)], "is no upscaler that is known"),
        ({}, "is no upscaler that is known"),
        ({"params": {"body.0.weight": 3}}, "'body.0.weight' in it is no plain weight"),
        ({"body.0.weight": torch.ones(2, 3, 3, 3).to_sparse()}, "is no plain weight"),
        ({"body.0.weight": torch.ones(2, 3, 3, 3, device="meta")}, "is no plain weight"),
        ({"body.0.weight": torch.ones(2, 3, 3, 3, dtype=torch.complex64)}, "is no plain weight"),
        ({"params": {3: torch.ones(2)}}, "is no upscaler that is known"),
        ({"body.0.weight": torch.ones(1).expand(10_000, 3, 3, 3)}, "is no plain weight"),
        (dict.fromkeys(map(str, range(50)), torch.ones(1000)), "larger than the file"),
        ({"body.0.weight": torch.ones(2, 3, 3, 3)}, "ends in 2 channels"),
        ({**compact_tensors(2, 1, 4), "body.9.weight": torch.ones(2)}, "differs from a network of its kind"),
        ({**compact_tensors(2, 1, 4), "body.3.weight": torch.ones(2)}, "at 'body.3.weight'"),
    ],
)
def test_a_pickle_of_something_else_is_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "x.pth"
    torch.save(content, path)
    with pytest.raises(FormatError) as caught:
        check_upscaler(path)
    assert sentence in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_refusal_is_found_once(tmp_path, monkeypatch):
    torch.save([1], tmp_path / "x.pth")
    loaded = []
    monkeypatch.setattr(torch, "load", lambda *_, **__: loaded.append(1))
    sentences = []
    for _ in range(3):
        with pytest.raises(FormatError) as caught:
            check_upscaler(tmp_path / "x.pth")
        sentences.append(str(caught.value))
    assert len(loaded) == 1 and len(set(sentences)) == 1


def test_a_pickle_that_unpacks_to_more_than_it_has_is_not_unpacked(tmp_path, monkeypatch):
    torch.save(compact_tensors(2, 1, 4), tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
        packed.writestr("archive/data/99", bytes(1 << 20))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(FormatError, match="is packed, which torch's own files are not"):
        check_upscaler(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles_are_one_sentence(tmp_path, zipped):
    path, tensors = tmp_path / "x.pth", compact_tensors(2, 1, 4)
    torch.save({"params": tensors}, path, _use_new_zipfile_serialization=zipped)
    whole, draw = path.read_bytes(), random.Random(0)
    for number in range(150):
        bits = bytearray(whole)
        bits[draw.randrange(len(bits))] ^= 1 << draw.randrange(8)
        damaged = tmp_path / f"{number}.pth"
        damaged.write_bytes(bits if number % 3 else bits[: draw.randrange(len(bits))])
        with suppress(FormatError):
            check_upscaler(damaged)
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(FormatError, match="is no file; expected an upscaler"):
        check_upscaler(tmp_path / "folder.pth")


def test_a_header_that_names_thousands_of_layers_is_refused_at_once(tmp_path):
    blocks = {f"body.{n}.rdb1.conv1.weight": torch.zeros(4, 8, 1, 1) for n in range(101)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(serialize_tensors({**rrdb_tensors(**SMALL), **blocks}, {}))
    with pytest.raises(FormatError, match="names 101 blocks, more than 100"):
        check_upscaler(path)
    path = tmp_path / "y.safetensors"
    path.write_bytes(serialize_tensors(compact_tensors(2, layers=399, features=1), {}))
    with pytest.raises(FormatError, match="names 401 layers, more than 400"):
        check_upscaler(path)


# --- tiles -------------------------------------------------------------------------------------------


def test_tiles_are_seamless(tmp_path, monkeypatch):
    network = read_upscaler(write_upscaler(tmp_path / "x.safetensors", scale=2, blocks=1, features=4, growth=2))
    shown = picture(90, 70)
    whole = np.asarray(upscale(network, shown, CPU)).astype(int)
    monkeypatch.setattr(module, "_TILE", 80)
    seen = []
    tiled = np.asarray(upscale(network, shown, CPU, lambda done, tiles: seen.append((done, tiles))))
    assert seen == [(number, 9) for number in range(1, 10)]
    # This network sees 3 * 5 + 4 pixels far at most, less than tiles overlap.
    assert np.abs(whole - tiled).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(1, 1), (336, 336), (337, 700), (1000, 50)])
def test_tiles_cover_every_pixel_once(width, height):
    count = np.zeros((height, width), int)
    for (left, top, right, bottom), (x, y, x2, y2) in module._tiles(width, height):
        count[y:y2, x:x2] += 1
        assert 0 <= left <= x < x2 <= right <= width and 0 <= top <= y < y2 <= bottom <= height
        assert right - left <= module._TILE and bottom - top <= module._TILE
        assert left == 0 or x - left == 24
    assert count.min() == count.max() == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: {"other.weight": torch.zeros(2, 2)}, "is no upscaler that is known; expected"),
        (
            lambda t: {k: v for k, v in t.items() if "conv_hr" not in k},
            "differs from a network of its kind at 'conv_hr.bias'",
        ),
        (
            lambda t: {"model.0.weight": torch.zeros(2), "model.1.sub.0.RDB1.conv1.0.weight": torch.zeros(2)},
            "is no upscaler that is known; expected",
        ),
        (lambda t: {**t, "extra.weight": torch.zeros(1)}, "at 'extra.weight'"),
        (lambda t: {**t, "conv_first.weight": torch.zeros(8, 5, 3, 3)}, "takes 5 channels"),
        (lambda t: {**t, "conv_first.weight": torch.zeros(8)}, "is no upscaler that is known"),
        (lambda t: {**t, "body.0.rdb1.conv2.weight": torch.zeros(4, 4, 3, 3)}, "at 'body.0.rdb1.conv2.weight'"),
    ],
)
def test_what_is_no_such_network_is_one_sentence(tmp_path, change, sentence):
    path = tmp_path / "x.safetensors"
    path.write_bytes(serialize_tensors(change(rrdb_tensors(**SMALL)), {}))
    with pytest.raises(FormatError) as caught:
        read_upscaler(path)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_nan_is_an_error(tmp_path):
    tensors = rrdb_tensors(**SMALL)
    tensors["conv_last.bias"] = torch.full((3,), float("nan"))
    path = tmp_path / "x.safetensors"
    path.write_bytes(serialize_tensors(tensors, {}))
    with pytest.raises(GenerationError, match="the upscaler gave NaN; its file may be damaged"):
        upscale(read_upscaler(path), picture(8, 8), CPU)

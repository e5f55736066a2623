"""Damaged and hostile adapter files: each is read right or refused with one sentence, soon and in little memory."""

import contextlib
import json
import os
import random
import resource
import struct
import time

import pytest
import torch
from adapter_kinds import random_layer
from safetensors.torch import save_file

from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.inspect import inspect_adapter
from sdlora.adapters.write import write_adapter
from sdlora.errors import FormatError

FILES = 2000
SECONDS, BYTES = 1.0, 200 << 20
Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
ODD_NUMBERS = (-1, 0, 1, 2**31, 2**63 - 1, 2**64, 10**30, 1.5, True, None, "8", [], {}, "NaN")
ODD_TEXTS = (
    "",
    "\x00",
    "ä" * 50,
    "\u202e\ud7ff",
    "lora_unet_",
    "." * 300,
    "__metadata__",
    "../../x",
    "unet.conv_in.lora_A.weight",
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Sound files of the formats, as (header, data) of JSON and bytes."""
    folder, found = tmp_path_factory.mktemp("sound"), []
    words = {"zorb": {"text_encoder": torch.ones(2, 8)}}
    for kind in ("lora", "dora", "loha", "lokr pairs", "tucker", "dense"):
        layers = {CONV: random_layer(kind, (8, 6, 3, 3))}
        for format in ("kohya", "diffusers") if kind in ("lora", "dora") else ("kohya",):
            path = folder / f"{kind}-{format}.safetensors"
            metadata = {"ss_output_name": "x", "ss_base_model_version": "sd_v1"}
            write_adapter(
                AdapterFile({**layers, Q: random_layer("lora", (8, 6))} if kind == "lora" else layers, "sd1", metadata),
                path,
                format,
            )
            found.append(path.read_bytes())
    write_adapter(
        AdapterFile({Q: random_layer("lora", (8, 6))}, "sd1", {}, words), folder / "w.safetensors", bundle=True
    )
    write_adapter(AdapterFile({}, "sd1", {}, words), folder / "e.safetensors")
    found += [(folder / "w.safetensors").read_bytes(), (folder / "e.safetensors").read_bytes()]
    return [split(data) for data in found]


def split(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def mutated(header: dict, data: bytes, draw: random.Random) -> bytes:
    header = json.loads(json.dumps(header))
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    entry = header[name]
    match draw.randrange(16):
        case 0:
            entry["shape"] = [draw.choice((-1, 0, 1, 3, 2**40)) for _ in range(draw.randrange(6))]
        case 1:
            entry["shape"] = draw.choice(ODD_NUMBERS)
        case 2:
            entry["data_offsets"] = [draw.choice(ODD_NUMBERS) for _ in range(draw.randrange(4))]
        case 3:
            entry["dtype"] = draw.choice(("F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "X", "", 3, None, []))
        case 4:  # two tensors in one place
            entry["data_offsets"] = header[draw.choice(names)]["data_offsets"]
        case 5:
            header[draw.choice(ODD_TEXTS)] = header.pop(name)
        case 6:
            header["__metadata__"] = draw.choice(
                ([], "x", 3, {"a": 3}, {"a": "x" * 100_000}, {"lora_adapter_metadata": "{"})
            )
        case 7:
            metadata = header.setdefault("__metadata__", {})
            key = draw.choice(
                ("ss_base_model_version", "sdlora_words", "lora_adapter_metadata", "sdlora_word", "ss_v2")
            )
            metadata[key] = draw.choice((*ODD_TEXTS, "[" * 50_000, '{"unet.lora_alpha": 1e400}', '{"a": "b"}'))
        case 8:
            del header[name]
        case 9:  # twice the same key
            raw = json.dumps(header).encode()
            return joined(raw[:-1] + b", " + json.dumps({name: entry}).encode()[1:], data)
        case 10:
            whole = joined(header, data)
            return whole[: draw.randrange(len(whole))]
        case 11:
            return joined(header, data) + os.urandom(draw.randrange(1, 64))
        case 12:
            whole = bytearray(joined(header, data))
            for _ in range(draw.choice((1, 4, 32))):
                whole[draw.randrange(len(whole))] = draw.randrange(256)
            return bytes(whole)
        case 13:  # another length in front
            return struct.pack("<Q", draw.choice((0, 1, 2**20, 2**40, 2**64 - 1))) + joined(header, data)[8:]
        case 14:
            return joined(
                draw.choice((b"{" * 5000, b"[]", b"{}", b"null", b'{"a":' * 3000, b"\xff\xfe", b" " * 3_000_000)), data
            )
        case 15:
            half = draw.choice([(b"\x00\x7c", 2), (b"\x00\x00\x80\x7f", 4), (b"\xff" * 4, 4)])[0]
            place = draw.randrange(max(1, len(data) - 4))
            return joined(header, data[:place] + half + data[place + len(half) :])
    return joined(header, data)


def test_mutated_files_are_read_right_or_refused(sound, tmp_path):
    draw, path = random.Random(6), tmp_path / "a.safetensors"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    read = refused = 0
    slowest = 0.0
    for _ in range(FILES):
        path.write_bytes(mutated(*draw.choice(sound), draw))
        started = time.process_time()
        try:
            adapter = read_adapter(path)
        except FormatError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 2000
        else:
            read += 1
            assert all(tensor.isfinite().all() for layer in adapter.layers.values() for tensor in layer.tensors())
        with contextlib.suppress(FormatError):
            inspect_adapter(path).to_json()
        slowest = max(slowest, time.process_time() - started)
    assert read > 100 and refused > 1000 and read + refused == FILES
    assert slowest < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < BYTES


def test_places_that_are_no_files_are_refused(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name in ("folder", "loop", "nowhere", "pipe", "missing"):
        for ask in (read_adapter, inspect_adapter):
            with pytest.raises(FormatError) as caught:
                ask(tmp_path / f"{name}.safetensors")
            assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)
    for name in ("x" * 5000, "x" * 5000 + ".pt", "a\0b"):
        with pytest.raises(FormatError, match="there is no such adapter file"):
            read_adapter(tmp_path / name)


def test_a_link_to_a_sound_file_is_read(sound, tmp_path):
    (tmp_path / "real").write_bytes(joined(*sound[0]))
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real")
    assert read_adapter(tmp_path / "link.safetensors").layers


def test_weights_beyond_any_models_and_headers_without_end_are_refused_soon(tmp_path):
    down, up = torch.zeros(1, 400_000), torch.zeros(400_000, 1)
    name = "lora_unet_mid_block_attentions_0_proj_in"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="expected one of Stable Diffusion's size"):
        read_adapter(tmp_path / "a.safetensors")
    many = {"x": {"dtype": "F32", "shape": [2**62] * 40_000, "data_offsets": [0, 4]}}
    (tmp_path / "b.safetensors").write_bytes(joined(many, b"1234"))
    started = time.process_time()
    with pytest.raises(FormatError, match="unknown type 'F32' or shape"):
        read_adapter(tmp_path / "b.safetensors")
    assert time.process_time() - started < SECONDS
    torch.save({"a": torch.ones(1).expand(10_000, 100_000_000)}, tmp_path / "c.pt")
    with pytest.raises(FormatError, match="without an embedding of one word"):
        read_adapter(tmp_path / "c.pt")

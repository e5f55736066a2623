import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from sdlora import storage
from sdlora.errors import FormatError, OutputError
from sdlora.storage import (
    atomic_path,
    cached_sha256,
    check_writable,
    read_header,
    read_tensors,
    remembered_sha256,
    serialize_tensors,
    sha256_of_file,
    sha256_of_tensor_data,
    write_bytes,
    write_json,
    write_text,
)

TENSORS = {
    "b.up": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.down": torch.arange(4, dtype=torch.float16).reshape(4, 1),
    "alpha": torch.tensor(3.0, dtype=torch.bfloat16),
    "none": torch.zeros(0, 5),
}


def with_header(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


# --- writing -----------------------------------------------------------------------------------------


def test_atomic_path_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new folder" / "file.json"
    write_text(path, "old")
    write_json(path, {"ä": [1, 2]})
    assert path.read_bytes() == '{\n  "ä": [\n    1,\n    2\n  ]\n}\n'.encode()
    assert [item.name for item in path.parent.iterdir()] == ["file.json"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_path_keeps_the_old_file_when_the_block_raises(tmp_path, error):
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file.bin"]


def test_atomic_path_keeps_the_suffix_and_stays_in_the_folder(tmp_path):
    with atomic_path(tmp_path / "a.png") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"


def test_a_name_of_the_greatest_length_can_be_written(tmp_path):
    path = tmp_path / ("n" * 251 + ".png")
    write_bytes(path, b"x")
    assert path.read_bytes() == b"x"


def test_a_folder_below_a_file_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "out.json"
    with pytest.raises(OutputError, match=r"out\.json: cannot be written \(.+\); choose another folder$") as caught:
        write_text(target, "x")
    assert "\n" not in str(caught.value)
    with pytest.raises(OutputError, match="cannot be used as output folder"):
        check_writable(tmp_path / "file" / "runs")


def test_a_folder_in_place_of_the_file_is_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "out.json").mkdir()
    with pytest.raises(OutputError, match=r"out\.json: cannot be written"):
        write_text(tmp_path / "out.json", "x")
    assert [item.name for item in tmp_path.iterdir()] == ["out.json"]


def test_check_writable_makes_the_folder_and_leaves_it_empty(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


# --- hashes ------------------------------------------------------------------------------------------


def test_hashes_of_the_file_and_of_the_data_behind_the_header(tmp_path):
    path = tmp_path / "a.safetensors"
    data = serialize_tensors(TENSORS, {"note": "x"})
    path.write_bytes(data)
    (length,) = struct.unpack("<Q", data[:8])
    assert sha256_of_file(path) == hashlib.sha256(data).hexdigest()
    assert sha256_of_tensor_data(path) == hashlib.sha256(data[8 + length :]).hexdigest()
    path.write_bytes(serialize_tensors(TENSORS, {"note": "quite another note"}))
    assert sha256_of_tensor_data(path) == hashlib.sha256(data[8 + length :]).hexdigest()


# --- safetensors -------------------------------------------------------------------------------------


def test_the_librarys_own_reader_agrees(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(serialize_tensors(TENSORS, {"z": "1", "a": "ü"}))
    ours, metadata = read_tensors(path)
    theirs = load_file(path)
    assert metadata == {"a": "ü", "z": "1"}
    assert set(ours) == set(theirs) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(ours[name], tensor)


def test_the_bytes_are_these():
    data = serialize_tensors({"w": torch.tensor([1.0, -2.0])}, {"b": "2", "a": "1"})
    header = b'{"__metadata__":{"a":"1","b":"2"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * (-len(header) % 8)
    assert data == struct.pack("<Q", len(header)) + header + struct.pack("<ff", 1.0, -2.0)


def test_same_bytes_in_processes_with_different_hash_seeds():
    code = (
        "import sys, torch; from sdlora.storage import serialize_tensors;"
        "t = {f'k{i}': torch.full((i,), float(i)) for i in range(20)};"
        "sys.stdout.buffer.write(serialize_tensors(t, {f'm{i}': str(i) for i in range(20)}))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_a_tensor_that_is_no_contiguous_block_is_written(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3).T
    (tmp_path / "a.safetensors").write_bytes(serialize_tensors({"w": tensor}, {}))
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")[0]["w"], tensor)


def test_one_tensor_under_two_names_is_written_twice(tmp_path):
    tensor = torch.ones(3, requires_grad=True)
    (tmp_path / "a.safetensors").write_bytes(serialize_tensors({"v": tensor, "w": tensor}, {}))
    read, _ = read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(read["v"], tensor)
    assert torch.equal(read["w"], tensor)


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_header_lengths_that_look_like_a_pickle_are_read(tmp_path, length):
    # 640 is 80 02 in little endian, which is also how a pickle of protocol 2 begins.
    path = tmp_path / "a.safetensors"
    missing = length - len(serialize_tensors({"w": torch.ones(1)}, {"m": ""})) + 8 + 4
    data = serialize_tensors({"w": torch.ones(1)}, {"m": "x" * missing})
    assert data[:2] == struct.pack("<H", length)
    path.write_bytes(data)
    assert list(read_header(path).tensors) == ["w"]


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FOREIGN = {
    "empty": (b"", "is empty"),
    "tiny": (b"{}", "is only 2 bytes"),
    "web page": (b"\n <!DOCTYPE html><html>Sign in</html>", "is a web page"),
    "pickle": (b"\x80\x02}q\x00X\x03\x00\x00\x00abcq\x01K\x01s.", "is a pickle or zip archive"),
    "pickle protocol 4": (b"\x80\x04\x95\x11\x00\x00\x00\x00\x00\x00\x00}.", "is a pickle or zip archive"),
    "zip": (b"PK\x03\x04\x00\x00\x08\x08\x00\x00archive/data.pkl", "is a pickle or zip archive"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a safetensors file"),
    "huge header": (struct.pack("<Q", 1 << 40) + bytes(100), "header should be 1099511627776 bytes"),
    "no JSON": (with_header(b"{hello}"), "header does not parse"),
    "a list": (with_header([1, 2]), "header does not parse"),
    "deep": (with_header(b"[" * 50_000), "header does not parse"),
    "number": (with_header(b'{"w":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}'), "does not parse"),
    "metadata no text": (with_header({"__metadata__": {"a": 1}}), "header does not parse"),
    "offsets missing": (with_header({"w": {"dtype": "F32", "shape": [2]}}), "header does not parse"),
    "three offsets": (with_header({"w": {**ENTRY, "data_offsets": [0, 4, 8]}}), "header does not parse"),
    "truncated": (with_header({"w": ENTRY}, bytes(7)), "is truncated or damaged"),
    "too long": (with_header({"w": ENTRY}, bytes(9)), "is truncated or damaged"),
    "overlap": (with_header({"v": ENTRY, "w": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)), "does not lie"),
    "gap": (with_header({"w": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16)), "does not lie"),
    "size": (with_header({"w": {**ENTRY, "shape": [3]}}, bytes(8)), "does not lie"),
    "negative": (with_header({"w": {**ENTRY, "shape": [-1, -2]}}, bytes(8)), "unknown type"),
    "type": (with_header({"w": {**ENTRY, "dtype": "F33"}}, bytes(8)), "unknown type 'F33'"),
    "type list": (with_header({"w": {**ENTRY, "dtype": ["F32"]}}, bytes(8)), "unknown type"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_sound_safetensors_file_is_refused_in_one_sentence(tmp_path, name):
    data, expected = FOREIGN[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    for read in (read_header, read_tensors):
        with pytest.raises(FormatError, match=expected) as caught:
            read(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)


def test_a_folder_a_missing_file_and_a_pipe_are_refused(tmp_path):
    with pytest.raises(FormatError, match="is a folder"):
        read_header(tmp_path)
    with pytest.raises(FormatError, match="cannot be read"):
        read_header(tmp_path / "missing.safetensors")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not an ordinary file"):
        read_header(tmp_path / "pipe")


def test_headers_that_only_the_librarys_reader_refuses(tmp_path):
    path = tmp_path / "a.safetensors"
    # JSON's numbers may be 2.0, the library's may not; JSON may be UTF-16, the library's may not.
    for header in (
        b'{"w":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}',
        json.dumps({"w": ENTRY}).encode("utf-16"),
        b'{"__metadata__":[],"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ):
        path.write_bytes(with_header(header, bytes(8)))
        with pytest.raises(FormatError):
            read_tensors(path)


def test_random_damage_is_refused_or_harmless(tmp_path):
    draw = random.Random(7)
    path = tmp_path / "a.safetensors"
    sound = save(TENSORS, {"note": "x"})
    header_end = 8 + struct.unpack("<Q", sound[:8])[0]
    refused = 0
    for _ in range(1500):
        data = bytearray(sound)
        if draw.random() < 0.25:
            del data[draw.randrange(len(data)) :]
        for _ in range(draw.choice((0, 1, 1, 2, 5))):
            if data:
                data[draw.randrange(min(header_end, len(data)))] = draw.choice(b'0123456789[]{}",:eE.-+\x00\xff ')
        path.write_bytes(data)
        try:
            tensors, _ = read_tensors(path)
        except FormatError as error:
            refused += 1
            assert str(error).startswith(str(path))
        else:
            assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    assert 500 < refused < 1500


def test_paths_are_never_followed_out_of_the_header(tmp_path):
    """Names in a file are only names: they may look like paths and still touch nothing."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(serialize_tensors({"../../evil": torch.ones(1)}, {}))
    assert list(read_tensors(path)[0]) == ["../../evil"]
    assert sorted(Path(tmp_path).iterdir()) == [path]


def test_a_large_files_hash_is_remembered_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "_REMEMBERED_FROM_BYTES", 4)
    path, small = tmp_path / "a.bin", tmp_path / "b.bin"
    path.write_bytes(b"large")
    small.write_bytes(b"abc")
    assert remembered_sha256(path) == ""
    digest = cached_sha256(path)
    assert digest == remembered_sha256(path) == hashlib.sha256(b"large").hexdigest()
    cached_sha256(small)
    assert remembered_sha256(small) == ""
    with monkeypatch.context() as context:
        context.setattr(storage, "sha256_of_file", lambda path: pytest.fail("hashed again"))
        assert cached_sha256(path) == digest
    path.write_bytes(b"other")
    os.utime(path, ns=(1, 1))
    assert cached_sha256(path) == hashlib.sha256(b"other").hexdigest()
    path.unlink()
    small.write_bytes(b"abcdef")
    cached_sha256(small)
    entries = json.loads((tmp_path / "cache" / "hashes.json").read_text())
    assert list(entries) == [str(small)]  # what is gone is forgotten


@pytest.mark.parametrize("text", ["", "[]", "null", '{"x": 3}', "{" * 100_000])
def test_a_broken_memory_of_hashes_is_no_obstacle(tmp_path, monkeypatch, text):
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(storage, "_REMEMBERED_FROM_BYTES", 1)
    (tmp_path / "hashes.json").write_text(text)
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    assert cached_sha256(path) == hashlib.sha256(b"abc").hexdigest() == remembered_sha256(path)


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(storage, "_REMEMBERED_FROM_BYTES", 1)
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    assert cached_sha256(path) == hashlib.sha256(b"abc").hexdigest()

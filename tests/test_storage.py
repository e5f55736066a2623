import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from header_bytes import with_header
from safetensors.torch import load_file, save

from sdlora import storage
from sdlora.errors import FormatError, OutputError
from sdlora.headers import read_header
from sdlora.storage import (
    atomic_folder,
    atomic_path,
    cached_sha256,
    check_writable,
    hashes_of_file,
    read_tensors,
    remembered_sha256,
    rewrite_metadata,
    serialize_tensors,
    sha256_of_file,
    sha256_of_tensor_data,
    sha256_while_unchanged,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)

TENSORS = {
    "b.up": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.down": torch.arange(4, dtype=torch.float16).reshape(4, 1),
    "alpha": torch.tensor(3.0, dtype=torch.bfloat16),
    "none": torch.zeros(0, 5),
}


# --- writing -----------------------------------------------------------------------------------------


def test_an_unchanged_file_is_hashed_once(tmp_path, monkeypatch):
    read = []
    real = storage.sha256_of_file
    monkeypatch.setattr(storage, "sha256_of_file", lambda path: read.append(path) or real(path))
    file = tmp_path / "a.png"
    file.write_bytes(b"one")
    for _ in range(3):
        assert sha256_while_unchanged(file) == hashlib.sha256(b"one").hexdigest()
    assert read == [file]
    file.write_bytes(b"two")
    os.utime(file, (1, 1))
    assert sha256_while_unchanged(file) == hashlib.sha256(b"two").hexdigest()


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


def test_a_link_to_a_folder_stays_and_what_it_leads_to_is_replaced(tmp_path):
    real, link = tmp_path / "elsewhere" / "real", tmp_path / "here" / "link"
    real.mkdir(parents=True)
    (real / "old").write_text("old")
    link.parent.mkdir()
    link.symlink_to(real)
    with atomic_folder(link) as temporary:
        (temporary / "new").write_text("new")
    assert link.is_symlink() and [item.name for item in real.iterdir()] == ["new"]
    assert [item.name for item in real.parent.iterdir()] == ["real"]
    assert [item.name for item in link.parent.iterdir()] == ["link"]


def test_a_folder_takes_the_place_of_a_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with atomic_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a").is_dir() and [item.name for item in tmp_path.iterdir()] == ["a"]


def test_a_loop_of_links_in_place_of_the_folder_is_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match="loop: cannot be written"), atomic_folder(tmp_path / "loop"):
        pass
    assert [item.name for item in tmp_path.iterdir()] == ["loop"]


def test_a_folder_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    done, path = [], tmp_path / "folder"
    path.mkdir()

    sync, move, remove = os.fsync, Path.replace, shutil.rmtree

    def fsync(handle):
        done.append(os.fstat(handle).st_ino)
        sync(handle)

    def replace(self, target):
        done.append("moved")
        return move(self, target)

    def rmtree(folder, **how):
        done.append("removed")
        remove(folder, **how)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with atomic_folder(path) as temporary:
        (temporary / "a" / "b").mkdir(parents=True)
        (temporary / "a" / "b" / "c").write_text("new")
        below = {item.stat().st_ino for item in (temporary, *temporary.rglob("*"))}
    assert len(below) == 4 and below == set(done[: done.index("moved")])
    assert done[-5:-1] == ["moved", "moved", tmp_path.stat().st_ino, "removed"]  # the names, before the old folder goes
    assert (path / "a" / "b" / "c").read_text() == "new"


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


@pytest.mark.parametrize("size", [20, 1 << 20, (1 << 20) + 5, (1 << 20) + (1 << 16) + 5, (3 << 20) + 7])
@pytest.mark.parametrize("offset", [0, 13, (1 << 20) + 3])
def test_all_hashes_of_a_file_are_told_by_one_reading(tmp_path, size, offset):
    data = random.Random(size).randbytes(size)
    (tmp_path / "a").write_bytes(data)
    found = hashes_of_file(tmp_path / "a", offset)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.data_sha256 == hashlib.sha256(data[offset:]).hexdigest()
    old = data[0x100000:0x110000]  # as AUTOMATIC1111 has it
    assert found.autov1 == (hashlib.sha256(old).hexdigest()[:8] if old else "")


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


def test_other_text_before_the_same_tensors_is_the_file_written_with_that_text(tmp_path):
    source, target = tmp_path / "a.safetensors", tmp_path / "new" / "b.safetensors"
    write_bytes(source, serialize_tensors(TENSORS, {"old": "text", "ss_note": "ä"}))
    rewrite_metadata(source, target, {"z": "1", "a": "ü"})
    assert target.read_bytes() == serialize_tensors(TENSORS, {"z": "1", "a": "ü"})
    assert sha256_of_tensor_data(target) == sha256_of_tensor_data(source)
    rewrite_metadata(source, source, {})  # in place
    assert source.read_bytes() == serialize_tensors(TENSORS, {})
    assert [item.name for item in source.parent.iterdir() if item.is_file()] == ["a.safetensors"]


def test_the_order_of_a_foreign_files_data_stays_whatever_its_header_says(tmp_path):
    data = bytes(range(12))
    header = {
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [8, 12], "odd": 1},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    (tmp_path / "a").write_bytes(with_header(header, data))
    rewrite_metadata(tmp_path / "a", tmp_path / "b", {"k": "v"}, {"a": "c"})
    found = (tmp_path / "b").read_bytes()
    (length,) = struct.unpack("<Q", found[:8])
    assert length % 8 == 0 and found[8 + length :] == data
    assert found[8 : 8 + length].rstrip(b" ") == (
        b'{"__metadata__":{"k":"v"},"c":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"U8","shape":[4],"data_offsets":[8,12]}}'
    )


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"alpha": "none"}, "a tensor cannot be called 'none', which is taken"),
        ({"alpha": "x", "none": "x"}, "cannot be called 'x'"),
        ({"alpha": "__metadata__"}, "cannot be called '__metadata__'"),
        ({"beta": "x"}, "holds no tensor 'beta'"),
        ({"alpha": "\ud800"}, "holds half a character"),
    ],
)
def test_names_that_tensors_cannot_have_leave_the_target_as_it_was(tmp_path, keys, sentence):
    write_bytes(tmp_path / "a", serialize_tensors(TENSORS, {}))
    (tmp_path / "b").write_text("old")
    with pytest.raises(FormatError, match=sentence):
        rewrite_metadata(tmp_path / "a", tmp_path / "b", {}, keys)
    assert (tmp_path / "b").read_text() == "old"
    rewrite_metadata(tmp_path / "a", tmp_path / "b", {}, {"alpha": "none", "none": "alpha"})  # change places
    assert read_tensors(tmp_path / "b")[0]["none"].item() == 3.0


@pytest.mark.parametrize(
    ("name", "metadata"), [("\ud800", {}), ("w", {"k": "\udfff"}), ("w", {"\ud800": "v"})], ids=["name", "text", "key"]
)
def test_half_a_character_is_refused_by_all_that_write(tmp_path, name, metadata):
    sentence = "^its header holds half a character, which cannot be written; remove it$"
    with pytest.raises(FormatError, match=sentence):
        serialize_tensors({name: torch.ones(1)}, metadata)
    with pytest.raises(FormatError, match=sentence):
        write_tensors(tmp_path / "a", {name: ("F32", (1,))}, lambda name: bytes(4), metadata)
    assert list(tmp_path.iterdir()) == []


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


# --- the header alone


def test_new_text_leaves_the_tensors_as_they_are(tmp_path):
    source, target = tmp_path / "a.safetensors", tmp_path / "new" / "b.safetensors"
    source.write_bytes(serialize_tensors(TENSORS, {"old": "1", "kept": "2"}))
    rewrite_metadata(source, target, {"zorb": "ü", "kept": "2"})
    assert target.read_bytes() == serialize_tensors(TENSORS, {"kept": "2", "zorb": "ü"})
    assert sha256_of_tensor_data(target) == sha256_of_tensor_data(source)
    rewrite_metadata(target, target, {})
    assert target.read_bytes() == serialize_tensors(TENSORS, {})
    assert len(list(target.parent.iterdir())) == 1


def test_the_order_of_tensors_in_other_programs_files_stays(tmp_path):
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}
    source = tmp_path / "a.safetensors"
    source.write_bytes(with_header({"a": entry, "b": entry | {"data_offsets": [0, 1]}}, b"xy"))
    rewrite_metadata(source, source, {"k": "v"})
    assert source.read_bytes()[-2:] == b"xy" and read_header(source).data_offset % 8 == 0
    assert load_file(source)["a"].tolist() == [ord("y")] and list(read_header(source).tensors) == ["b", "a"]


def test_new_text_of_a_damaged_file_is_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(serialize_tensors(TENSORS, {})[:-1])
    with pytest.raises(FormatError, match="truncated or damaged"):
        rewrite_metadata(tmp_path / "a.safetensors", tmp_path / "b.safetensors", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_header_larger_than_readers_take_is_refused(tmp_path, monkeypatch):
    source = tmp_path / "a.safetensors"
    source.write_bytes(serialize_tensors(TENSORS, {}))
    monkeypatch.setattr(storage, "HEADER_LIMIT_BYTES", 1000)
    with pytest.raises(OutputError, match="more than readers take"):
        rewrite_metadata(source, source, {"k": "v" * 1000})
    assert source.read_bytes() == serialize_tensors(TENSORS, {})

"""Headers of safetensors files: what is refused, and what is read once for many files."""

import json
import os
import struct

import pytest
import torch
from header_bytes import with_header

from sdlora.errors import FormatError
from sdlora.headers import TensorEntry, read_header
from sdlora.storage import read_tensors, serialize_tensors


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


def test_files_that_list_the_same_tensors_share_their_layout(tmp_path):
    """Whatever their other text, and however it pads the header."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(9)]
    for number, path in enumerate(paths):
        path.write_bytes(serialize_tensors({"w": torch.ones(2), "v": torch.ones(1, 3)}, {"note": "x" * number}))
    found = [read_header(path) for path in paths]
    assert len({id(header.layout) for header in found}) == 1
    assert [len(header.metadata["note"]) for header in found] == list(range(9))
    assert dict(found[0].layout.shapes) == {"v": (1, 3), "w": (2,)}
    (tmp_path / "other.safetensors").write_bytes(serialize_tensors({"w": torch.ones(3)}, {"note": ""}))
    assert dict(read_header(tmp_path / "other.safetensors").layout.shapes) == {"w": (3,)}


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__":{"a":"1"},"w":%s,"v":%s}',
        b'  { "__metadata__" :\n {"a":"1"} , "w":%s,"v":%s}  ',
        b'{"w":%s,"__metadata__":{"a":"1"},"v":%s}',
        b'{"w":%s,"v":%s,"__metadata__":{"a":"1"}}',
        b'{"__metadata__":{"a":"0"},"w":%s,"v":%s,"__metadata__":{"a":"1"}}',  # as JSON has it, the last one counts
    ],
)
def test_metadata_may_stand_anywhere_and_tensors_in_any_order(tmp_path, header):
    later = b'{"dtype":"F16","shape":[2,1],"data_offsets":[8,12]}'
    (tmp_path / "a.safetensors").write_bytes(with_header(header % (later, json.dumps(ENTRY).encode()), bytes(12)))
    found = read_header(tmp_path / "a.safetensors")
    assert found.metadata == {"a": "1"}
    assert found.tensors == {"v": TensorEntry("F32", (2,), 0, 8), "w": TensorEntry("F16", (2, 1), 8, 12)}
    assert list(found.tensors) == ["v", "w"]


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__":{"a":"1"},}',
        b'{"__metadata__":{"a":"1"} "w":%s}',
        b'{"__metadata__":{"a":"1"}}}',
        b'{"__metadata__":{"a":"1"},,"w":%s}',
        b'{"__metadata__":{"a":1.5},"w":%s}',
        b'{"__metadata__":"text","w":%s}',
        b'{"__metadata__":{"a":"1"',
        b'{"__metadata__":',
    ],
)
def test_a_header_that_is_no_json_behind_its_metadata_is_refused(tmp_path, header):
    header = header.replace(b"%s", json.dumps(ENTRY).encode())
    (tmp_path / "a.safetensors").write_bytes(with_header(header, bytes(8 if b'"w"' in header else 0)))
    with pytest.raises(FormatError, match="header does not parse"):
        read_header(tmp_path / "a.safetensors")

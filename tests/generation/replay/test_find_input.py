"""What a picture was made from, found again whatever the recipe calls it."""

import pytest

from sdlora.errors import DataError
from sdlora.families.controls import control_sha256
from sdlora.generation.replay import find_input
from sdlora.generation.replay.find_input import input_finder
from sdlora.storage import sha256_of_file


def test_a_file_is_found_by_its_hash_whatever_it_is_called(tmp_path):
    (tmp_path / "other.png").write_bytes(b"picture")
    digest = sha256_of_file(tmp_path / "other.png")
    for name in ("start.png", "x" * 5000, "a\0b", "..", ""):
        assert input_finder([tmp_path])(name, digest) == tmp_path / "other.png"


def test_what_is_not_there_is_told_in_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"made from start\.png .* which is not in"):
        input_finder([tmp_path])("start.png", "00" * 32)
    with pytest.raises(DataError, match="gone: there is no such folder"):
        input_finder([tmp_path, tmp_path / "gone"])("start.png", "00" * 32)


def test_a_controlnet_is_a_file_a_folder_or_in_the_cache(tmp_path, monkeypatch):
    for name in ("given/net", "cache/net"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    digests = [control_sha256(tmp_path / name) for name in ("given/net", "cache/net")]
    find = input_finder([tmp_path / "given"])
    assert find("once-called-so", digests[0]) == tmp_path / "given" / "net"
    monkeypatch.setattr(find_input, "find_cached_control", lambda name: tmp_path / "cache" / "net")
    assert find("someone/net", digests[1]) == tmp_path / "cache" / "net"
    assert find("someone/net", digests[0]) == tmp_path / "given" / "net"

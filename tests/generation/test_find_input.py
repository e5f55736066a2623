"""What a picture was made from, found again whatever the recipe calls it."""

import pytest

from sdlora.errors import DataError
from sdlora.generation.find_input import input_finder
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

"""What words' files are called."""

import json

import pytest

from sdlora.adapters.formats.embedding_keys import WORDS, file_name, file_names, named_words
from sdlora.errors import FormatError


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("zorb two", "zorb two.safetensors"),
        ("con", "_con-"),
        ("NUL", "_NUL-"),
        ("aux.x", "_aux.x-"),
        ("a/b", "a_b-"),
        ("\ud800", "_-"),
        ("console", "console.safetensors"),
    ],
)
def test_a_words_file_is_called_after_it_where_every_system_takes_that(word, name):
    assert file_name(word).startswith(name) and file_name(word).endswith(".safetensors")
    assert file_names(word)[0] == file_name(word)
    file_name(word).encode()


def test_devices_files_of_linux_are_found_still():
    assert file_names("con")[1:] == ("con.safetensors",) and file_names("aux.x")[1:] == ("aux.x.safetensors",)
    for word in ("zorb", "con/x", "con" + "x" * 100, "con.", " nul"):
        assert len(file_names(word)) == 1


def test_words_that_no_file_can_be_called_are_refused():
    assert named_words({WORDS: json.dumps({"猫": "x"})}) == {"猫": "x"}
    with pytest.raises(FormatError, match="does not name words"):
        named_words({WORDS: json.dumps({"\ud800": "x"})})

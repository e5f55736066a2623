"""What is told from the text of headers that strangers wrote."""

import json

import pytest

from sdlora.adapters.header_text import (
    as_hash,
    base_of,
    named_triggers,
    plain,
    tags_of,
    title_of,
    trigger_of,
    triggers_of,
)


@pytest.mark.parametrize(
    ("metadata", "trigger"),
    [
        ({}, ""),
        ({"modelspec.trigger_phrase": " sks \n cat "}, "sks cat"),
        ({"ss_tag_frequency": '{"10_cat": {"cat": 3, "sks": 12}}'}, "sks"),
        ({"ss_tag_frequency": "{}"}, ""),
        ({"ss_tag_frequency": "not json"}, ""),
        ({"ss_tag_frequency": "[1, 2]"}, ""),
        ({"ss_tag_frequency": '{"a": {"b": "many"}}'}, ""),
        ({"ss_tag_frequency": "[" * 100_000}, ""),
    ],
)
def test_trigger(metadata, trigger):
    assert trigger_of(metadata) == trigger


def test_the_phrase_counts_before_the_tags_and_each_word_of_it_is_a_trigger():
    metadata = {"modelspec.trigger_phrase": "zorb, sks  cat,,zorb", "ss_tag_frequency": '{"a": {"dog": 9}}'}
    assert triggers_of(metadata) == ["zorb", "sks cat"]
    assert triggers_of({"ss_tag_frequency": '{"a": {"dog": 9}}'}) == ["dog"]
    assert trigger_of({"modelspec.trigger_phrase": " \n", "ss_tag_frequency": '{"a": {"dog": 9}}'}) == "dog"
    assert triggers_of({}) == []
    assert trigger_of(metadata) == "zorb, sks cat"
    assert named_triggers(metadata) == ["zorb", "sks cat"]
    assert named_triggers({"ss_tag_frequency": '{"a": {"dog": 9}}'}) == []  # a tag may be a caption
    assert len(named_triggers({"modelspec.trigger_phrase": ",".join(map(str, range(10**6)))})) == 100


def test_tags_are_counted_over_all_folders_the_commonest_first():
    text = json.dumps(
        {"1_a": {"cat": 3, " cat": 2, "dog": 4}, "2_b": {"dog": 4, "": 9, "x": -1, "y": 1.5, "z": 10**30}}
    )
    assert list(tags_of({"ss_tag_frequency": text}).items()) == [("dog", 8), ("cat", 5)]
    many = json.dumps({"a": {f"{number} " + "x" * 5000: number + 1 for number in range(3000)}})
    found = tags_of({"ss_tag_frequency": many})
    assert len(found) == 500 and all(len(tag) <= 100 for tag in found) and next(iter(found)).startswith("2999 x")


@pytest.mark.parametrize("text", ["", "x", "[]", "3", '{"a": 3}', '{"a": ["b"]}', "[" * 100_000, '{"a": {"b": "3"}}'])
def test_odd_tags_are_none(text):
    assert tags_of({"ss_tag_frequency": text}) == {}


def test_texts_are_one_line_of_printable_characters():
    assert plain("a\n b\x1b[31mred\x00\u202e\ud800 " + "c" * 500) == ("a b [31mred " + "c" * 500)[:200]
    assert plain("x" * 10_000_000) == "x" * 200
    assert title_of({"modelspec.title": "one", "ss_output_name": " two\t"}) == "two"


def test_the_base_is_a_name_without_folders_and_a_hash():
    metadata = {"ss_sd_model_name": "C:\\Users\\me\\sd15.safetensors", "ss_sd_model_hash": "ABCDEF12"}
    assert base_of(metadata) == ("sd15.safetensors", "abcdef12")
    assert base_of({"ss_sd_model_name": "/home/me/sd15", "ss_new_sd_model_hash": "no hash"}) == ("sd15", "")
    assert (as_hash(" 0aF "), as_hash("0x12"), as_hash("a" * 5000)) == ("0af", "", "")

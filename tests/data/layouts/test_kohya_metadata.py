"""Fine-tune metadata: how entries find their pictures, and what their captions and sizes become."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdlora.config import CaptionsSection, ConceptSection
from sdlora.data.layouts import kohya_config, kohya_metadata
from sdlora.data.layouts.listing import Listing
from sdlora.errors import DataError


def write(folder: Path, entries: object, *pictures: str, name: str = "meta.json") -> Path:
    for picture in pictures:
        (folder / picture).parent.mkdir(parents=True, exist_ok=True)
        (folder / picture).touch()
    file = folder / name
    file.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    return file


def read(file: Path, **settings) -> tuple[Listing, list[str]]:
    problems: list[str] = []
    return kohya_metadata.read(ConceptSection(folder=str(file), **settings), problems), problems


def lines_of(file: Path, **settings) -> dict[str, tuple[str, ...] | None]:
    listing, problems = read(file, **settings)
    assert problems == []
    return {picture.path.name: picture.lines for picture in listing.groups[0].pictures}


def test_a_file_is_one_concept_in_its_own_order(tmp_path):
    other = tmp_path / "elsewhere" / "c.webp"
    file = write(
        tmp_path / "set",
        {"b.png": {"caption": "b"}, "sub/a": {"caption": "a"}, str(other): {"caption": "c"}},
        "b.png",
        "sub/a.jpg",
        str(other),
    )
    listing, problems = read(file, repeats=3)
    assert (problems, listing.title, listing.notes) == ([], "kohya metadata", [])
    (group,) = listing.groups
    assert [picture.path for picture in group.pictures] == [file.parent / "b.png", file.parent / "sub/a.jpg", other]
    assert (group.settings.repeats, group.settings.folder, group.prior) == (3, str(tmp_path / "set"), False)


def test_names_without_suffix_take_the_first_picture_and_may_hold_dots(tmp_path):
    file = write(tmp_path, {"a": {}, "b.v2": {}}, "a.png", "a.jpg", "a.npz", "a-masklabel.png", "b.v2.png", "b.png")
    listing, problems = read(file)
    assert problems == []
    assert [picture.path.name for picture in listing.groups[0].pictures] == ["a.jpg", "b.v2.png"]


def test_tags_follow_the_caption_as_kohya_joins_them(tmp_path):
    entries = {
        "a": {"caption": "a cat", "tags": "fur, sofa"},
        "b": {"caption": "a cat"},
        "c": {"tags": "fur, sofa"},
        "d": {},
        "e": {"caption": ""},
        "f": {"caption": "", "tags": "fur"},
        "g": {"caption": "one\n\n two ", "tags": "fur\nsofa"},
        "h": {"caption": None, "tags": None},
        "i": {"tags": "fur\nsofa"},
    }
    file = write(tmp_path, entries, *(f"{name}.png" for name in entries))
    assert lines_of(file) == {
        "a.png": ("a cat,fur, sofa",),
        "b.png": ("a cat",),
        "c.png": ("fur, sofa",),
        "d.png": None,
        "e.png": ("",),
        "f.png": ("fur",),
        "g.png": ("one,fur,sofa", "two,fur,sofa"),
        "h.png": None,
        "i.png": ("fur", "sofa"),
    }


def test_the_separator_of_the_settings_joins(tmp_path):
    file = write(tmp_path, {"a": {"caption": "a cat", "tags": "fur"}}, "a.png")
    assert lines_of(file, captions=CaptionsSection(separator=". "))["a.png"] == ("a cat. fur",)


def test_train_resolution_is_the_size_of_training(tmp_path):
    file = write(tmp_path, {"a": {"train_resolution": [448, 576]}, "b": {"caption": "b"}}, "a.png", "b.png")
    listing, problems = read(file)
    assert problems == []
    assert [picture.train_size for picture in listing.groups[0].pictures] == [(448, 576), None]
    assert listing.notes == [f"{file}: train_resolution gives the size at which 1 of 2 pictures are trained"]


@pytest.mark.parametrize("value", [[448, 577], [448], [448, 0], [-8, 8], [448.0, 576.0], "448x576", [True, 8], 448])
def test_a_wrong_train_resolution_is_a_fault(tmp_path, value):
    file = write(tmp_path, {"a": {"caption": "a", "train_resolution": value}}, "a.png")
    listing, problems = read(file)
    assert listing.groups[0].pictures[0].train_size is None
    assert problems == [
        f'{file}: entry "a": train_resolution is {json.dumps(value)}; expected [width, height], both multiples of 8'
    ]


def test_each_missing_picture_and_wrong_entry_is_a_fault(tmp_path):
    entries = {"a": {"caption": "a"}, "gone": {}, "": {}, "x" * 5000: {}, "b": "text", "c": {"tags": ["fur"]}}
    file = write(tmp_path, entries, "a.png", "b.png", "c.png", "gone.npz")
    listing, problems = read(file)
    assert [picture.path.name for picture in listing.groups[0].pictures] == ["a.png", "c.png"]
    assert problems == [
        f'{file}: entry "b" is not an object with "caption" or "tags"; correct or remove it',
        f'{file}: entry "c": tags is ["fur"]; expected a text in quotes',
        f'{file}: entry "gone" has no picture in {tmp_path}; restore it or remove the entry',
        f'{file}: entry "" has no picture in {tmp_path}; restore it or remove the entry',
        f'{file}: entry "{"x" * 5000}" has no picture in {tmp_path}; restore it or remove the entry',
    ]


def test_where_all_pictures_are_missing_it_is_said_once(tmp_path):
    file = write(tmp_path, {"/old/place/a.png": {"caption": "a"}, "b": {}})
    with pytest.raises(DataError) as caught:
        read(file)
    assert str(caught.value) == (
        f'{file}: none of its 2 pictures is found, such as "/old/place/a.png" in {tmp_path}; '
        "put the file beside its pictures, or correct its paths"
    )


def test_what_caches_leave_is_passed_over_and_the_unknown_is_named_once(tmp_path):
    entry = {"caption": "a", "image_size": [9, 9], "latents": "a.npz", "captoin": "x"}
    file = write(tmp_path, {"a": entry, "b": entry}, "a.png", "b.png", "a.npz", "a_0512x0512_sd.npz")
    listing, problems = read(file)
    assert problems == []
    assert listing.notes == [f'{file}: "captoin" is not used (first in entry "a")']
    assert [picture.path.name for picture in listing.groups[0].pictures] == ["a.png", "b.png"]


def test_json_lines_name_the_picture_as_image_path(tmp_path):
    rows = [{"image_path": "a.png", "caption": "a", "tags": "t", "image_size": [8, 8]}, {"image_path": "b.png"}]
    file = write(tmp_path, "\n".join(map(json.dumps, rows)) + "\n\n", "a.png", "b.png", name="meta.jsonl")
    assert kohya_metadata.recognises(file)
    assert lines_of(file) == {"a.png": ("a,t",), "b.png": None}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("meta.json", "{", "is not valid JSON (Expecting property name"),
        ("meta.json", "[" * 100_000, "is not valid JSON ("),
        ("meta.json", "[]", "has no entries; expected"),
        ("meta.json", "{}", "has no entries; expected"),
        ("meta.json", "\udcff", "is not valid JSON ('utf-8' codec can't decode"),
        ("meta.jsonl", '{"file_name": "a.png"}', 'holds lines that are not objects with "image_path"'),
        ("meta.jsonl", "[1]", 'holds lines that are not objects with "image_path"'),
        ("meta.jsonl", "7", 'holds lines that are not objects with "image_path"'),
    ],
)
def test_a_file_that_is_none_is_an_error(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError) as caught:
        read(file)
    assert str(caught.value).startswith(f"{file}: {message}")


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        read(tmp_path / "none.json")


def test_a_byte_order_mark_is_passed_over(tmp_path):
    file = tmp_path / "meta.json"
    file.write_text('\ufeff{"a": {"caption": "a"}}', encoding="utf-8")
    (tmp_path / "a.png").touch()
    assert kohya_metadata.recognises(file)
    assert lines_of(file) == {"a.png": ("a",)}


@pytest.mark.parametrize(
    ("name", "text", "metadata", "config"),
    [
        ("a.json", '{"a \\" b.png": {"caption": "x"}}', True, False),
        ("a.json", '{"a": {"train_resolution": [512, 512]}}', True, False),
        ("a.json", '{"general": {"caption": "a picture of that name"}}', True, False),
        ("a.json", '{"general": {"caption_extension": ".txt"}, "datasets": []}', False, True),
        ("a.json", ' {"datasets": [{"subsets": []}], "general": {}}', False, True),
        ("a.json", '{"name": "package", "tags": []}', False, False),
        ("a.json", '{"a": {"b": 1}}', False, False),
        ("a.json", '[{"caption": "x"}]', False, False),
        ("a.json", "", False, False),
        ("a.jsonl", '{"caption": "x", "image_path": "a.png"}', True, False),
        ("a.jsonl", '{"file_name": "a.png", "text": "x"}', False, False),
        ("a.toml", "[general]\nflip_aug = true\n", False, True),
        ("a.toml", "# mine\n\n[[datasets]]\nresolution = 512\n", False, True),
        ("a.toml", "[[datasets]\nresolution = \n", False, True),
        ("a.toml", "datasets = [{resolution = 512}]", False, True),
        ("a.toml", '[data]\nfolder = "general"\n', False, False),
        ("a.txt", '{"a": {"caption": "x"}}\n[[datasets]]', False, False),
    ],
)
def test_files_are_recognised_by_how_they_begin(tmp_path, name, text, metadata, config):
    file = tmp_path / name
    file.write_text(text)
    assert (kohya_metadata.recognises(file), kohya_config.recognises(file)) == (metadata, config)


def test_folders_and_missing_files_are_not_recognised(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path, tmp_path / "folder.json", tmp_path / "none.json", tmp_path / "none.toml"):
        assert not kohya_metadata.recognises(path)
        assert not kohya_config.recognises(path)

"""Folders named "10_token class", their parent, and a project with img/ and reg/."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlora.config import CaptionsSection, ConceptSection, MasksSection
from sdlora.data.layouts import kohya_folders
from sdlora.data.layouts.listing import Group, Listing
from sdlora.errors import DataError


def put(root: Path, *names: str) -> Path:
    """Write a file of each name; a caption file holds its own stem."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"caption of {file.stem}" if file.suffix in {".txt", ".caption"} else "")
    return root


def read(folder: Path, **settings) -> tuple[Listing, list[str]]:
    problems: list[str] = []
    return kohya_folders.read(ConceptSection(folder=str(folder), **settings), problems), problems


def named(group: Group) -> list[tuple[str, tuple[str, ...] | None]]:
    return [(picture.path.name, picture.lines) for picture in group.pictures]


def test_a_parent_gives_one_concept_a_folder(tmp_path):
    put(tmp_path, "10_sks cat/a.png", "10_sks cat/a.txt", "10_sks cat/b.jpg", "3_my_dog/c.webp", "notes.md")
    listing, problems = read(tmp_path)
    assert problems == []
    assert listing.title == "kohya folders"
    cat, dog = listing.groups
    assert (cat.settings.repeats, cat.settings.caption, cat.prior) == (10, "sks cat", False)
    assert named(cat) == [("a.png", ("caption of a",)), ("b.jpg", None)]
    assert (dog.settings.repeats, dog.settings.caption) == (3, "my_dog")
    assert named(dog) == [("c.webp", None)]
    assert [group.settings.folder for group in listing.groups] == [
        str(tmp_path / "10_sks cat"),
        str(tmp_path / "3_my_dog"),
    ]
    assert listing.notes == [
        "10_sks cat: each picture comes 10 times in an epoch, as its name says",
        "3_my_dog: each picture comes 3 times in an epoch, as its name says",
    ]


def test_the_folder_itself_can_be_named(tmp_path, monkeypatch):
    put(tmp_path, "1_sks cat/a.png")
    listing, problems = read(tmp_path / "1_sks cat")
    assert (problems, [group.settings.caption for group in listing.groups]) == ([], ["sks cat"])
    assert listing.notes == ["1_sks cat: each picture comes 1 time in an epoch, as its name says"]
    monkeypatch.chdir(tmp_path / "1_sks cat")
    assert kohya_folders.recognises(Path())
    listing, _ = read(Path())
    assert Path(listing.groups[0].settings.folder).name == "1_sks cat"


def test_the_number_multiplies_repeats_and_a_caption_goes_before_class_tokens(tmp_path):
    put(tmp_path, "10_cat/a.png")
    listing, _ = read(tmp_path, repeats=2, caption="a photo of [trigger]")
    assert (listing.groups[0].settings.repeats, listing.groups[0].settings.caption) == (20, "a photo of [trigger]")


@pytest.mark.parametrize(
    ("name", "repeats", "caption"), [("3_", 3, ""), ("10 _x", 10, "x"), ("7_ x ", 7, "x"), ("100_a_b", 100, "a_b")]
)
def test_odd_names(tmp_path, name, repeats, caption):
    put(tmp_path, f"{name}/a.png")
    assert kohya_folders.recognises(tmp_path)
    listing, problems = read(tmp_path)
    assert problems == []
    assert (listing.groups[0].settings.repeats, listing.groups[0].settings.caption) == (repeats, caption)


def test_zero_repeats_leave_a_folder_out_with_a_note(tmp_path):
    put(tmp_path, "0_off/a.png", "2_on/b.png")
    listing, problems = read(tmp_path)
    assert problems == []
    assert [group.settings.repeats for group in listing.groups] == [2]
    assert listing.notes[0] == f"{tmp_path / '0_off'}: is left out, as its name says 0 repeats"


def test_nothing_but_zero_repeats_is_an_error(tmp_path):
    put(tmp_path, "0_off/a.png")
    with pytest.raises(DataError, match='holds no pictures in folders named like "10_token class"'):
        read(tmp_path)


def test_a_folder_without_pictures_is_a_fault(tmp_path):
    put(tmp_path, "2_on/b.png", "5_empty/readme.txt")
    listing, problems = read(tmp_path)
    assert len(listing.groups) == 1
    assert problems == [f"{tmp_path / '5_empty'}: holds no pictures; put them directly into it, or remove it"]


def test_an_unnumbered_sibling_is_a_fault_unless_the_layout_is_asked_for(tmp_path):
    put(tmp_path, "2_on/b.png", "other/deep/c.png", "words/readme.txt", ".hidden/d.png")
    listing, problems = read(tmp_path)
    assert problems == [
        f'{tmp_path / "other"}: holds pictures, but its name has no repeats as in "10_other"; rename it, or set '
        'data.layout to "kohya-folders" to leave them out as kohya\'s trainer does, or to "folder" to read all alike'
    ]
    listing, problems = read(tmp_path, layout="kohya-folders")
    assert (problems, len(listing.groups)) == ([], 1)
    assert listing.notes[-1] == (
        f'{tmp_path / "other"}: holds pictures, but its name has no repeats as in "10_other"; '
        "they are left out, as kohya's trainer does"
    )


def test_pictures_beside_and_below_numbered_folders_are_a_fault_unless_the_layout_is_asked_for(tmp_path):
    put(tmp_path, "loose.png", "2_on/b.png", "2_on/more/c.png")
    listing, problems = read(tmp_path)
    assert [problem.partition(";")[0] for problem in problems] == [
        f"{tmp_path}: holds pictures beside its numbered folders",
        f"{tmp_path / '2_on' / 'more'}: holds pictures, but below 2_on no subfolders are read",
    ]
    assert named(listing.groups[0]) == [("b.png", None)]
    listing, problems = read(tmp_path, layout="kohya-folders")
    assert problems == []
    assert sum("left out" in note for note in listing.notes) == 2


def test_a_folder_of_masks_is_not_overlooked_pictures(tmp_path):
    put(tmp_path, "2_on/b.png", "masks/b.png", "2_on/masks/b.png", "2_on/b-masklabel.png")
    assert len(read(tmp_path, masks=MasksSection(folder=str(tmp_path / "masks")))[1]) == 1
    assert len(read(tmp_path / "2_on", masks=MasksSection(folder=str(tmp_path / "2_on" / "masks")))[1]) == 0
    assert named(read(tmp_path)[0].groups[0]) == [("b.png", None)]


@pytest.mark.parametrize("name", ["2023_summer", "01_front", "007_x", "10", "cats", "ten_x", "-1_x"])
def test_names_that_are_not_clearly_repeats_are_left_to_other_layouts(tmp_path, name):
    put(tmp_path, f"{name}/a.png")
    assert not kohya_folders.recognises(tmp_path)
    assert not kohya_folders.recognises(tmp_path / name)


@pytest.mark.parametrize(("name", "repeats"), [("2023_summer", 2023), ("01_front", 1), ("10", 10), (" 4 _x", 4)])
def test_asked_for_every_number_counts_as_kohya_reads_it(tmp_path, name, repeats):
    put(tmp_path, f"{name}/a.png")
    listing, problems = read(tmp_path, layout="kohya-folders")
    assert (problems, [group.settings.repeats for group in listing.groups]) == ([], [repeats])


def test_recognised_are_leaf_parent_and_project(tmp_path):
    put(tmp_path / "parent", "10_cat/a.png")
    put(tmp_path / "project", "img/10_cat/a.png")
    put(tmp_path / "flat", "a.png")
    put(tmp_path / "empty", "10_cat/a.txt")
    put(tmp_path, "10_file.toml")
    found = {name for name in ("parent", "parent/10_cat", "project", "flat", "empty", "10_file.toml", "none")
             if kohya_folders.recognises(tmp_path / name)}  # fmt: skip
    assert found == {"parent", "parent/10_cat", "project"}


def test_a_project_gives_img_and_reg(tmp_path):
    put(tmp_path, "img/10_sks cat/a.png", "reg/1_cat/r.png", "log/x.png", "model/sample/s.png", "raw/z.png")
    listing, problems = read(
        tmp_path,
        caption="a photo of [trigger]",
        captions=CaptionsSection(prefix="best", dropout=0.25),
        masks=MasksSection(source="alpha"),
        held_out=0.5,
        weight=3.0,
    )
    assert problems == []
    own, other = listing.groups
    assert (own.prior, own.settings.caption, own.settings.held_out) == (False, "a photo of [trigger]", 0.5)
    assert (other.prior, other.settings.repeats, other.settings.caption) == (True, 1, "cat")
    # Nothing of the subject's text, masks and weight is meant for other things.
    assert other.settings.captions == CaptionsSection(dropout=0.25)
    assert (other.settings.masks.source, other.settings.held_out, other.settings.weight) == ("none", 0.0, 1.0)
    assert kohya_folders.PRIOR_NOTE in listing.notes
    assert listing.notes[-1] == f"{tmp_path / 'raw'}: is left out; of a project only img and reg are read"
    assert not any("log" in note or "model" in note for note in listing.notes)


def test_the_class_prompt_goes_before_the_class_tokens_of_reg(tmp_path):
    put(tmp_path, "img/10_sks cat/a.png", "reg/1_cat/r.png")
    listing, _ = read(tmp_path, class_prompt="a photo of a cat")
    assert [group.settings.caption for group in listing.groups] == ["sks cat", "a photo of a cat"]


def test_a_place_without_such_folders_is_an_error(tmp_path):
    put(tmp_path, "a.png")
    with pytest.raises(DataError) as caught:
        read(tmp_path, layout="kohya-folders")
    assert str(caught.value) == (
        f'{tmp_path}: holds no pictures in folders named like "10_token class"; name them so, '
        'or set data.layout to "folder"'
    )
    put(tmp_path, "10_file.toml")
    with pytest.raises(DataError, match="holds no pictures"):
        read(tmp_path / "10_file.toml", layout="kohya-folders")

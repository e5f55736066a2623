import os
from pathlib import Path

import pytest
from PIL import Image

from sdlora.config import DataSection
from sdlora.data.source import fill_trigger, fingerprint, held_out_section, open_dataset
from sdlora.errors import DataError


def picture(path: Path, colour=(255, 0, 0), size=(6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def caption(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def opened(folder: Path, **values):
    return open_dataset(DataSection(folder=str(folder), **values))


# --- captions ----------------------------------------------------------------------------------------


def test_a_folder_and_its_parent_give_the_same_pictures(tmp_path):
    leaf = tmp_path / "parent" / "cats"
    for name in ("b.png", "a.JPG", "c.webp"):
        caption(picture(leaf / name).with_suffix(".txt"), f"caption of {name}")
    from_leaf, from_parent = opened(leaf), opened(tmp_path / "parent")
    assert [s.path for s in from_leaf.samples] == [s.path for s in from_parent.samples]
    assert [sample.path.name for sample in from_leaf.samples] == ["a.JPG", "b.png", "c.webp"]
    assert [sample.caption for sample in from_parent.samples] == [
        f"caption of {n}" for n in ("a.JPG", "b.png", "c.webp")
    ]
    assert from_leaf.summary() == "folder: 1 concept, 3 pictures, all captioned"
    assert from_parent.summary() == "folder with subfolders: 1 concept, 3 pictures, all captioned"


def test_what_is_no_picture_of_the_user_is_left_out(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "a-masklabel.png")
    picture(tmp_path / ".thumbnails" / "a.png")
    picture(tmp_path / ".a.png")
    caption(tmp_path / "notes.md", "x")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "a_0512x0512_sd.npz").write_bytes(b"")
    assert [sample.path for sample in opened(tmp_path, caption="x").samples] == [tmp_path / "a.png"]


def test_a_data_folder_below_a_hidden_one_is_read(tmp_path):
    picture(tmp_path / ".cache" / "cats" / "a.png")
    assert len(opened(tmp_path / ".cache" / "cats", caption="x").samples) == 1


def test_captions_beside_the_picture_win_over_the_common_one(tmp_path):
    caption(picture(tmp_path / "a.png").with_suffix(".caption"), "\ufeff  own [trigger], ünïcode \r\n\n")
    picture(tmp_path / "b.png")
    caption(picture(tmp_path / "c.png").with_suffix(".txt"), "")
    dataset = opened(tmp_path, caption="photo of [trigger]", trigger="zorb")
    assert [sample.caption for sample in dataset.samples] == ["own zorb, ünïcode", "photo of zorb", ""]
    assert dataset.without_caption == 1
    assert dataset.summary() == "folder: 1 concept, 3 pictures, 1 without a caption of their own"


def test_a_folder_may_have_a_caption_for_all_in_it(tmp_path):
    picture(tmp_path / "red" / "a.png")
    caption(picture(tmp_path / "red" / "b.png").with_suffix(".txt"), "own")
    caption(tmp_path / "red" / "default.txt", "a red one")
    picture(tmp_path / "blue" / "a.png")
    dataset = opened(tmp_path, caption="any")
    assert [sample.caption for sample in dataset.samples] == ["any", "a red one", "own"]
    assert dataset.notes == ("default.txt gives the caption of pictures without their own in 1 folder",)


def test_the_caption_of_a_picture_called_default_is_its_own(tmp_path):
    caption(picture(tmp_path / "default.png").with_suffix(".txt"), "a default")
    picture(tmp_path / "other.png")
    assert [s.caption for s in opened(tmp_path, caption="x").samples] == ["a default", "x"]


def test_the_filename_or_one_prompt_can_be_the_caption(tmp_path):
    caption(picture(tmp_path / "a_red [trigger] (2).png").with_suffix(".txt"), "own")
    by_name = opened(tmp_path, caption_from="filename", trigger="zorb")
    assert [s.caption for s in by_name.samples] == ["a red zorb (2)"]
    assert [s.caption for s in opened(tmp_path, caption_from="instance", caption="sks").samples] == ["sks"]


def test_other_endings_of_caption_files(tmp_path):
    caption(picture(tmp_path / "a.png").with_suffix(".tags"), "tags")
    caption(tmp_path / "a.txt", "text")
    assert [s.caption for s in opened(tmp_path, caption_suffixes=(".tags", ".txt")).samples] == ["tags"]


def test_several_lines_are_alternatives_and_it_is_said(tmp_path):
    caption(picture(tmp_path / "a.png").with_suffix(".txt"), "one\n\n  two \n")
    dataset = opened(tmp_path)
    assert dataset.samples[0].lines == ("one", "two")
    assert dataset.summary().endswith("1 with several captions, of which one is drawn")
    first = opened(tmp_path, captions={"lines": "first"})
    assert first.summary().endswith("1 with several captions, of which the first is taken")


def test_the_plain_caption_follows_the_rules_of_its_concept(tmp_path):
    caption(picture(tmp_path / "a.png").with_suffix(".txt"), "a, b")
    rules = {"prefix": "photo of [trigger],", "insert_trigger": True}
    assert opened(tmp_path, trigger="zorb", captions=rules).samples[0].caption == "photo of zorb, zorb, a, b"


def test_everything_wrong_with_files_comes_in_one_message(tmp_path):
    caption(picture(tmp_path / "a.png").with_suffix(".txt"), "x")
    picture(tmp_path / "b.png")
    picture(tmp_path / "c.png")
    caption(picture(tmp_path / "d.png").with_suffix(".txt"), "a [trigger]")
    picture(tmp_path / "e.png").with_suffix(".txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(DataError) as caught:
        opened(tmp_path)
    first, *lines = str(caught.value).split("\n")
    assert first == "4 things are wrong with the pictures:"
    for start in (
        "e.txt: cannot be read as UTF-8 text",
        'b.png: has no caption file (b.txt); write it, or set data.caption, for example "a photo of [trigger]"',
        "c.png: has no caption file (c.txt)",
        "d.png: its caption 'a [trigger]' holds [trigger] but data.trigger is not set",
    ):
        assert sum(line.startswith(f"  {tmp_path}/{start}") for line in lines) == 1
    loose = open_dataset(DataSection(folder=str(tmp_path)), strict=False)
    assert len(loose.problems) == 4
    assert [s.path.name for s in loose.samples] == ["a.png", "e.png"]


def test_very_many_problems_are_counted(tmp_path):
    for number in range(30):
        picture(tmp_path / f"{number}.png")
    with pytest.raises(DataError, match=r"30 things are wrong(.|\n)*and 10 more, which sdlora dataset check lists"):
        opened(tmp_path)


def test_one_problem_is_one_sentence(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"^.*a\.png: has no caption file \(a\.txt\); write it, or set data\.caption"):
        opened(tmp_path)


def test_a_placeholder_without_a_trigger_is_an_error(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"holds \[trigger\] but data\.trigger is not set"):
        opened(tmp_path, caption="a [trigger]")
    with pytest.raises(DataError, match=r"data\.captions or data\.class_prompt: 'of \[trigger\]' holds \[trigger\]"):
        opened(tmp_path, caption="a", captions={"prefix": "of [trigger]"})
    assert fill_trigger("[trigger] and [trigger]", "x") == "x and x"
    assert fill_trigger("plain", "") == "plain"


def test_a_missing_folder_a_file_and_a_folder_without_pictures(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: there is no such folder; data\.folder must name"):
        opened(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"a\.png: is a file; data\.folder must name the folder it lies in"):
        opened(picture(tmp_path / "x" / "a.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no pictures \(it is empty\)"):
        opened(tmp_path / "empty")
    caption(tmp_path / "empty" / "a.psd", "x")
    with pytest.raises(DataError, match=r"it holds files of type \.psd\); expected .*\.png"):
        opened(tmp_path / "empty")


# --- concepts ----------------------------------------------------------------------------------------


def test_several_concepts_each_with_its_own_settings(tmp_path):
    for name in ("cats", "dogs"):
        picture(tmp_path / name / "a.png")
    section = DataSection.model_validate(
        {
            "caption": "photo of [trigger]",
            "repeats": 2,
            "captions": {"shuffle": True},
            "concepts": [
                {"folder": str(tmp_path / "cats"), "trigger": "mycat"},
                {"folder": str(tmp_path / "dogs"), "trigger": "mydog", "repeats": 5, "captions": {"prefix": "hm"}},
            ],
        }
    )
    dataset = open_dataset(section)
    cat, dog = (sample.concept.settings for sample in dataset.samples)
    assert [sample.caption for sample in dataset.samples] == ["photo of mycat", "hm photo of mydog"]
    assert (cat.repeats, dog.repeats) == (2, 5)
    assert (cat.captions.shuffle, dog.captions.shuffle, cat.captions.prefix) == (True, True, "")
    assert dataset.summary() == "folder: 2 concepts, 2 pictures, 2 without a caption of their own"


def test_a_concepts_missing_folder_is_named_by_its_number(tmp_path):
    picture(tmp_path / "cats" / "a.png")
    concepts = [{"folder": str(tmp_path / "cats")}, {"folder": str(tmp_path / "none")}]
    with pytest.raises(DataError, match=r"none: there is no such folder; data\.concepts\.1\.folder must name"):
        open_dataset(DataSection.model_validate({"caption": "x", "concepts": concepts}))


def test_an_explicit_layout_overrides_what_it_looks_like(tmp_path):
    picture(tmp_path / "3_cat" / "a.png")
    by_looks = opened(tmp_path)
    assert by_looks.samples[0].concept.settings.repeats == 3
    assert by_looks.samples[0].caption == "cat"
    plain = opened(tmp_path, layout="folder", caption="x")
    assert plain.samples[0].concept.settings.repeats == 1
    assert plain.samples[0].caption == "x"


def test_a_share_can_be_held_out_and_stays_the_same(tmp_path):
    for number in range(10):
        picture(tmp_path / f"{number}.png")
    dataset = opened(tmp_path, caption="x", held_out=0.3)
    assert len(dataset.held_out) == 3 and len(dataset.samples) == 7
    assert {s.path for s in dataset.samples}.isdisjoint(s.path for s in dataset.held_out)
    assert dataset.summary().endswith("3 held out")
    picture(tmp_path / "new.png")
    again = opened(tmp_path, caption="x", held_out=0.3)
    assert len({s.path for s in again.held_out} & {s.path for s in dataset.held_out}) >= 2


# --- masks -------------------------------------------------------------------------------------------


def test_masks_beside_the_pictures_or_in_a_folder_of_their_own(tmp_path):
    picture(tmp_path / "pictures" / "a.jpg")
    picture(tmp_path / "pictures" / "b.png")
    picture(tmp_path / "pictures" / "a-masklabel.png")
    picture(tmp_path / "masks" / "b.webp")
    section = {"caption": "x"}
    beside = opened(tmp_path / "pictures", **section)
    assert [s.mask for s in beside.samples] == [tmp_path / "pictures" / "a-masklabel.png", None]
    assert beside.summary().endswith("1 with a mask")
    apart = opened(tmp_path / "pictures", masks={"folder": str(tmp_path / "masks")}, **section)
    assert [s.mask for s in apart.samples] == [None, tmp_path / "masks" / "b.webp"]
    none = opened(tmp_path / "pictures", masks={"source": "none"}, **section)
    assert [s.mask for s in none.samples] == [None, None]
    opacity = opened(tmp_path / "pictures", masks={"source": "alpha"}, **section)
    assert [s.mask for s in opacity.samples] == [None, None]  # their own, found when they are decoded


def test_a_mask_folder_that_is_missing_or_foreign_is_an_error(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "masks" / "z.png")
    with pytest.raises(DataError, match=r"none: there is no such folder; data\.masks\.folder must name"):
        opened(tmp_path, layout="folder", caption="x", masks={"folder": str(tmp_path / "none")})
    (tmp_path / "own").mkdir()
    picture(tmp_path / "own" / "a.png")
    with pytest.raises(DataError, match="masks: holds no file with the name of a picture"):
        opened(tmp_path / "own", caption="x", masks={"folder": str(tmp_path / "masks")})


# --- pictures of other things ------------------------------------------------------------------------


def test_pictures_of_the_prior_folder_come_last_and_are_marked(tmp_path):
    caption(picture(tmp_path / "cats" / "b.png").with_suffix(".txt"), "[trigger]")
    caption(picture(tmp_path / "others" / "a.png").with_suffix(".txt"), "a dog")
    section = DataSection(
        folder=str(tmp_path / "cats"),
        trigger="mycat",
        prior={"folder": str(tmp_path / "others")},
        captions={"insert_trigger": True, "prefix": "photo of"},
        weight=3.0,
    )
    dataset = open_dataset(section)
    assert [(s.path.name, s.caption, s.prior) for s in dataset.samples] == [
        ("b.png", "photo of mycat", False),
        ("a.png", "a dog", True),
    ]
    assert [s.concept.settings.weight for s in dataset.samples] == [3.0, 1.0]
    assert dataset.summary() == "folder: 1 concept, 1 picture, all captioned, 1 of other things"


def test_a_prior_folder_must_lie_apart_and_have_captions_of_its_own(tmp_path):
    caption(picture(tmp_path / "cats" / "b.png").with_suffix(".txt"), "a cat")
    picture(tmp_path / "others" / "a.png")
    cats, others = str(tmp_path / "cats"), str(tmp_path / "others")
    with pytest.raises(DataError, match=r"others/a\.png: has no caption file .* saying what the picture shows"):
        opened(cats, prior={"folder": others}, caption="a cat")
    classed = opened(cats, prior={"folder": others}, class_prompt="a picture")
    assert classed.samples[1].caption == "a picture"
    with pytest.raises(DataError, match=r"b\.png: lies in data\.folder and in data\.prior\.folder"):
        opened(cats, prior={"folder": cats})
    with pytest.raises(DataError, match=r"data\.prior\.folder must name"):
        opened(cats, prior={"folder": str(tmp_path / "nowhere")})


# --- what a resumed run must find again --------------------------------------------------------------


def test_the_fingerprint_follows_contents_captions_and_settings_but_not_places(tmp_path):
    picture(tmp_path / "a.png")

    def print_of(hashes=("1",), **values):
        return fingerprint(opened(tmp_path, **{"caption": "x", **values}).samples, hashes)

    first = print_of()
    assert print_of() == first
    others = [
        print_of(hashes=("2",)),
        print_of(caption="y"),
        print_of(repeats=2),
        print_of(captions={"shuffle": True}),
        print_of(buckets={"enabled": False}),
    ]
    assert len({first, *others}) == 6
    moved = tmp_path / "moved" / tmp_path.name
    picture(moved / "a.png")
    assert fingerprint(opened(moved, caption="x").samples, ("1",)) == first


# --- found in review ---------------------------------------------------------------------------------


def test_masks_among_the_pictures_are_no_pictures(tmp_path):
    for name in ("a.png", "masks/a.png"):
        picture(tmp_path / name)
    dataset = opened(tmp_path, caption="x", masks={"folder": str(tmp_path / "masks")})
    assert [(s.path.name, s.mask) for s in dataset.samples] == [("a.png", tmp_path / "masks" / "a.png")]


def test_pictures_of_one_name_have_their_masks_in_folders_as_their_own(tmp_path):
    for name in ("set/a/1.png", "set/b/1.jpg", "masks/a/1.png", "masks/b/1.png"):
        picture(tmp_path / name)
    rules = {"folder": str(tmp_path / "masks")}
    dataset = opened(tmp_path / "set", caption="x", masks=rules)
    assert [s.mask for s in dataset.samples] == [tmp_path / "masks" / name for name in ("a/1.png", "b/1.png")]
    (tmp_path / "masks" / "a" / "1.png").rename(tmp_path / "masks" / "1.png")
    (tmp_path / "masks" / "b" / "1.png").unlink()
    with pytest.raises(DataError, match=r"masks/1\.png: could be the mask of .*a/1\.png and of another picture"):
        opened(tmp_path / "set", caption="x", masks=rules)


def test_held_out_pictures_do_not_take_the_masks_of_others(tmp_path):
    for name in ("set/1.png", "apart/1.png", "masks/1.png"):
        picture(tmp_path / name)
    section = DataSection(folder=str(tmp_path / "set"), caption="x", masks={"folder": str(tmp_path / "masks")})
    assert [s.mask for s in open_dataset(held_out_section(section, str(tmp_path / "apart"))).samples] == [None]


def test_files_asked_for_as_captions_must_be_there(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: has no caption file"):
        opened(tmp_path, caption="x", caption_from="files")


def test_nothing_left_to_train_on_is_an_error(tmp_path):
    picture(tmp_path / "set" / "a.png")
    picture(tmp_path / "others" / "b.png")
    values = {"caption": "x", "class_prompt": "y", "held_out": 1.0}
    with pytest.raises(DataError, match=r"data\.held_out: leaves none of 1 pictures to train on; lower it"):
        opened(tmp_path / "set", **values)
    with pytest.raises(DataError, match=r"data\.held_out: leaves none"):
        opened(tmp_path / "set", prior={"folder": str(tmp_path / "others")}, **values)


def test_a_small_share_of_small_concepts_holds_out_something(tmp_path):
    for number in range(20):
        picture(tmp_path / f"{number % 5 + 1}_c{number % 5}" / f"{number}.png")
    assert len(opened(tmp_path, held_out=0.1).held_out) == 2
    assert len(opened(tmp_path, held_out=0.01).held_out) == 1


def test_folders_missing_in_several_places_are_all_named(tmp_path):
    picture(tmp_path / "a" / "a.png")
    concepts = [{"folder": str(tmp_path / name)} for name in ("a", "none", "nil")]
    with pytest.raises(DataError) as caught:
        open_dataset(DataSection.model_validate({"concepts": concepts, "prior": {"folder": str(tmp_path / "void")}}))
    assert all(
        name in str(caught.value) for name in ("a.png: has no caption", "none: there", "nil: there", "void: there")
    )


@pytest.mark.parametrize("folder", ["x" * 300, "~nosuchuser/pictures", "a\0b"])
def test_a_folder_that_cannot_be_named_is_a_sentence(folder):
    with pytest.raises(DataError, match=r"data\.folder must name the folder of pictures"):
        opened(folder)


def test_a_linked_folder_is_read_once(tmp_path):
    picture(tmp_path / "elsewhere" / "b.png")
    picture(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    assert [s.path.name for s in opened(tmp_path / "set", caption="x").samples] == ["a.png", "b.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_must_not_be_read_is_named(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(DataError, match="closed: cannot be read"):
        opened(tmp_path, caption="x")


def test_a_trigger_in_the_class_prompt_is_filled_in(tmp_path):
    picture(tmp_path / "a.png")
    (sample,) = opened(tmp_path, caption="x", class_prompt="no [trigger]", trigger="zorb").samples
    assert sample.concept.settings.class_prompt == "no zorb"


def test_a_renamed_folder_has_the_same_fingerprint(tmp_path):
    picture(tmp_path / "one" / "a.png")
    picture(tmp_path / "two" / "a.png")
    prints = {fingerprint(opened(tmp_path / name, caption="x").samples, ("1",)) for name in ("one", "two")}
    assert len(prints) == 1

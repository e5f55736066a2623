"""Dataset configs of kohya's trainer: every key, what goes before what, and what is refused in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sdlora.config import BucketsSection, CaptionsSection, ConceptSection, MasksSection
from sdlora.data.layouts import kohya_config, kohya_folders
from sdlora.data.layouts.listing import Group, Listing
from sdlora.errors import DataError

# One file with one subset: what stands in each of its tables, and what was set in [data].
ONE = """
[general]
{general}
[[datasets]]
{dataset}
[[datasets.subsets]]
image_dir = "cat"
{subset}
"""


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with pictures in cat/, dog/ and masks for those of cat/."""
    for name in ("cat/a.png", "cat/b.png", "cat/deep/z.png", "dog/c.png", "masks/a.png", "masks/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "cat/a.txt").write_text("text of a\nsecond line")
    (tmp_path / "cat/a.caption").write_text("caption of a")
    return tmp_path


def read(place: Path, text: str, name: str = "set.toml", **settings) -> tuple[Listing, list[str]]:
    file = place / name
    file.write_text(text, encoding="utf-8")
    problems: list[str] = []
    listing = kohya_config.read(ConceptSection(folder=str(file), **settings), problems)
    return listing, [problem.removeprefix(f"{file}: ") for problem in problems]


def one(place: Path, subset: str = "", dataset: str = "", general: str = "", **settings) -> Group:
    """Return the group of a file that must have no fault."""
    listing, problems = read(place, ONE.format(general=general, dataset=dataset, subset=subset), **settings)
    assert problems == []
    (group,) = listing.groups
    return group


def faults(place: Path, subset: str = "", dataset: str = "", general: str = "", **settings) -> list[str]:
    return read(place, ONE.format(general=general, dataset=dataset, subset=subset), **settings)[1]


def notes(place: Path, subset: str = "", dataset: str = "", general: str = "", **settings) -> list[str]:
    listing, problems = read(place, ONE.format(general=general, dataset=dataset, subset=subset), **settings)
    assert problems == []
    return list(listing.notes)


# --- what keys become ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "setting", "expected"),
    [
        ("num_repeats = 10", "repeats", 10),
        ("class_tokens = 'sks cat'", "caption", "sks cat"),
        ("caption_extension = '.txt'", "caption_suffixes", (".txt",)),
        ("caption_extension = 'txt'", "caption_suffixes", (".txt",)),
        ("keep_tokens = 2", "captions.keep_tags", 2),
        ("keep_tokens_separator = '|||'", "captions.keep_separator", "|||"),
        ("shuffle_caption = true", "captions.shuffle", True),
        ("caption_separator = '. '", "captions.separator", ". "),
        ("secondary_separator = ';;;'", "captions.secondary_separator", ";;;"),
        ("caption_prefix = 'best, '", "captions.prefix", "best, "),
        ("caption_suffix = ', indoors'", "captions.suffix", ", indoors"),
        ("caption_dropout_rate = 0.1", "captions.dropout", 0.1),
        ("caption_dropout_rate = 1", "captions.dropout", 1),
        ("caption_dropout_every_n_epochs = 3", "captions.dropout_every_epochs", 3),
        ("caption_tag_dropout_rate = 0.2", "captions.tag_dropout", 0.2),
        ("enable_wildcard = true", "captions.wildcards", True),
        ("enable_wildcard = true", "captions.lines", "alternatives"),
        ("enable_wildcard = false", "captions.lines", "first"),
        ("", "captions.lines", "first"),
        ("flip_aug = true", "flip", True),
        ("random_crop = true", "crops", 8),
        ("random_crop = false", "crops", 1),
        ("alpha_mask = true", "masks.source", "alpha"),
        ("alpha_mask = true", "masks.unmasked_weight", 0.0),
        ("alpha_mask = false", "masks.source", "auto"),
        ("conditioning_data_dir = 'masks'", "masks.source", "folder"),
        ("conditioning_data_dir = 'masks'", "masks.unmasked_weight", 0.0),
        ("validation_split = 0.25", "held_out", 0.25),
    ],
)
def test_a_key_of_a_subset_becomes_a_setting(place, key, setting, expected):
    settings = one(place, key).settings
    for name in setting.split("."):
        settings = getattr(settings, name)
    assert settings == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("", BucketsSection(enabled=False)),
        ("enable_bucket = false\nmin_bucket_reso = 128", BucketsSection(enabled=False)),
        ("enable_bucket = true", BucketsSection()),  # the base's resolution is not known here
        ("enable_bucket = true\nresolution = 512", BucketsSection(min_side=256, max_side=1024, step=64)),
        ("enable_bucket = true\nresolution = [1280, 1280]", BucketsSection(min_side=256, step=64)),
        ("enable_bucket = true\nresolution = 128", BucketsSection()),  # below what kohya's trainer takes
        (
            "enable_bucket = true\nresolution = 1024\nmin_bucket_reso = 320\nmax_bucket_reso = 2048\n"
            "bucket_reso_steps = 32\nbucket_no_upscale = true",
            BucketsSection(min_side=320, max_side=2048, step=32, upscale=False),
        ),
        # Lower bounds are rounded down to the step, upper ones up, as adjust_min_max_bucket_reso_by_steps does.
        (
            "enable_bucket = true\nresolution = 512\nmin_bucket_reso = 300\nmax_bucket_reso = 1000",
            BucketsSection(min_side=256, max_side=1024, step=64),
        ),
        (
            "enable_bucket = true\nresolution = 512\nmin_bucket_reso = 40\nmax_bucket_reso = 512",
            BucketsSection(min_side=64, max_side=512, step=64),
        ),
    ],
)
def test_buckets(place, keys, expected):
    assert one(place, dataset=keys).settings.buckets == expected


@pytest.mark.parametrize(
    ("keys", "resolution", "size"),
    [
        ("", 0, None),
        ("resolution = 512", 512, None),
        ("resolution = [768, 768]", 768, None),
        ("resolution = [768, 512]\nenable_bucket = true", 624, None),  # 627.07 squared is the area
        ("resolution = 500\nenable_bucket = true", 496, None),
        ("resolution = [768, 512]", 624, (768, 512)),  # without buckets all are cropped to exactly that
    ],
)
def test_resolution(place, keys, resolution, size):
    group = one(place, dataset=keys)
    assert group.settings.resolution == resolution
    assert {picture.train_size for picture in group.pictures} == {size}


def test_several_datasets_have_their_own_resolutions_and_batch_sizes(place):
    listing, problems = read(
        place,
        """
        [[datasets]]
        resolution = 512
        batch_size = 4
        [[datasets.subsets]]
        image_dir = "cat"
        [[datasets.subsets]]
        image_dir = "dog"
        [[datasets]]
        resolution = [1024, 1024]
        [[datasets.subsets]]
        image_dir = "cat"
        """,
    )
    assert problems == []
    found = [(Path(group.settings.folder).name, group.settings.resolution, group.settings.batch_size)
             for group in listing.groups]  # fmt: skip
    assert found == [("cat", 512, 4), ("dog", 512, 4), ("cat", 1024, 0)]


def test_pictures_lie_directly_in_the_folder_and_its_name_says_nothing(place):
    (place / "cat").rename(place / "10_cat")
    listing, problems = read(place, '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "10_cat"')
    assert problems == []
    (group,) = listing.groups
    assert [(picture.path, picture.lines) for picture in group.pictures] == [
        (place / "10_cat/a.png", ("text of a", "second line")),
        (place / "10_cat/b.png", None),
    ]
    assert (group.settings.repeats, group.settings.caption) == (1, "")
    assert listing.title == "kohya dataset config"


def test_caption_extension_names_the_one_ending_that_is_read(place):
    assert one(place, "caption_extension = '.caption'").pictures[0].lines == ("caption of a",)
    assert one(place, "caption_extension = '.words'").pictures[0].lines is None


def test_regularisation_pictures_are_prior_and_take_nothing_of_the_subject(place):
    listing, problems = read(
        place,
        ONE.format(general="", dataset="validation_split = 0.5", subset="is_reg = true\nshuffle_caption = true"),
        caption="a photo of [trigger]",
        class_prompt="a cat",
        captions=CaptionsSection(insert_trigger=True, dropout=0.1),
        masks=MasksSection(source="alpha"),
    )
    assert problems == []
    (group,) = listing.groups
    assert group.prior
    assert (group.settings.caption, group.settings.held_out) == ("a cat", 0.0)
    assert group.settings.captions == CaptionsSection(shuffle=True, dropout=0.1, lines="first")
    assert group.settings.masks.source == "none"
    assert kohya_folders.PRIOR_NOTE in listing.notes
    assert one(place, "is_reg = true\nclass_tokens = 'cat'", class_prompt="a cat").settings.caption == "cat"
    assert not one(place, "is_reg = false").prior


def test_preservation_of_the_output_is_prior_preservation(place):
    assert one(place, "custom_attributes = {diff_output_preservation = true}").prior
    assert not one(place, "custom_attributes = {diff_output_preservation = false}").prior
    assert not one(place, "custom_attributes = {}").prior


def test_masks_of_a_folder(place):
    settings = one(place, "conditioning_data_dir = 'masks'", masks=MasksSection(source="alpha")).settings
    assert settings.masks.folder == str(place / "masks")
    (place / "masks/b.jpg").unlink()
    assert faults(place, "conditioning_data_dir = 'masks'") == [
        f"{place / 'cat/b.png'}: has no mask of its name in {place / 'masks'}; add one, or remove it"
    ]


def test_skip_image_resolution_leaves_small_pictures_out(place):
    Image.new("RGB", (30, 10)).save(place / "cat/a.png")
    Image.new("RGB", (31, 10)).save(place / "cat/b.png")
    (place / "cat/broken.png").write_bytes(b"no picture")
    group = one(place, dataset="skip_image_resolution = [20, 15]")
    assert [picture.path.name for picture in group.pictures] == ["b.png", "broken.png"]
    assert len(one(place, dataset="skip_image_resolution = 17").pictures) == 3
    assert "[[datasets]] 1: skip_image_resolution leaves out 1 of 3 pictures" in notes(
        place, dataset="skip_image_resolution = [20, 15]"
    )


def test_metadata_gives_captions_and_sizes(place):
    (place / "meta.json").write_text(
        json.dumps({"a": {"caption": "from json", "tags": "x"}, "b": {"train_resolution": [64, 128]}})
    )
    text = """
    [general]
    caption_extension = ".txt"
    [[datasets]]
    resolution = [768, 512]
    [[datasets.subsets]]
    {image_dir}
    metadata_file = "{file}"
    caption_separator = ";"
    class_tokens = "cat"
    num_repeats = 2
    """
    listing, problems = read(place, text.format(image_dir='image_dir = "cat"', file="meta.json"))
    assert problems == []
    (group,) = listing.groups
    assert [(picture.path, picture.lines, picture.train_size) for picture in group.pictures] == [
        (place / "cat/a.png", ("from json;x",), (768, 512)),
        (place / "cat/b.png", None, (64, 128)),
    ]
    assert (group.settings.repeats, group.settings.caption) == (2, "cat")
    (place / "meta.json").rename(place / "cat/meta.json")
    listing, problems = read(place, text.format(image_dir="", file="cat/meta.json"))
    assert problems == []
    assert [picture.path for picture in listing.groups[0].pictures] == [place / "cat/a.png", place / "cat/b.png"]
    assert listing.groups[0].settings.folder == str(place / "cat")


def test_json_is_read_like_toml(place):
    config = {"general": {"flip_aug": True}, "datasets": [{"subsets": [{"image_dir": "cat", "num_repeats": 4}]}]}
    listing, problems = read(place, json.dumps(config), name="set.json")
    assert problems == []
    assert (listing.groups[0].settings.flip, listing.groups[0].settings.repeats) == (True, 4)


# --- what goes before what -----------------------------------------------------------------------------


def test_the_inner_table_goes_first(place):
    assert one(place, general="keep_tokens = 1").settings.captions.keep_tags == 1
    assert one(place, general="keep_tokens = 1", dataset="keep_tokens = 2").settings.captions.keep_tags == 2
    assert one(place, "keep_tokens = 3", "keep_tokens = 2", "keep_tokens = 1").settings.captions.keep_tags == 3
    assert one(place, "keep_tokens = 0", "keep_tokens = 2").settings.captions.keep_tags == 0
    assert one(place, general="resolution = 512", dataset="resolution = 768").settings.resolution == 768


def test_one_subset_gives_nothing_to_the_next(place):
    listing, _ = read(
        place,
        """
        [[datasets]]
        keep_tokens = 2
        [[datasets.subsets]]
        image_dir = "cat"
        keep_tokens = 3
        flip_aug = true
        [[datasets.subsets]]
        image_dir = "dog"
        """,
    )
    assert [(group.settings.captions.keep_tags, group.settings.flip) for group in listing.groups] == [
        (3, True),
        (2, False),
    ]


def test_the_file_goes_before_the_settings_and_these_fill_in(place):
    own = ConceptSection(
        repeats=5,
        caption="mine",
        resolution=640,
        batch_size=7,
        trigger="mycat",
        flip=True,
        crops=3,
        captions=CaptionsSection(shuffle=True, keep_tags=4, wildcards=True),
        buckets=BucketsSection(min_side=320, step=32, upscale=False, shapes="classic"),
        masks=MasksSection(source="alpha"),
    )
    given = {name: getattr(own, name) for name in own.model_fields_set}
    kept = one(place, dataset="enable_bucket = true", **given).settings
    expected = own.model_dump() | {"folder": str(place / "cat")}
    # 1024 is where kohya's trainer ends when nobody says otherwise.
    expected["buckets"] |= {"max_side": 1024}
    assert kept.model_dump() == expected
    subset = "num_repeats = 1\nclass_tokens = ''\nflip_aug = false\nrandom_crop = false\nenable_wildcard = false\n"
    subset += "shuffle_caption = false\nkeep_tokens = 0\nalpha_mask = false"
    dataset = "resolution = 512\nbatch_size = 1\nenable_bucket = true\nmin_bucket_reso = 256\nbucket_reso_steps = 64\n"
    dataset += "bucket_no_upscale = false"
    settings = one(place, subset, dataset, **given).settings
    assert (settings.repeats, settings.caption, settings.resolution, settings.batch_size) == (1, "", 512, 1)
    assert (settings.flip, settings.crops, settings.trigger) == (False, 1, "mycat")
    assert settings.captions == CaptionsSection(lines="first")
    assert settings.buckets == BucketsSection(min_side=256, max_side=1024, step=64, shapes="classic")
    assert settings.masks.source == "none"


def test_random_crop_keeps_a_larger_number_of_crops(place):
    assert one(place, "random_crop = true", crops=20).settings.crops == 20
    assert one(place, crops=20).settings.crops == 20


def test_relative_paths_are_beside_the_file_or_else_where_one_works(place, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("work")
    monkeypatch.chdir(elsewhere)
    for name in ("cat/x.png", "bird/y.png"):
        (elsewhere / name).parent.mkdir()
        (elsewhere / name).touch()
    listing, problems = read(
        place,
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cat"\n[[datasets.subsets]]\nimage_dir = "bird"\n'
        '[[datasets.subsets]]\nimage_dir = "none"\n'
        f"[[datasets.subsets]]\nimage_dir = '{elsewhere / 'cat'}'",
    )
    assert [group.settings.folder for group in listing.groups] == [
        str(place / "cat"),
        str(elsewhere / "bird"),
        str(elsewhere / "cat"),
    ]
    assert problems == [
        f'[[datasets]] 1, subset 3: image_dir is "none", but there is no folder {place / "none"} '
        f"or {elsewhere / 'none'}; correct the path"
    ]


def test_the_same_place_twice_counts_once_in_a_dataset(place):
    listing, problems = read(
        place,
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cat"\nnum_repeats = 2\n'
        f"[[datasets.subsets]]\nimage_dir = '{place}/cat'\nnum_repeats = 9\n",
    )
    assert problems == []
    assert [group.settings.repeats for group in listing.groups] == [2]
    assert (
        "[[datasets]] 1, subset 2: is left out, as an earlier subset of the same [[datasets]] names the same place"
        in listing.notes
    )


def test_zero_repeats_leave_a_subset_out(place):
    listing, problems = read(
        place,
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "none"\nnum_repeats = 0\n'
        '[[datasets.subsets]]\nimage_dir = "cat"',
    )
    assert (problems, len(listing.groups)) == ([], 1)
    assert "[[datasets]] 1, subset 1: is left out, as num_repeats is 0" in listing.notes


# --- what is said --------------------------------------------------------------------------------------


def test_notes_say_where_the_reading_is_not_what_one_may_expect(place):
    assert notes(place) == [
        "enable_bucket is not set; as in kohya's trainer pictures are cropped to one shape without it",
        "caption_extension is not set; captions are read from .txt or .caption files, "
        "where kohya's trainer takes .caption unless told otherwise",
    ]
    quiet = "enable_bucket = true\ncaption_extension = '.txt'\n"
    assert notes(place, general=quiet, buckets=BucketsSection(shapes="classic")) == []
    assert notes(place, "random_crop = true\ncache_info = true", general=quiet + "resolution = [768, 512]") == [
        "[general]: resolution [768, 512] is read as the area of 624 x 624 pixels",
        'buckets are fitted to the pictures; data.buckets.shapes = "classic" gives those of kohya\'s trainer',
        "random_crop is read as data.crops = 8: so many crops of each picture",
        "cache_info is not needed: captions and sizes are read anew by each run",
    ]
    said = "conditioning_data_dir is read as a folder of masks: white is learnt, black is not"
    assert said in notes(place, "conditioning_data_dir = 'masks'")


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        (
            {"subset": "color_aug = true"},
            "[[datasets]] 1, subset 1: color_aug is true, which is not supported, as pictures are encoded once, "
            "so that colours cannot change; remove it or set it to false",
        ),
        (
            {"general": "face_crop_aug_range = [2.0, 4.0]"},
            "[general]: face_crop_aug_range is [2.0, 4.0], which is not supported, as crops are not made around "
            "faces; remove it",
        ),
        (
            {"dataset": "token_warmup_step = 0.5"},
            "[[datasets]] 1: token_warmup_step is 0.5, which is not supported, as all tags are trained from the "
            "start; remove it or set it to 0",
        ),
        (
            {"dataset": "network_multiplier = 0.5"},
            "[[datasets]] 1: network_multiplier is 0.5, which is not supported, as an adapter is trained at full "
            "strength; remove it or set it to 1",
        ),
        (
            {"dataset": "resize_interpolation = 'area'"},
            '[[datasets]] 1: resize_interpolation is "area", which is not supported, as pictures are resized as '
            '"lanczos" does; remove it or set it to "lanczos"',
        ),
        (
            {"subset": "custom_attributes = {style = 1}"},
            "[[datasets]] 1, subset 1: custom_attributes.style is 1; expected only diff_output_preservation, "
            "true or false",
        ),
        (
            {"dataset": "validation_seed = 3\nvalidation_split = 0.1"},
            "[[datasets]] 1: validation_seed is 3, but which pictures are held out depends on their names alone; "
            "remove it",
        ),
        (
            {"subset": "num_repeats = '10'"},
            '[[datasets]] 1, subset 1: num_repeats is "10"; expected a whole number from 0',
        ),
        (
            {"subset": "keep_tokens = -1"},
            "[[datasets]] 1, subset 1: keep_tokens is -1; expected a whole number from 0",
        ),
        (
            {"subset": "keep_tokens = true"},
            "[[datasets]] 1, subset 1: keep_tokens is true; expected a whole number from 0",
        ),
        (
            {"general": "caption_dropout_rate = 1.5"},
            "[general]: caption_dropout_rate is 1.5; expected a number from 0 to 1",
        ),
        (
            {"general": "caption_dropout_rate = nan"},
            "[general]: caption_dropout_rate is NaN; expected a number from 0 to 1",
        ),
        (
            {"general": "resolution = '512,512'"},
            '[general]: resolution is "512,512"; expected a whole number, or [width, height]',
        ),
        (
            {"general": "resolution = [512, 512, 512]"},
            "[general]: resolution is [512, 512, 512]; expected a whole number, or [width, height]",
        ),
        ({"general": "batch_size = 0"}, "[general]: batch_size is 0; expected a whole number from 1"),
        ({"general": "bucket_reso_steps = 20"}, "[general]: bucket_reso_steps is 20; expected a multiple of 8"),
        ({"general": "flip_aug = 1979-05-27"}, "[general]: flip_aug is 1979-05-27; expected true or false"),
        ({"general": "flip_aug = 'yes'"}, '[general]: flip_aug is "yes"; expected true or false'),
        (
            {"general": "caption_extension = '../x'"},
            '[general]: caption_extension is "../x"; expected an ending such as ".txt"',
        ),
        (
            {"general": "caption_separator = ''"},
            '[general]: caption_separator is ""; expected a text in quotes that is not empty',
        ),
        ({"dataset": "resolution = 500"}, "[[datasets]] 1: resolution is 500; expected multiples of 8"),
        (
            {"dataset": "resolution = 3\nenable_bucket = true"},
            "[[datasets]] 1: resolution is 3; expected multiples of 8",
        ),
        (
            {"dataset": "resolution = 512\nenable_bucket = true\nmin_bucket_reso = 576"},
            "[[datasets]] 1: min_bucket_reso is 576, more than resolution = 512; lower it",
        ),
        (
            {"dataset": "resolution = [512, 1280]\nenable_bucket = true", "general": "max_bucket_reso = 1024"},
            "[general]: max_bucket_reso is 1024, less than resolution = 1280; raise it",
        ),
        (
            {"subset": "batch_size = 2"},
            "[[datasets]] 1, subset 1: batch_size does not belong there; move it to [general] or [[datasets]]",
        ),
        (
            {"general": "alpha_mask = true"},
            "[general]: alpha_mask does not belong there; move it to [[datasets.subsets]]",
        ),
        (
            {"subset": "alpha_mask = true\nconditioning_data_dir = 'masks'"},
            "[[datasets]] 1, subset 1: has both alpha_mask and conditioning_data_dir; keep one, as a picture has "
            "one mask",
        ),
        (
            {"general": "dataset_repeats = 3"},
            "[general]: unknown key dataset_repeats; did you mean num_repeats?",
        ),
        ({"subset": "keep_token = 3"}, "[[datasets]] 1, subset 1: unknown key keep_token; did you mean keep_tokens?"),
        ({"dataset": "xyz = 3"}, "[[datasets]] 1: unknown key xyz; it is none of kohya's trainer"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(place, tables, expected):
    assert faults(place, **tables) == [expected]


def test_a_bound_of_the_settings_is_named_as_such(place):
    assert faults(place, dataset="resolution = 256\nenable_bucket = true", buckets=BucketsSection(min_side=320)) == [
        "data.buckets.min_side is 320, more than resolution = 256; lower it"
    ]


def test_a_fault_of_a_shared_table_is_said_once(place):
    _, problems = read(
        place,
        "[general]\ncolor_aug = true\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'cat'\n"
        "[[datasets.subsets]]\nimage_dir = 'dog'",
    )
    assert len(problems) == 1


def test_an_inner_table_can_take_back_what_is_refused(place):
    assert faults(place, "color_aug = false", general="color_aug = true") == []


def test_values_that_change_nothing_are_accepted(place):
    harmless = "color_aug = false\ntoken_warmup_min = 1\ntoken_warmup_step = 0\nresize_interpolation = 'lanczos'\n"
    plain = one(place).settings
    assert one(place, harmless + "cache_info = true\nvalidation_seed = 5").settings == plain
    assert one(place, dataset="network_multiplier = 1.0").settings == plain


def test_all_faults_are_found_at_once(place):
    (place / "empty").mkdir()
    (place / "empty/sub").mkdir()
    (place / "empty/sub/x.png").touch()
    _, problems = read(
        place,
        """
        resolution = 512
        foo = 1
        [general]
        color_aug = true
        [[datasets]]
        [[datasets]]
        subsets = [1]
        [[datasets]]
        [[datasets.subsets]]
        num_repeats = 2
        [[datasets.subsets]]
        image_dir = 5
        [[datasets.subsets]]
        image_dir = "dog"
        metadata_file = "none.json"
        caption_extension = ".txt"
        [[datasets.subsets]]
        image_dir = "empty"
        [[datasets.subsets]]
        image_dir = "dog"
        metadata_file = "set.toml"
        """,
    )
    assert problems == [
        "foo stands outside all tables; it is none of kohya's trainer",
        "resolution stands outside all tables; it belongs in [general] or [[datasets]]",
        "[[datasets]] 1: has no [[datasets.subsets]]; add one with image_dir",
        "[[datasets]] 2, subset 1: is 1; expected a table [[datasets.subsets]]",
        "[general]: color_aug is true, which is not supported, as pictures are encoded once, "
        "so that colours cannot change; remove it or set it to false",
        "[[datasets]] 3, subset 1: image_dir is not set; name the folder of its pictures",
        "[[datasets]] 3, subset 2: image_dir is 5; expected a text in quotes that is not empty",
        "[[datasets]] 3, subset 3: caption_extension has no effect beside metadata_file; remove it",
        f'[[datasets]] 3, subset 3: metadata_file is "none.json", but there is no file {place / "none.json"} '
        f"or {Path.cwd() / 'none.json'}; correct the path",
        f"[[datasets]] 3, subset 4: image_dir {place / 'empty'} holds no pictures; only its subfolders do, "
        "which are not read: name each",
        "is not valid JSON (Expecting value: line 2 column 9 (char 9)); correct it",
    ]


@pytest.mark.parametrize("path", ["x" * 5000, "a\\u0000b", "~nobody-of-that-name/x"])
def test_a_path_that_no_file_can_have_is_a_fault(place, path):
    _, problems = read(place, f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{path}"')
    assert len(problems) == 1
    assert problems[0].startswith("[[datasets]] 1, subset 1: image_dir is ")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("set.toml", "[[datasets]\n", "is not valid TOML ("),
        ("set.toml", '[[datasets]]\nx = "C:\\hoge"', "is not valid TOML ("),
        ("set.json", "{", "is not valid JSON ("),
        ("set.json", "[" * 100_000, "is not valid JSON ("),
        ("set.json", "[]", "has no [[datasets]]; expected a dataset config of kohya's trainer"),
        ("set.toml", "[general]\n", "has no [[datasets]]; expected a dataset config of kohya's trainer"),
        ("set.toml", "[datasets]\nresolution = 512", "has no [[datasets]]; expected a dataset config"),
        ("set.toml", "datasets = []", "has no [[datasets]]; expected a dataset config"),
        (
            "set.toml",
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'cat'\nnum_repeats = 0",
            "no subset of it gives pictures; name a folder of pictures as image_dir",
        ),
    ],
)
def test_a_file_that_is_none_is_an_error(place, name, text, message):
    with pytest.raises(DataError) as caught:
        read(place, text, name=name)
    assert str(caught.value).startswith(f"{place / name}: {message}")


def test_backslashes_in_double_quotes_are_explained(place):
    for path in ("C:\\hoge", "C:\\Users\\me"):
        with pytest.raises(DataError, match="paths with backslashes stand in single quotes"):
            read(place, f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{path}"')


def test_a_file_that_cannot_be_read_is_an_error(place):
    with pytest.raises(DataError, match=r"none\.toml: cannot be read \(No such file or directory\)"):
        kohya_config.read(ConceptSection(folder=str(place / "none.toml")), [])
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        kohya_config.read(ConceptSection(folder=str(place)), [])


# --- nothing is ignored --------------------------------------------------------------------------------

GDS, GD, S = ("general", "dataset", "subset"), ("general", "dataset"), ("subset",)
# Every key that library/config_util.py of kohya-ss/sd-scripts knows, the tables it allows it in, and a value
# that is not what holds without it.
SCHEMA = {
    "color_aug": (GDS, "true"),
    "face_crop_aug_range": (GDS, "[1.0, 3.0]"),
    "flip_aug": (GDS, "true"),
    "num_repeats": (GDS, "3"),
    "random_crop": (GDS, "true"),
    "shuffle_caption": (GDS, "true"),
    "keep_tokens": (GDS, "2"),
    "keep_tokens_separator": (GDS, "'|||'"),
    "secondary_separator": (GDS, "';;;'"),
    "caption_separator": (GDS, "'. '"),
    "enable_wildcard": (GDS, "true"),
    "token_warmup_min": (GDS, "2"),
    "token_warmup_step": (GDS, "100"),
    "caption_prefix": (GDS, "'x'"),
    "caption_suffix": (GDS, "'x'"),
    "custom_attributes": (GDS, "{diff_output_preservation = true}"),
    "resize_interpolation": (GDS, "'area'"),
    "caption_dropout_every_n_epochs": (GDS, "2"),
    "caption_dropout_rate": (GDS, "0.5"),
    "caption_tag_dropout_rate": (GDS, "0.5"),
    "caption_extension": (GDS, "'.caption'"),
    "class_tokens": (GDS, "'x'"),
    "cache_info": (GDS, "true"),
    "image_dir": (S, "'none'"),
    "is_reg": (S, "true"),
    "alpha_mask": (S, "true"),
    "metadata_file": (S, "'none.json'"),
    "conditioning_data_dir": (S, "'masks'"),
    "batch_size": (GD, "2"),
    "bucket_no_upscale": (GD, "true"),
    "bucket_reso_steps": (GD, "32"),
    "enable_bucket": (GD, "false"),
    "max_bucket_reso": (GD, "2048"),
    "min_bucket_reso": (GD, "128"),
    "validation_seed": (GD, "1"),
    "validation_split": (GD, "0.5"),
    "resolution": (GD, "768"),
    "network_multiplier": (GD, "0.5"),
    "skip_image_resolution": (GD, "64"),
}
PLAIN = {
    "general": {
        "enable_bucket": "true",
        "resolution": "512",
        "caption_extension": "'.txt'",
        "validation_split": "0.25",
    },
    "dataset": {},
    "subset": {"image_dir": "'cat'"},
}


def outcome(place: Path, tables: dict[str, dict[str, str]]) -> tuple[list[Group], list[str], list[str]]:
    parts = {name: "\n".join(f"{key} = {value}" for key, value in table.items()) for name, table in tables.items()}
    text = "[general]\n{general}\n[[datasets]]\n{dataset}\n[[datasets.subsets]]\n{subset}".format(**parts)
    listing, problems = read(place, text)
    return list(listing.groups), problems, list(listing.notes)


@pytest.mark.parametrize(("key", "table"), [(key, table) for key, (tables, _) in SCHEMA.items() for table in tables])
def test_every_key_changes_the_listing_or_is_named(place, key, table):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8) if name == "a" else (80, 80)).save(place / f"cat/{name}.png")
    groups, problems, said = outcome(place, PLAIN)
    assert problems == []
    tables = {**PLAIN, table: PLAIN[table] | {key: SCHEMA[key][1]}}
    changed, faults, said_now = outcome(place, tables)
    named = [sentence for sentence in faults + [note for note in said_now if note not in said] if key in sentence]
    assert changed != groups or named
    assert not any("unknown key" in fault or "does not belong" in fault for fault in faults)


@pytest.mark.parametrize("key", SCHEMA)
def test_every_key_refuses_a_value_of_the_wrong_type(place, key):
    tables, _ = SCHEMA[key]
    wrong = {**PLAIN, tables[-1]: PLAIN[tables[-1]] | {key: "1979-05-27"}}
    _, faults, _ = outcome(place, wrong)
    assert any(f": {key} is 1979-05-27" in fault for fault in faults)

"""Each finding from a file on disk, and nothing found where nothing is wrong."""

from __future__ import annotations

import hashlib
import io
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_help import check, found, kinds, photo, save
from PIL import Image, ImageCms, ImageOps

from sdlora.config import BaseSection, ConceptSection, DataSection
from sdlora.data import index as index_module
from sdlora.data.cache_folder import data_cache, index_file
from sdlora.data.check import KINDS
from sdlora.data.check.looking import look_at
from sdlora.data.index import FileIndex, open_index, state_of
from sdlora.data.sample import Concept, Sample
from sdlora.errors import ConfigError, DataError


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The outline of the base that ships with sdlora."""
    from sdlora.families.outline import outline_base
    from sdlora.quiet import quiet_libraries

    quiet_libraries()
    return outline_base(BaseSection(path="tiny"))


def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path, tiny: Any) -> None:
    for seed in range(4):
        save(tmp_path / "set", f"{seed}.png", seed, f"a zorblin, thing {seed}")
    report = check(tmp_path / "set", tiny, trigger="zorblin", caption="unused")
    assert report.findings == () and report.ok
    assert report.summary == "folder: 1 concept, 4 pictures, all captioned"
    assert (report.base, report.resolutions, report.resolution_assumed) == ("Stable Diffusion 1.x", (64,), False)
    assert [(share.name, share.pictures, share.draws, share.share) for share in report.concepts] == [("set", 4, 4, 1.0)]


def test_kinds_have_names_of_their_own_and_grave_ones_come_first() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    gravity = [("error", "warning", "note").index(kind.severity) for kind in KINDS]
    assert gravity == sorted(gravity)


# --- files -------------------------------------------------------------------------------------------


def test_all_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    whole = save(tmp_path, "whole.jpg", photo(1, (400, 300)), quality=90)
    cut = save(tmp_path, "cut.jpg", photo(2, (400, 300)), quality=90)
    cut.write_bytes(cut.read_bytes()[:4000])
    page = save(tmp_path, "page.png", 3)
    page.write_bytes(b"<!doctype html><html></html>")
    save(tmp_path, "bare.png", 4, caption=None)
    report = check(tmp_path)
    damaged, foreign = found(report, "unreadable")
    assert damaged.startswith("cut.jpg: cannot be read as a picture (image file is truncated")
    assert foreign == "page.png: is a web page, not a picture; download the picture again, or remove the file"
    assert [text[:35] for text in found(report, "unusable")] == ["bare.png: has no caption file (bare"]
    assert not report.ok
    assert [picture.name for picture in report.pictures if not picture.look.problem] == [str(whole)]


def test_headers_only_finds_no_damaged_pixels_but_files_that_are_the_same(tmp_path: Path) -> None:
    cut = save(tmp_path, "cut.jpg", photo(2, (400, 300)), "c", quality=90)
    cut.write_bytes(cut.read_bytes()[:4000])
    twin = save(tmp_path, "a.png", 1, "a")
    shutil.copy(twin, tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("a")
    report = check(tmp_path, headers_only=True)
    assert kinds(report) == {"duplicate"} and report.headers_only
    assert [bool(picture.look.sha256) for picture in report.pictures] == [True, True, False]


def test_turned_pictures_are_measured_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path, "lying.jpg", photo(1, (160, 96)), exif=exif)
    report = check(tmp_path)
    assert found(report, "turned") == ["lying.jpg: EXIF orientation 6, 96x160 upright"]
    assert report.pictures[0].bucket is not None and report.pictures[0].bucket[0] < report.pictures[0].bucket[1]


def test_transparent_parts_and_what_becomes_of_them(tmp_path: Path) -> None:
    picture = photo(1).convert("RGBA")
    save(tmp_path, "opaque.png", picture)
    picture.putpixel((5, 5), (0, 0, 0, 0))
    save(tmp_path, "open.png", picture)
    assert found(check(tmp_path, background="black"), "transparent") == ["open.png: black is laid behind"]
    as_mask = check(tmp_path, masks={"source": "alpha"})
    assert found(as_mask, "transparent") == ["open.png: its opacity is its mask, and white is laid behind"]


def test_unusual_files(tmp_path: Path) -> None:
    save(tmp_path, "anim.gif", photo(1), save_all=True, append_images=[photo(2)])
    save(tmp_path, "cmyk.jpg", photo(3).convert("CMYK"))
    save(tmp_path, "grey.png", photo(4).convert("L"))
    save(tmp_path, "deep.png", Image.fromarray(np.arange(96 * 96, dtype=np.uint16).reshape(96, 96)))
    save(tmp_path, "plain.png", photo(5))
    report = check(tmp_path)
    assert found(report, "animated") == ["anim.gif: GIF with several frames"]
    assert found(report, "converted") == [
        "anim.gif: a palette of colours",
        "cmyk.jpg: CMYK colours become RGB",
        "deep.png: 16 bits a channel become 8",
        "grey.png: grey, without colour",
    ]
    assert report.ok


def test_colour_profiles(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save(tmp_path, "damaged.png", 1, icc_profile=b"no profile at all")
    save(tmp_path, "other.png", 2, icc_profile=with_red_and_green_swapped(srgb))
    save(tmp_path, "srgb.png", 3, icc_profile=srgb)
    report = check(tmp_path)
    assert found(report, "profile-unreadable") == ["damaged.png: its profile is ignored"]
    assert found(report, "profile") == ["other.png: sRGB built-in"]


def with_red_and_green_swapped(profile: bytes) -> bytes:
    """Return a colour profile whose red is the other's green."""
    swapped = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}
    (count,) = struct.unpack_from(">I", profile, 128)
    table = bytearray(profile)
    for entry in range(132, 132 + 12 * count, 12):
        name = bytes(table[entry : entry + 4])
        table[entry : entry + 4] = swapped.get(name, name)
    return bytes(table)


# --- copies ------------------------------------------------------------------------------------------


def test_the_same_file_twice_and_nearly_the_same_picture(tmp_path: Path) -> None:
    first = save(tmp_path, "a.png", photo(1), "one")
    shutil.copy(first, tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("one")
    save(tmp_path, "c.jpg", photo(1).resize((200, 200)), "another")
    save(tmp_path, "d.png", ImageOps.mirror(photo(2)), "two")
    save(tmp_path, "e.png", photo(2), "two")
    save(tmp_path, "f.png", photo(3), "three")
    report = check(tmp_path)
    assert found(report, "duplicate") == ["a.png and b.png: the same file"]
    assert found(report, "near-duplicate") == [
        "a.png, b.png and c.jpg: nearly the same picture; their captions differ",
        "d.png and e.png: nearly the same picture",
    ]
    assert report.ok


def test_a_large_group_is_named_in_short(tmp_path: Path) -> None:
    first = save(tmp_path, "0.png", photo(1))
    for number in range(1, 7):
        shutil.copy(first, tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a thing")
    report = check(tmp_path)
    assert found(report, "duplicate") == ["0.png, 1.png, 2.png, 3.png and 3 more: the same file"]
    assert report.by_kind()[report.findings[0].kind][0].pictures == tuple(range(7))


def test_leaks_between_training_and_validation(tmp_path: Path) -> None:
    exact = save(tmp_path / "train", "a.png", 1)
    save(tmp_path / "train", "b.png", photo(2))
    save(tmp_path / "held", "z.png", 9)
    shutil.copy(exact, tmp_path / "held" / "x.png")
    (tmp_path / "held" / "x.txt").write_text("a thing")
    save(tmp_path / "held", "y.jpg", ImageOps.mirror(photo(2)), quality=70)
    report = check(tmp_path / "train", validation={"folder": str(tmp_path / "held")})
    assert found(report, "leak") == ["a.png (training) and x.png (validation): the same file"]
    assert found(report, "near-leak") == ["b.png (training) and y.jpg (validation): nearly the same picture"]
    assert kinds(report) == {"leak", "near-leak"} and not report.ok
    assert [picture.part for picture in report.pictures] == ["training"] * 2 + ["validation"] * 3


def test_held_out_pictures_are_validation_pictures(tmp_path: Path) -> None:
    for number, name in enumerate("abcd"):
        save(tmp_path, f"{name}.png", number)
    report = check(tmp_path, held_out=0.5)
    assert [picture.part for picture in report.pictures].count("validation") == 2
    assert report.ok and not kinds(report) & {"leak", "near-leak", "no-batch"}


def test_a_training_picture_among_the_prior_ones(tmp_path: Path) -> None:
    save(tmp_path / "own", "a.png", photo(1))
    save(tmp_path / "other", "b.jpg", photo(1), "a toy")
    save(tmp_path / "other", "c.jpg", photo(2), "a tree")
    report = check(tmp_path / "own", prior={"folder": str(tmp_path / "other")})
    assert found(report, "prior-copy") == [
        "a.png (training) and b.jpg (prior): nearly the same picture; their captions differ"
    ]


# --- shapes and masks --------------------------------------------------------------------------------


def test_small_and_long_pictures(tmp_path: Path) -> None:
    save(tmp_path, "small.png", photo(1, (32, 32)))
    save(tmp_path, "just.png", photo(2, (63, 64)))
    save(tmp_path, "long.png", photo(3, (1000, 100)))
    save(tmp_path, "large.png", photo(4, (128, 128)))
    report = check(tmp_path)
    assert found(report, "enlarged") == [
        "small.png: 32x32 is enlarged 2.0x for 64x64",
        "just.png: 63x64 is enlarged 1.016x for 64x64",
    ]
    # The longest shape at 64 pixels is 128x32, 4:1; of 10:1 it keeps 4 parts of 10.
    assert found(report, "cropped") == ["long.png: 60% of 1000x100 is cropped away for 128x32"]
    assert [(shape.bucket, shape.pictures) for shape in report.shapes] == [((64, 64), 3), ((128, 32), 1)]
    assert report.shapes[1].cropped == pytest.approx(0.6)


def test_masks_missing_black_and_of_another_shape(tmp_path: Path) -> None:
    half = Image.new("L", (96, 96))
    half.paste(255, (0, 0, 48, 96))
    for seed, (name, mask) in enumerate(
        {"good": half, "black": Image.new("L", (96, 96)), "wide": Image.new("L", (96, 48), 255), "none": None}.items()
    ):
        save(tmp_path, f"{name}.png", seed, name)
        if mask:
            mask.save(tmp_path / f"{name}-masklabel.png")
    report = check(tmp_path)
    assert found(report, "mask-missing") == ["none.png: has no mask"]
    assert found(report, "mask-black") == ["black-masklabel.png: is black all over"]
    assert found(report, "mask-unfit") == ["wide-masklabel.png: mask is 96x48, wide.png is 96x96; resize the mask"]
    assert kinds(report) == {"mask-missing", "mask-black", "mask-unfit"} and not report.ok


def test_opacity_as_mask(tmp_path: Path) -> None:
    opaque, clear = photo(1).convert("RGBA"), photo(2).convert("RGBA")
    clear.putalpha(0)
    save(tmp_path, "opaque.png", opaque)
    save(tmp_path, "clear.png", clear)
    save(tmp_path, "none.png", photo(3))
    report = check(tmp_path, masks={"source": "alpha"})
    assert found(report, "mask-missing") == ["none.png: has no mask"]
    assert found(report, "mask-black") == ["clear.png: is black all over"]


# --- captions ----------------------------------------------------------------------------------------


def test_empty_and_repeated_captions(tmp_path: Path) -> None:
    for seed, caption in enumerate(["", "same", "same", "same", "twice", "twice"]):
        save(tmp_path, f"{seed}.png", seed, caption)
    report = check(tmp_path)
    assert found(report, "caption-empty") == ["0.png: has an empty caption"]
    assert found(report, "caption-repeated") == ["1.png and 2 more: 'same'"]
    assert report.ok


def test_a_caption_that_was_set_for_all_is_not_repeated(tmp_path: Path) -> None:
    for seed in range(4):
        save(tmp_path, f"{seed}.png", seed, caption=None)
    report = check(tmp_path, caption="a photo of [trigger]", trigger="zorblin")
    assert report.findings == ()
    assert report.summary == "folder: 1 concept, 4 pictures, 4 without a caption of their own"


def test_captions_longer_than_the_encoder_sees(tmp_path: Path, tiny: Any) -> None:
    # In the tiny base's vocabulary each "a" and each "," is a token; 75 of them are seen.
    save(tmp_path, "fits.png", 1, " ".join(["a"] * 75))
    save(tmp_path, "over.png", 2, " ".join(["a"] * 74) + ", a the end")
    report = check(tmp_path, tiny)
    (text,) = found(report, "caption-cut")
    assert text.startswith("over.png: ") and text.endswith(" over, not seen: 'a the end'")
    assert found(check(tmp_path), "caption-cut") == []


def test_where_the_trigger_is_not_seen(tmp_path: Path, tiny: Any) -> None:
    captions = ["a zorblin", "the zorblin's hat", "Zorblin, again", "two zorblins", "a hat"]
    for seed, caption in enumerate(captions):
        save(tmp_path, f"{seed}.png", seed, caption)
    for base in (None, tiny):
        report = check(tmp_path, base, trigger="zorblin")
        assert found(report, "trigger-split") == ["3.png: 'two zorblins'"]
        assert found(report, "trigger-missing") == ["4.png: 'a hat'"]
    assert check(tmp_path).findings == ()
    assert check(tmp_path, trigger="zorblin", captions={"insert_trigger": True}).findings == ()


def test_a_trigger_that_drops_out_of_some_texts(tmp_path: Path) -> None:
    save(tmp_path, "a.png", 1, "red, zorblin, green, blue")
    report = check(tmp_path, trigger="zorblin", captions={"tag_dropout": 0.5})
    (text,) = found(report, "trigger-missing")
    assert text.startswith("a.png: ") and " of its " in text


def test_a_trigger_that_is_a_common_word(tmp_path: Path, tiny: Any) -> None:
    save(tmp_path, "a.png", 1, "a photo")
    assert found(check(tmp_path, tiny, trigger="photo"), "trigger-known") == [
        "'photo': is one token, among the more frequent half of all"
    ]
    assert found(check(tmp_path, tiny, trigger="zorblin"), "trigger-known") == []


@pytest.mark.parametrize(
    ("caption", "wildcards", "expected"),
    [
        ("a {red|blue} cat", True, set()),
        ("a {{plain}} brace", True, set()),
        ("a {red|blue cat", True, {"braces-unbalanced"}),
        ("a red} cat", True, {"braces-unbalanced"}),
        ("a {red|blue} cat", False, {"braces-plain"}),
        ("a {red} cat, }", False, set()),
    ],
)
def test_braces(tmp_path: Path, caption: str, wildcards: bool, expected: set[str]) -> None:
    save(tmp_path, "a.png", 1, caption)
    assert kinds(check(tmp_path, captions={"wildcards": wildcards})) == expected


def test_tags_are_counted_once_a_picture(tmp_path: Path) -> None:
    for seed, caption in enumerate(["dog, sitting, dog", "dog , grass", "dog"]):
        save(tmp_path, f"{seed}.png", seed, caption)
    assert check(tmp_path).tags == (("dog", 3), ("grass", 1), ("sitting", 1))


# --- epochs ------------------------------------------------------------------------------------------


def test_shares_of_an_epoch(tmp_path: Path) -> None:
    for seed in range(6):
        save(tmp_path / ("few" if seed < 2 else "many"), f"{seed}.png", seed)
    for seed in range(6, 9):
        save(tmp_path / "others", f"{seed}.png", seed)
    concepts = [{"folder": str(tmp_path / "few"), "repeats": 6}, {"folder": str(tmp_path / "many")}]
    report = check("", concepts=concepts, prior={"folder": str(tmp_path / "others"), "ratio": 0.5})
    assert [(s.name, s.pictures, s.repeats, s.draws, s.share, s.prior) for s in report.concepts] == [
        ("few", 2, 6, 12, 0.75, False),
        ("many", 4, 1, 4, 0.25, False),
        ("others", 3, 1, 8, 1.0, True),
    ]


@pytest.mark.parametrize(("rule", "expected"), [("keep", (3, 1, 0, 0)), ("drop", (2, 0, 1, 0)), ("fill", (3, 0, 0, 1))])
def test_short_batches(tmp_path: Path, rule: str, expected: tuple[int, int, int, int]) -> None:
    for seed in range(5):
        save(tmp_path, f"{seed}.png", seed, f"thing {seed}")
    report = check(tmp_path, training={"batch_size": 2}, buckets={"short_batches": rule})
    batches = report.batches
    assert batches is not None
    assert (batches.count, batches.short, batches.left_out, batches.drawn_again) == expected


def test_settings_that_leave_no_batch_are_an_error(tmp_path: Path) -> None:
    save(tmp_path, "a.png", 1)
    report = check(tmp_path, training={"batch_size": 2}, buckets={"short_batches": "drop"})
    assert found(report, "no-batch")[0].startswith("no shape has pictures enough for one batch")
    assert report.batches is None and not report.ok


def test_where_no_picture_is_left_the_reasons_are_told_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a")
    save(tmp_path, "b.png", 1, caption=None)
    report = check(tmp_path)
    assert kinds(report) == {"unreadable", "unusable"}
    assert (report.batches, report.shapes, report.concepts) == (None, (), ())


def test_resolutions(tmp_path: Path, tiny: Any) -> None:
    save(tmp_path, "a.png", 1)
    assumed, own = check(tmp_path, resolution=0), check(tmp_path, tiny, resolution=0)
    assert (assumed.resolutions, assumed.resolution_assumed) == ((512,), True)
    assert (own.resolutions, own.resolution_assumed) == ((128,), False)


def test_what_is_no_data_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        check(tmp_path / "missing")
    save(tmp_path, "a.png", 1)
    with pytest.raises(ConfigError, match="no square"):
        check(tmp_path, buckets={"min_side": 128})


# --- looking -----------------------------------------------------------------------------------------


def test_what_is_learnt_of_files_is_in_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_JUST_CHANGED_NS", 0)  # what has just changed is not remembered
    path = save(tmp_path, "a.png", photo(1, (90, 70)))
    report = check(tmp_path)
    with open_index(index_file(data_cache(DataSection()))) as index:
        facts = index.look_up(state_of(report.pictures[0].sample))
    assert facts is not None and facts.size == (90, 70)
    assert facts.sha256 == report.pictures[0].look.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


class Rows:
    """A table whose second row is damaged, and that tells in which order it was read."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def stamp(self, row: int) -> str:
        return ""

    def read(self, row: int) -> bytes:
        self.asked.append(row)
        if row == 1:
            raise DataError("table.parquet#1: has no picture")
        buffer = io.BytesIO()
        photo(row).save(buffer, "PNG")
        return buffer.getvalue()


@pytest.mark.parametrize("headers_only", [False, True])
def test_rows_of_a_table_are_read_once_in_their_order(tmp_path: Path, headers_only: bool) -> None:
    rows, concept = Rows(), Concept("table", ConceptSection())
    samples = [Sample(Path(f"table.parquet#{row}"), ("a",), concept, rows=rows, row=row) for row in range(20)]
    progress: list[tuple[int, int]] = []
    looks = look_at(
        samples,
        FileIndex(tmp_path / "index"),
        headers_only=headers_only,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert rows.asked == list(range(20))
    assert [look.problem for look in looks if look.problem] == ["table.parquet#1: has no picture"]
    assert all(bool(look.thumbnail) != headers_only for look in looks if not look.problem)
    assert progress[-1] == (20, 20)


def test_copies_of_what_is_held_out_are_no_leak(tmp_path: Path) -> None:
    for number in range(4):
        path = save(tmp_path, f"{number}.png", photo(number, (90, 70)))
        shutil.copy(path, tmp_path / f"copy{number}.png")
        shutil.copy(path.with_suffix(".txt"), tmp_path / f"copy{number}.txt")
    report = check(tmp_path, held_out=0.25)
    assert report.ok
    assert {picture.part for picture in report.pictures} == {"training", "validation"}
    assert len(report.pictures) < 8


def test_a_ratio_that_gives_no_whole_number_leaves_nothing_out(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "own", f"{number}.png", photo(number, (90, 70)))
        save(tmp_path / "others", f"{number}.png", photo(10 + number, (90, 70)))
    for ratio in (0.5, 0.333):  # 1.5 and, as a hundredth at most, 1 in the first epoch
        report = check(tmp_path / "own", prior={"folder": str(tmp_path / "others"), "ratio": ratio})
        assert report.batches is not None
        assert (report.batches.count, report.batches.left_out, report.batches.drawn_again) == (4, 0, 0)

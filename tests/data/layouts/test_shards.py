"""Shards: every picture's bytes in any order, captions, splits, and what is refused in which words."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from sdlora.config import ConceptSection
from sdlora.data.layouts import shards
from sdlora.data.layouts.listing import Listed
from sdlora.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
from shard_files import PICTURE, data, rows, write_arrow, write_tar  # noqa: E402  (it needs pyarrow)


def read(path: Path, **settings) -> tuple[list[Listed], list[str]]:
    """Return the pictures and the problems, without the folder's name in these."""
    problems: list[str] = []
    listing = shards.read(ConceptSection(folder=str(path), **settings), problems)
    (group,) = listing.groups
    root = path if path.is_dir() else path.parent
    return list(group.pictures), [problem.replace(f"{root}/", "") for problem in problems]


def refused(path: Path, **settings) -> str:
    with pytest.raises(DataError) as error:
        read(path, **settings)
    return str(error.value).replace(str(path if path.is_dir() else path.parent), "DIR")


def fetch(picture: Listed) -> bytes:
    assert picture.rows is not None
    return picture.rows.read(picture.row)


@pytest.fixture(params=["parquet", "arrow stream", "arrow file", "tar"])
def big(request, tmp_path) -> list[Listed]:
    """500 pictures in three shards, one of them empty of rows but for the archives."""
    for shard, numbers in enumerate((range(200), range(0), range(200, 500))):
        name = tmp_path / f"{shard}.{request.param.split()[0]}"
        if request.param == "parquet":
            pq.write_table(rows(numbers), name, row_group_size=70)
        elif request.param == "tar":
            if numbers:
                members = (
                    (f"{n:04}.png", data(n)) if end == "png" else (f"{n:04}.txt", f"a {n}")
                    for n in numbers
                    for end in ("png", "txt")
                )
                write_tar(name, dict(members))
        else:
            write_arrow(name, rows(numbers), request.param.endswith("stream"), size=90)
    pictures, problems = read(tmp_path)
    assert problems == []
    return pictures


def test_all_pictures_in_order(big):
    assert [picture.lines for picture in big] == [(f"a {n}",) for n in range(500)]
    assert [fetch(picture) for picture in big] == [data(n) for n in range(500)]


def test_pictures_in_any_order(big):
    order = random.Random(0).choices(range(500), k=300)
    assert [fetch(big[n]) for n in order] == [data(n) for n in order]


def test_pictures_backwards_and_again(big):
    for n in [*range(499, -1, -7), 3, 3, 4, 3]:
        assert fetch(big[n]) == data(n)


def test_several_threads_read_at_once(big):
    wrong = []

    def work(first: int) -> None:
        wrong.extend(n for n in range(first, 500, 3) if fetch(big[n]) != data(n))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_rows_are_called(tmp_path):
    pq.write_table(rows("ab"), tmp_path / "x.parquet")
    write_tar(tmp_path / "y.tar", {"sub/c.jpg": data("c"), "sub/c.txt": "c"})
    pictures, _ = read(tmp_path)
    assert [str(picture.path.relative_to(tmp_path)) for picture in pictures] == [
        "x.parquet#0",
        "x.parquet#1",
        "y.tar#sub/c",
    ]
    assert [picture.row for picture in pictures] == [0, 1, 2]
    assert len({id(picture.rows) for picture in pictures}) == 1


def test_reading_on_does_not_start_anew(tmp_path, monkeypatch):
    """A group of rows is read once where the rows rise, and a later one without those between."""
    pq.write_table(rows(range(1000)), tmp_path / "x.parquet", row_group_size=100)
    pictures, _ = read(tmp_path)
    asked: list[int] = []
    real = pq.ParquetFile.iter_batches

    def spy(self, batch_size, row_groups, columns):
        asked.extend(row_groups)
        assert columns == ["image"]
        return real(self, batch_size, row_groups=row_groups, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    for n in (0, 1, 9, 5, 99, 101, 850, 849, 999):
        assert fetch(pictures[n]) == data(n)
    assert asked == [0, 1, 8, 9]


# -- tables ---------------------------------------------------------------------------------------


def test_saved_data_sets_of_the_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})

    def saved(names: str) -> datasets.Dataset:
        columns = {"image": [{"bytes": data(n), "path": None} for n in names], "caption": [[n, "b"] for n in names]}
        return datasets.Dataset.from_dict(columns, features)

    saved("abcdefg").save_to_disk(tmp_path / "one", num_shards=2)
    write_arrow(tmp_path / "one" / "data-7.arrow", rows("x"))  # no part of it
    assert shards.recognises(tmp_path / "one")
    pictures, problems = read(tmp_path / "one")
    assert problems == []
    assert [(fetch(picture), picture.lines) for picture in pictures] == [(data(n), (n, "b")) for n in "abcdefg"]

    both = datasets.DatasetDict({"train": saved("ab"), "sample": saved("c"), "test": saved("d")})
    both.save_to_disk(tmp_path / "two")
    both["train"].to_parquet(tmp_path / "two" / "train" / "also.parquet")  # no part of it either
    for split, names in (("train", "ab"), ("sample", "c"), ("test", "d")):
        pictures, problems = read(tmp_path / "two", split=split)
        assert ([fetch(picture) for picture in pictures], problems) == ([data(n) for n in names], [])
    assert refused(tmp_path / "two", split="val") == (
        'DIR: has no split "val"; data.split must be one of "sample", "test", "train"'
    )


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        ({"picture": pa.array([data("a")])}, {}),
        ({"jpg": pa.array([data("a")], pa.large_binary()), "mask": pa.array([b"m"])}, {}),
        ({"x": pa.array([{"bytes": data("a")}]), "embedding": pa.array([b"m"])}, {}),
        ({"image": pa.array([{"bytes": b"i", "path": ""}]), "y": pa.array([data("a")])}, {"image_column": "y"}),
        ({"photo": pa.array([{"path": "", "bytes": data("a")}]), "second": pa.array([{"bytes": b"m"}])}, {}),
    ],
)
def test_which_column_holds_the_pictures(tmp_path, columns, settings):
    pq.write_table(pa.table({**columns, "n": [7], "text": ["a cat"]}), tmp_path / "x.parquet")
    (picture,), problems = read(tmp_path, **settings)
    assert (fetch(picture), picture.lines, problems) == (data("a"), ("a cat",), [])


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (
            {"url": ["u"], "text": ["t"]},
            {},
            'DIR/x.parquet: has no column of pictures (its columns: "url", "text"); data.image_column can name one',
        ),
        (
            {"a": [b"1"], "b": [b"2"]},
            {},
            'DIR/x.parquet: has several columns of pictures; data.image_column must be one of "a", "b"',
        ),
        (
            {"image": [b"1"]},
            {"image_column": "img"},
            'DIR/x.parquet: column "img" does not exist; data.image_column must be one of "image"',
        ),
        (
            {"image": [b"1"], "n": [1]},
            {"image_column": "n"},
            'DIR/x.parquet: column "n" holds no pictures; data.image_column must name one that does',
        ),
        (
            {"image": [b"1"], "label": [3]},
            {},
            'DIR/x.parquet: has no column of text (its columns: "label"); add one, or set data.caption',
        ),
        (
            {"image": [b"1"], "label": [3]},
            {"caption_column": "label"},
            'DIR/x.parquet: column "label" holds no text; data.caption_column must be one of "label"',
        ),
        (
            {"image": [b"1"], "short": ["s"], "long": ["l"]},
            {},
            'DIR/x.parquet: has several columns of text; data.caption_column must be one of "short", "long"',
        ),
    ],
)
def test_which_columns_are_refused(tmp_path, columns, settings, message):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert refused(tmp_path, **settings) == message


def test_captions_of_tables(tmp_path):
    texts = ["one", "", None, "two\nlines"]
    plain = rows("abcd", text=texts, n=[1, 2, 3, 4])
    pq.write_table(plain.append_column("prompt", [["w", "x", "y", "z"]]), tmp_path / "x.parquet")
    lists = pa.array([["a", None, "b"], [], None, ["c"]], pa.large_list(pa.large_string()))
    write_arrow(tmp_path / "y.arrow", rows("efgh", captions=lists))
    write_arrow(tmp_path / "z.arrow", rows("ij", caption=pa.array(["k", "k"]).dictionary_encode()))
    pictures, problems = read(tmp_path)
    assert problems == []
    assert [picture.lines for picture in pictures] == [
        *[("one",), ("",), None, ("two lines",)],
        *[("a", "b"), None, None, ("c",)],
        *[("k",), ("k",)],
    ]
    pictures, _ = read(tmp_path / "x.parquet", caption_column="prompt")
    assert [picture.lines for picture in pictures] == [("w",), ("x",), ("y",), ("z",)]
    pictures, _ = read(tmp_path, caption_from="instance")
    assert [picture.lines for picture in pictures] == [None] * 10


@pytest.mark.parametrize("end", ["parquet", "arrow"])
def test_pictures_that_are_only_named(tmp_path, end):
    """Their files lie beside the table; rows without a picture are problems, and the others keep their numbers."""
    (tmp_path / "set" / "more").mkdir(parents=True)
    (tmp_path / "set" / "more" / "b.png").write_bytes(data("b"))
    (tmp_path / "secret.png").write_bytes(data("secret"))
    cells = [
        {"bytes": data("a"), "path": "../secret.png"},
        {"bytes": None, "path": "more/b.png"},
        {"bytes": None, "path": "more/c.png"},
        {"bytes": None, "path": "../secret.png"},
        {"bytes": None, "path": str(tmp_path / "secret.png")},
        {"bytes": b"", "path": None},
        {"bytes": None, "path": None},
        None,
        {"bytes": data("i"), "path": None},
    ]
    table = pa.table({"image": pa.array(cells, PICTURE), "text": list("abcdefghi")})
    file = tmp_path / "set" / f"x.{end}"
    pq.write_table(table, file) if end == "parquet" else write_arrow(file, table)
    pictures, problems = read(tmp_path / "set")
    assert [(fetch(picture), picture.lines) for picture in pictures] == [(data(n), (n,)) for n in "abi"]
    assert problems == [
        *(
            f'x.{end}#{row}: column "image" holds only the name of a picture that is not there ({path}); remove the row'
            for row, path in enumerate(["more/c.png", "../secret.png", tmp_path / "secret.png"], 2)
        ),
        *(f'x.{end}#{row}: column "image" holds no picture; remove the row' for row in (5, 6, 7)),
    ]


def test_a_picture_that_is_missing_far_down_is_an_error_when_it_is_read(tmp_path):
    table = rows(range(20))
    cells = [*table["image"].to_pylist()[:19], None]
    pq.write_table(table.set_column(0, "image", pa.array(cells, PICTURE)), tmp_path / "x.parquet")
    pictures, problems = read(tmp_path)
    assert (fetch(pictures[18]), problems) == (data(18), [])
    with pytest.raises(DataError, match=r'x\.parquet#19: has no picture in column "image"; remove the row'):
        fetch(pictures[19])
    assert fetch(pictures[18]) == data(18)


def test_a_column_of_names_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(data("a"))
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "text": ["x", "y"]}), tmp_path / "x.parquet")
    (picture,), problems = read(tmp_path, image_column="image")
    assert (fetch(picture), picture.lines) == (data("a"), ("x",))
    assert problems == [
        'x.parquet#1: column "image" holds only the name of a picture that is not there (b.png); remove the row'
    ]


def test_a_table_without_rows_is_refused(tmp_path):
    pq.write_table(rows(""), tmp_path / "x.parquet")
    assert refused(tmp_path) == "DIR/x.parquet: holds no rows"


@pytest.mark.parametrize("end", ["parquet", "arrow"])
def test_damaged_tables(tmp_path, end):
    """One is a problem, all are an error; a picture that is lost later is an error that names its row."""
    write = pq.write_table if end == "parquet" else (lambda table, file: write_arrow(file, table, stream=False))
    write(rows("ab"), tmp_path / f"a.{end}")
    whole = (tmp_path / f"a.{end}").read_bytes()
    (tmp_path / f"b.{end}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / f"c.{end}").write_bytes(b"")
    pictures, problems = read(tmp_path)
    assert [fetch(picture) for picture in pictures] == [data("a"), data("b")]
    assert [problem.partition(" (")[0] for problem in problems] == [
        f"b.{end}: cannot be read",
        f"c.{end}: cannot be read",
    ]
    pictures, _ = read(tmp_path / f"a.{end}")
    (tmp_path / f"a.{end}").write_bytes(whole[:10])
    with pytest.raises(DataError, match=rf"a\.{end}: cannot be read"):
        fetch(pictures[1])
    assert refused(tmp_path).startswith(f"DIR/a.{end}: cannot be read (")


def test_a_damaged_page_does_not_end_the_program(tmp_path):
    """Bytes turned over anywhere in an Arrow or parquet file are a problem, an error or other data, never more."""
    for end in ("parquet", "arrow"):
        whole = tmp_path / f"whole.{end}"
        pq.write_table(rows(range(20)), whole) if end == "parquet" else write_arrow(whole, rows(range(20)))
        content = whole.read_bytes()
        for seed in range(80):
            broken = bytearray(content)
            draw = random.Random(seed)
            first = len(broken) * 4 // 5 if seed % 2 else 0  # what describes a parquet file is at its end
            for _ in range(8):
                broken[draw.randrange(first, len(broken))] = draw.randrange(256)
            file = tmp_path / f"broken.{end}"
            file.write_bytes(broken)
            try:
                for picture in read(file)[0]:
                    fetch(picture)
            except DataError as error:
                assert str(file) in str(error)


def test_tables_need_the_extra_and_archives_do_not(tmp_path, monkeypatch):
    pq.write_table(rows("a"), tmp_path / "a.parquet")
    write_tar(tmp_path / "b.tar", {"b.png": data("b"), "b.txt": "b"})
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    sentence = 'a.parquet: needs a package that is not installed: pip install "sdlora[datasets]"'
    assert refused(tmp_path / "a.parquet") == f"DIR/{sentence}"
    (picture,), problems = read(tmp_path)
    assert (fetch(picture), problems) == (data("b"), [sentence])


# -- archives -------------------------------------------------------------------------------------


def test_samples_of_archives(tmp_path):
    samples = {
        "./a.jpg": data("a"),
        "./a.txt": "\ufeff one \n\n two\n",
        "./a.json": "broken but not needed",
        "./._a.jpg": b"of a Mac",
        "./deep.er/b.JPEG": data("b"),
        "./deep.er/b.mask.png": b"mask",
        "./deep.er/b.txt": "",
        "c.webp": data("c"),
    }
    write_tar(tmp_path / "x.tar", samples)
    pictures, problems = read(tmp_path)
    assert problems == []
    assert [(fetch(picture), picture.lines) for picture in pictures] == [
        (data("a"), ("one", "two")),
        (data("b"), ("",)),
        (data("c"), None),
    ]


def test_an_archive_may_have_folders_and_links(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(data("a"))
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "b.png").symlink_to("/etc/hosts")
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(tmp_path / "in", "in " + "long" * 60)
    (picture,), problems = read(tmp_path / "x.tar")
    assert (fetch(picture), picture.lines, problems) == (data("a"), ("a",), [])


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({}, ("from txt",)),
        ({"caption_suffixes": (".tags", ".txt")}, ("from tags",)),
        ({"caption_column": "tags", "caption_suffixes": (".tags",)}, ("from tags",)),
        ({"caption_column": "prompt"}, ("from json",)),
        ({"caption_column": "many"}, ("1", "2")),
        ({"caption_from": "instance"}, None),
    ],
)
def test_where_captions_of_archives_come_from(tmp_path, settings, lines):
    sample = {"prompt": "from json", "url": "u", "many": ["1", "2"], "width": 3}
    members = {"a.json": json.dumps(sample), "a.png": data("a"), "a.tags": "from tags", "a.txt": "from txt"}
    write_tar(tmp_path / "x.tar", members)
    (picture,), problems = read(tmp_path, **settings)
    assert (picture.lines, problems) == (lines, [])


def test_captions_in_json_alone(tmp_path):
    said = [{"caption": "x", "url": "u"}, {"url": "u"}, {"caption": None}, {"caption": 3}, ["x"]]
    members = {}
    for n, value in enumerate(said):
        members |= {f"{n}.png": data(n), f"{n}.json": json.dumps(value)}
    write_tar(tmp_path / "x.tar", {**members, "5.png": data(5), "5.json": "{", "6.png": data(6)})
    pictures, problems = read(tmp_path)
    assert [fetch(picture) for picture in pictures] == [data(n) for n in range(7)]
    assert [picture.lines for picture in pictures] == [("x",), None, None, None, None, None, None]
    assert problems == [
        'x.tar: 3.json: "caption" is not text but int; make it text',
        "x.tar: 5.json is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); "
        "correct it",
    ]


def test_faulty_samples_are_problems_and_the_rest_is_read(tmp_path):
    members = {"a.png": data("a"), "a.txt": b"\xff", "b.txt": "b", "c.png": data("c"), "c.txt": "c", "b.png": data("b")}
    write_tar(tmp_path / "x.tar", members)
    pictures, problems = read(tmp_path)
    assert [(fetch(picture), picture.lines) for picture in pictures] == [
        (data("a"), None),
        (data("c"), ("c",)),
        (data("b"), None),
    ]
    assert problems == [
        "x.tar: a.txt is not UTF-8 ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte); "
        "save it as UTF-8",
        "x.tar: b (txt) has no picture directly before or after it; pack the files in the order of their names",
    ]


def test_a_setting_names_the_pictures_of_archives(tmp_path):
    write_tar(
        tmp_path / "x.tar", {"a.jpg": b"other", "a.Input.png": data("a"), "a.txt": "a", "b.jpg": b"x", "b.txt": "b"}
    )
    (picture,), problems = read(tmp_path, image_column="input.png")
    assert fetch(picture) == data("a")
    assert problems == [
        "x.tar: b (jpg, txt) has no picture directly before or after it; pack the files in the order of their names"
    ]
    assert refused(tmp_path, image_column="gif") == (
        'DIR/x.tar: holds no pictures in its first members; data.image_column = "gif" must be the ending of the '
        "pictures' names"
    )


def test_archives_that_are_refused(tmp_path):
    write_tar(tmp_path / "x.tar", {"a.2021.png": b"", "a.txt": "a"})
    assert refused(tmp_path).startswith(
        "DIR/x.tar: holds no pictures in its first members; what follows the first dot of their names must be one of .avif"
    )
    write_tar(tmp_path / "x.tar", {"a.png": data("a"), "a.cls": "3"})
    assert refused(tmp_path) == (
        'DIR/x.tar: has no column of text (its columns: "cls", "png"); add one, or set data.caption'
    )
    for content in (b"", b"not an archive" * 100):
        (tmp_path / "x.tar").write_bytes(content)
        assert refused(tmp_path).startswith("DIR/x.tar: cannot be read as a tar archive (")


def test_an_archive_that_was_damaged_or_cut_off(tmp_path):
    write_tar(tmp_path / "x.tar", {f"{n:03}.{end}": data(n) for n in range(100) for end in ("png", "txt")})
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: 1024 * 80 * 2 + 600])  # a member takes 1,024 bytes
    pictures, problems = read(tmp_path)
    assert len(pictures) == 80
    assert problems == ["x.tar: cannot be read to its end (080.png is cut off); fetch it again"]
    (tmp_path / "x.tar").write_bytes(whole[: 1024 * 120] + b"?" * 512 + whole[1024 * 120 + 512 :])
    found, problems = read(tmp_path)
    assert len(found) == 59
    assert problems == ["x.tar: cannot be read to its end (the header after 059 is damaged); fetch it again"]
    (tmp_path / "x.tar").write_bytes(whole[:5000])
    with pytest.raises(DataError, match=r"x\.tar#50: the archive ends within this picture; fetch it again"):
        fetch(pictures[50])


# -- folders --------------------------------------------------------------------------------------


def split_files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows([name]), root / name)
    return root


@pytest.mark.parametrize(
    ("names", "split", "taken"),
    [
        (["b.parquet", "a.parquet"], "train", ["a.parquet", "b.parquet"]),
        (["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"],
         "train", ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
        (["data/train-0.parquet", "data/my_split-00000-of-00001.parquet"], "my_split",
         ["data/my_split-00000-of-00001.parquet"]),
        (["train/0.parquet", "val/0.parquet", "x_test_1.parquet"], "validation", ["val/0.parquet"]),
        (["train/0.parquet", "val/0.parquet", "x_test_1.parquet"], "test", ["x_test_1.parquet"]),
        (["pretraining.parquet", "contest.parquet", ".cache/z.parquet", "cache-1.arrow.parquet", "metadata.parquet"],
         "train", ["contest.parquet", "pretraining.parquet"]),
    ],
)  # fmt: skip
def test_splits_are_in_the_names(tmp_path, names, split, taken):
    pictures, problems = read(split_files(tmp_path, *names), split=split)
    assert ([picture.lines for picture in pictures], problems) == ([(f"a {name}",) for name in taken], [])


def test_other_splits_are_mentioned_and_missing_ones_refused(tmp_path):
    split_files(tmp_path, "train/0.parquet", "test/0.parquet", "test/1.parquet")
    listing = shards.read(ConceptSection(folder=str(tmp_path)), [])
    assert listing.title == "shards (parquet)"
    assert listing.notes == ['only the split "train" is used; data.split can name another: test (2 files)']
    assert refused(tmp_path, split="dev") == 'DIR: has no split "dev"; data.split must be one of "test", "train"'


def test_one_file_is_taken_whatever_its_name(tmp_path):
    split_files(tmp_path, "test/0.parquet", "train/0.parquet")
    (picture,), _ = read(tmp_path / "test/0.parquet")
    assert picture.lines == ("a test/0.parquet",)


def test_what_is_recognised(tmp_path):
    split_files(tmp_path / "a", "x/0.parquet")
    assert shards.recognises(tmp_path / "a")
    assert shards.recognises(tmp_path / "a/x/0.parquet")
    (tmp_path / "a/x/1.JPG").touch()
    assert not shards.recognises(tmp_path / "a")  # pictures and, say, a backup of them
    split_files(tmp_path / "b", "metadata.parquet", ".x/0.parquet")
    assert not shards.recognises(tmp_path / "b")
    assert not shards.recognises(tmp_path / "none")
    assert refused(tmp_path / "b") == "DIR: holds no .arrow, .parquet, .tar files, which data.layout = 'shards' needs"


def test_a_program_ends_well_with_a_table_still_open(tmp_path):
    """The library's own streaming aborts or hangs here (github.com/apache/arrow/issues/45214)."""
    pq.write_table(rows(range(3000)), tmp_path / "x.parquet", row_group_size=100)
    code = (
        "import sys\n"
        "from sdlora.config import ConceptSection\n"
        "from sdlora.data.layouts import shards\n"
        "listing = shards.read(ConceptSection(folder=sys.argv[1]), [])\n"
        "picture = listing.groups[0].pictures[7]\n"
        "print(len(picture.rows.read(picture.row)), 'datasets' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "120 False\n", "")

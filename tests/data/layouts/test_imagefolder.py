"""The imagefolder layout: what its tables may say, which split is taken, and what is refused in which words."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sdlora.config import ConceptSection
from sdlora.data.layouts import imagefolder
from sdlora.data.layouts.listing import Listing
from sdlora.errors import DataError


def put(root: Path, *names: str) -> Path:
    """Write a file of each name; the layout opens no picture."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def table(root: Path, *rows: dict | str, name: str = "metadata.jsonl") -> Path:
    """Write rows, or lines as they are, into a table of JSON lines."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def read(root: Path, **settings) -> tuple[dict[str, tuple[str, ...] | None], list[str], Listing]:
    """Return the lines by picture, the problems without the folder's name, and the listing."""
    problems: list[str] = []
    listing = imagefolder.read(ConceptSection(folder=str(root), **settings), problems)
    (group,) = listing.groups
    assert group.settings.folder == str(root)
    pictures = {picture.path.relative_to(root).as_posix(): picture.lines for picture in group.pictures}
    assert all(picture.rows is None for picture in group.pictures)
    return pictures, [problem.replace(f"{root}/", "") for problem in problems], listing


def parquet(file: Path, columns: dict[str, list]) -> None:
    """Write a table of these columns; without pyarrow the test is left out."""
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table(columns), file)


def refused(root: Path, **settings) -> str:
    with pytest.raises(DataError) as error:
        read(root, **settings)
    return str(error.value).replace(str(root), "DIR")


def test_json_lines_name_pictures_in_the_folder_and_below(tmp_path):
    put(tmp_path, "a.png", "sub/deep/b.jpg", "c.webp")
    table(
        tmp_path,
        {"file_name": "a.png", "text": "a cat"},
        "",
        {"file_name": "./sub//deep/b.jpg", "text": "a dog ", "extra": {"n": 1}},
        {"file_name": "c.webp", "text": ["one", "", None, "two\n lines"]},
    )
    pictures, problems, listing = read(tmp_path)
    assert pictures == {"a.png": ("a cat",), "c.webp": ("one", "two lines"), "sub/deep/b.jpg": ("a dog",)}
    assert problems == []
    assert (listing.title, list(listing.notes)) == ("Hugging Face imagefolder", [])


def test_a_caption_may_be_empty_or_missing(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.png")
    table(
        tmp_path,
        {"file_name": "a.png", "text": ""},
        {"file_name": "b.png", "text": None},
        {"file_name": "c.png"},
        {"file_name": "d.png", "text": []},
        {"file_name": "e.png", "text": ["", " "]},
    )
    pictures, problems, _ = read(tmp_path)
    assert pictures == {"a.png": ("",), "b.png": None, "c.png": None, "d.png": None, "e.png": ("",)}
    assert problems == []


def test_csv_has_quotes_a_byte_order_mark_and_empty_cells(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.png")
    text = '\ufefffile_name,caption,label\r\na.png,"a cat, asleep",1\r\nb.png,"two\r\nlines",2\r\nc.png,,3\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    pictures, problems, _ = read(tmp_path)
    assert pictures == {"a.png": ("a cat, asleep",), "b.png": ("two lines",), "c.png": None}
    assert problems == []


def test_numbers_are_no_captions_of_a_csv_unless_there_are_words_too(tmp_path):
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,score,title\na.png,0.5,1984\nb.png,3,Brazil\n")
    assert read(tmp_path)[0] == {"a.png": ("1984",), "b.png": ("Brazil",)}


def test_a_comma_outside_quotes_is_a_problem(tmp_path):
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat, asleep\nb.png,a dog\n")
    pictures, problems, _ = read(tmp_path)
    assert pictures == {"a.png": None, "b.png": ("a dog",)}
    assert problems == [
        'metadata.csv, line 2: has more cells than the first line; put text that holds a comma in quotes ("...")'
    ]


def test_parquet_tables(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.png")
    columns = {"image_file_name": ["a.png", "b.png", "../c.png"], "n": [1, 2, 3], "prompt": ["a cat", None, "x"]}
    parquet(tmp_path / "metadata.parquet", columns)
    assert imagefolder.recognises(tmp_path)
    pictures, problems, _ = read(tmp_path)
    assert pictures == {"a.png": ("a cat",), "b.png": None, "c.png": None}
    assert problems == [
        "metadata.parquet, row 2: '../c.png' leads out of the table's folder; name a file in it or below"
    ]


def test_a_truncated_parquet_table_is_a_problem(tmp_path):
    put(tmp_path, "a.png")
    parquet(tmp_path / "whole.parquet", {"file_name": ["a.png"], "text": ["x"]})
    (tmp_path / "metadata.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-9])
    pictures, (problem,), _ = read(tmp_path)
    assert pictures == {"a.png": None}
    assert problem.startswith("metadata.parquet: is not a whole parquet file (")


def test_parquet_alone_needs_the_extra(tmp_path, monkeypatch):
    put(tmp_path, "a.png", "metadata.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(tmp_path) == (
        'DIR/metadata.parquet: needs a package that is not installed: pip install "sdlora[datasets]"; '
        "or save the table as metadata.jsonl"
    )
    (tmp_path / "metadata.parquet").unlink()
    table(tmp_path, {"file_name": "a.png", "text": "x"})
    assert read(tmp_path)[0] == {"a.png": ("x",)}


def test_each_subfolder_may_have_its_own_table(tmp_path):
    put(tmp_path, "cat/a.png", "dog/a.png", "dog/more/b.png", ".hidden/c.png")
    table(tmp_path / "cat", {"file_name": "a.png", "text": "a cat"})
    (tmp_path / "dog/metadata.csv").write_text("file_name,prompt\na.png,a dog\nmore/b.png,more dogs\n")
    table(tmp_path / ".hidden", "broken")
    pictures, problems, _ = read(tmp_path)
    assert pictures == {"cat/a.png": ("a cat",), "dog/a.png": ("a dog",), "dog/more/b.png": ("more dogs",)}
    assert problems == []


def test_rows_of_one_picture_are_alternatives(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.png")
    rows = [("a.png", "one"), ("a.png", "two"), ("b.png", "x"), ("a.png", "one"), ("b.png", None)]
    table(tmp_path, *({"file_name": name, "text": text} for name, text in rows))
    pictures, problems, listing = read(tmp_path)
    assert pictures == {"a.png": ("one", "two"), "b.png": ("x",), "c.png": None}
    assert problems == []
    assert listing.notes == [
        "2 pictures are named by more than one row, whose captions are alternatives",
        "1 picture is not named by any row",
    ]


def test_names_with_accents_are_found_in_either_spelling(tmp_path):
    put(tmp_path, "cafe\u0301.png")  # as a Mac writes it
    table(tmp_path, {"file_name": "caf\u00e9.png", "text": "x"})
    assert read(tmp_path)[0] == {"cafe\u0301.png": ("x",)}


def test_faulty_rows_are_problems_and_the_rest_is_read(tmp_path):
    put(tmp_path, "good.png", "notes.doc", "sub/b.png", "a-masklabel.png")
    rows = [
        '{"file_name": "good.png", "text": "a cat"',
        '["good.png"]',
        {"file_name": "none.png", "text": "x"},
        {"file_name": "/etc/a.png", "text": "x"},
        {"file_name": "sub/../../b.png", "text": "x"},
        {"file_name": "C:\\b.png", "text": "x"},
        {"file_name": "file:///b.png", "text": "x"},
        {"file_name": "sub", "text": "x"},
        {"file_name": "notes.doc", "text": "x"},
        {"file_name": None, "text": "x"},
        {"file_name": "a-masklabel.png", "text": "x"},
        {"file_name": "sub\\b.png", "text": 7},
        {"file_name": "good.png", "text": "fine"},
    ]
    pictures, problems, _ = read(table(tmp_path, *rows))
    assert pictures == {"good.png": ("fine",), "sub/b.png": None}
    out, no_picture = "leads out of the table's folder; name a file in it or below", "is not a picture that is read"
    assert problems == [
        "metadata.jsonl, line 1: is not JSON (Expecting ',' delimiter: line 1 column 42 (char 41)); "
        "correct or remove it",
        'metadata.jsonl, line 2: is not an object such as {"file_name": "1.png"}; correct it',
        "metadata.jsonl, line 3: none.png is not there; correct the name, or remove the row",
        f"metadata.jsonl, line 4: '/etc/a.png' {out}",
        f"metadata.jsonl, line 5: 'sub/../../b.png' {out}",
        f"metadata.jsonl, line 6: 'C:\\\\b.png' {out}",
        f"metadata.jsonl, line 7: 'file:///b.png' {out}",
        f"metadata.jsonl, line 8: sub {no_picture}; correct the name, or remove the row",
        f"metadata.jsonl, line 9: notes.doc {no_picture}; correct the name, or remove the row",
        'metadata.jsonl, line 10: has no text in column "file_name"; name the picture\'s file there',
        f"metadata.jsonl, line 11: a-masklabel.png {no_picture}; correct the name, or remove the row",
        'metadata.jsonl, line 12: column "text" is not text but int; put the caption in quotes',
    ]


def test_text_that_is_not_utf_8_is_a_problem_of_its_line(tmp_path):
    put(tmp_path, "a.png", "b.png")
    lines = [
        '\ufeff{"file_name": "a.png", "text": "é"}'.encode(),
        '{"file_name": "b.png", "text": "é"}'.encode("latin"),
    ]
    (tmp_path / "metadata.jsonl").write_bytes(b"\r\n".join(lines))
    pictures, (problem,), _ = read(tmp_path)
    assert pictures == {"a.png": ("é",), "b.png": None}
    assert problem.startswith("metadata.jsonl, line 2: is not JSON ('utf-8' codec")
    (tmp_path / "metadata.jsonl").rename(tmp_path / "metadata.csv")
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,é\n".encode("latin"))
    pictures, (problem,), _ = read(tmp_path)
    assert problem.startswith("metadata.csv: cannot be read ('utf-8' codec")


def test_nested_brackets_do_not_end_the_program(tmp_path):
    put(tmp_path, "a.png")
    table(tmp_path, '{"file_name": ' + "[" * 100_000, {"file_name": "a.png", "text": "x"})
    pictures, (problem,), _ = read(tmp_path)
    assert pictures == {"a.png": ("x",)}
    assert problem.startswith("metadata.jsonl, line 1: is not JSON (")


def test_an_empty_table_is_a_problem(tmp_path):
    put(tmp_path, "a.png", "metadata.csv")
    pictures, problems, _ = read(tmp_path)
    assert pictures == {"a.png": None}
    assert problems == ["metadata.csv: holds no rows; write one for each picture, or remove the file"]


@pytest.mark.parametrize(
    ("columns", "settings", "lines"),
    [
        ({"caption": "c", "text": "t", "prompt": "p"}, {}, ("t",)),
        ({"Prompt": "p", "source": "s"}, {}, ("p",)),
        ({"alt": "a", "width": 8}, {}, ("a",)),
        ({"caption": "c", "text": "t"}, {"caption_column": "caption"}, ("c",)),
        ({"text": 3, "alt": "a"}, {}, ("a",)),
        ({"mask_file_name": "m.png", "alt": "a"}, {}, ("a",)),
        ({"a": "1", "b": "2"}, {"caption_from": "instance"}, None),
        ({"a": "1", "b": "2"}, {"caption_from": "filename"}, None),
        ({"width": 8}, {"caption": "a cat"}, None),
    ],
)
def test_which_column_holds_the_captions(tmp_path, columns, settings, lines):
    put(tmp_path, "a.png")
    table(tmp_path, {"file_name": "a.png", **columns})
    pictures, problems, _ = read(tmp_path, **settings)
    assert (pictures, problems) == ({"a.png": lines}, [])


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (
            {"alt": "a", "title": "t", "n": 1},
            {"caption": "x"},
            'DIR/metadata.jsonl: has several columns of text; data.caption_column must be one of "alt", "title"',
        ),
        (
            {"n": 1},
            {},
            'DIR/metadata.jsonl: has no column of text (its columns: "n"); add one, or set data.caption',
        ),
        (
            {"text": "t"},
            {"caption_column": "txt"},
            'DIR/metadata.jsonl: column "txt" does not exist; data.caption_column must be one of "text"',
        ),
        (
            {"n": 1, "text": "t"},
            {"caption_column": "n"},
            'DIR/metadata.jsonl: column "n" holds no text; data.caption_column must be one of "text"',
        ),
        (
            {"text": "t"},
            {"image_column": "photo"},
            'DIR/metadata.jsonl: column "photo" does not exist; data.image_column must be one of "file_name", "text"',
        ),
    ],
)
def test_which_columns_are_refused(tmp_path, columns, settings, message):
    put(tmp_path, "a.png")
    table(tmp_path, {"file_name": "a.png", **columns})
    assert refused(tmp_path, **settings) == message


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"file_names": ["a.png"], "text": "x"}, '"file_names", "text"'),
        ({"mask_file_name": "a.png", "text": "x"}, '"mask_file_name", "text"'),
        ({"path": "a.png"}, '"path"'),
    ],
)
def test_the_names_of_the_pictures_have_their_column(tmp_path, row, found):
    put(tmp_path, "a.png")
    table(tmp_path, row)
    assert refused(tmp_path) == (
        f'DIR/metadata.jsonl: has no column "file_name" or "image_file_name" (its columns: {found}); '
        "rename the one that names the pictures, or set data.image_column"
    )


@pytest.mark.parametrize("column", ["photo", "photo_file_name"])
def test_a_setting_names_the_column_of_the_pictures(tmp_path, column):
    put(tmp_path, "a.png", "b.png")
    table(tmp_path, {"file_name": "b.png", "photo_file_name": "a.png", "text": "x"})
    assert read(tmp_path, image_column=column)[0] == {"a.png": ("x",), "b.png": None}


def test_splits_are_folders_and_the_others_are_mentioned(tmp_path):
    put(tmp_path, "train/a.png", "train/b.png", "test/c.png", "val/d.png", "val/e.png")
    table(tmp_path / "train", {"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": "b"})
    table(tmp_path / "test", {"file_name": "c.png", "text": "c"}, "broken")
    table(tmp_path / "val", {"file_name": "d.png", "text": "d"}, {"file_name": "e.png", "text": "e"})
    pictures, problems, listing = read(tmp_path)
    assert pictures == {"train/a.png": ("a",), "train/b.png": ("b",)}
    assert problems == []
    assert listing.notes == [
        'only the split "train" is used; data.split can name another: test (1 picture), validation (2 pictures)'
    ]
    assert read(tmp_path, split="validation")[0] == read(tmp_path, split="val")[0]
    assert read(tmp_path, split="validation")[0] == {"val/d.png": ("d",), "val/e.png": ("e",)}
    assert refused(tmp_path, split="held") == (
        'DIR: has no split "held"; data.split must be one of "test", "train", "validation"'
    )


def test_one_table_above_the_splits(tmp_path):
    put(tmp_path, "a.png", "train/b.png", "test/c.png", "held/d.png")
    table(
        tmp_path, *({"file_name": name, "text": name} for name in ("a.png", "train/b.png", "test/c.png", "held/d.png"))
    )
    assert read(tmp_path)[0] == {name: (name,) for name in ("a.png", "held/d.png", "train/b.png")}
    pictures, problems, listing = read(tmp_path, split="held")
    assert (pictures, problems) == ({"held/d.png": ("held/d.png",)}, [])
    assert listing.notes == [
        'only the split "held" is used; data.split can name another: train (2 pictures), test (1 picture)'
    ]


def test_what_is_recognised(tmp_path):
    assert not imagefolder.recognises(put(tmp_path / "plain", "cat/a.png", "dog/b.png"))
    assert not imagefolder.recognises(tmp_path / "missing")
    assert imagefolder.recognises(
        table(put(tmp_path / "below", "x/a.png"), {"file_name": "a.png"}, name="x/metadata.jsonl")
    )
    foreign = put(tmp_path / "foreign", "a.png")
    (foreign / "metadata.csv").write_text("id,title\n1,a\n")
    assert not imagefolder.recognises(foreign)
    assert not imagefolder.recognises(table(tmp_path / "hidden", {"file_name": "a.png"}, name=".x/metadata.jsonl"))


def test_a_folder_without_tables_or_without_pictures_is_refused(tmp_path):
    assert refused(put(tmp_path / "a", "a.png")) == (
        "DIR: holds no metadata.jsonl, metadata.csv, metadata.parquet, which data.layout = 'imagefolder' needs"
    )
    assert refused(table(tmp_path / "b", {"file_name": "a.png"})) == (
        "DIR: holds metadata.jsonl but no pictures; put them beside it"
    )

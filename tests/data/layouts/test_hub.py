"""Data sets on the Hugging Face Hub. A folder of this machine stands in for one; nothing is contacted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from sdlora.config import ConceptSection
from sdlora.data.layouts import hub
from sdlora.data.layouts.listing import Listing
from sdlora.errors import DataError

load = pytest.importorskip("datasets.load")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
from shard_files import PICTURE, data, rows, write_tar  # noqa: E402  (it needs pyarrow)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The folder that stands in for "owner/name"."""
    real = load.load_dataset_builder

    def local(name: str, cache_dir: str):
        assert name == "owner/name"
        assert Path(cache_dir).is_dir()
        return real(str(tmp_path), cache_dir=cache_dir)

    monkeypatch.setattr(load, "load_dataset_builder", local)
    return tmp_path


def failing(monkeypatch, error: Exception) -> None:
    def fail(name: str, cache_dir: str):
        raise error

    monkeypatch.setattr(load, "load_dataset_builder", fail)


def read(name: str = "owner/name", **settings) -> tuple[list[tuple], list[str], Listing]:
    """Return the name, bytes and lines of every picture, the problems, and the listing."""
    problems: list[str] = []
    listing = hub.read(ConceptSection(folder=name, **settings), problems)
    (group,) = listing.groups
    found = [(str(picture.path), picture.rows.read(picture.row), picture.lines) for picture in group.pictures]
    return found, problems, listing


def refused(**settings) -> str:
    with pytest.raises(DataError) as error:
        read(**settings)
    return str(error.value)


DOWNLOAD = "download it (hf download owner/name --repo-type dataset --local-dir FOLDER) and name the folder"


def test_only_ids_are_recognised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.recognises(Path("lambdalabs/naruto-blip-captions"))
    assert hub.recognises(Path("owner/name.v2"))
    Path("pictures/cat").mkdir(parents=True)
    others = ["name", "a/b/c", "/owner/name", "./../name", "~/name", "-a/b", "owner/config.toml", "owner/x.parquet"]
    local = ["pictures/cat", "pictures/dog"]  # the second is a mistake within a folder that is there
    assert [name for name in others + local if hub.recognises(Path(name))] == []


def test_parquet_files(place):
    (place / "data").mkdir()
    pq.write_table(rows("ab"), place / "data/train-00000-of-00002.parquet", row_group_size=1)
    pq.write_table(rows("c", text=["x"], n=[1]), place / "data/train-00001-of-00002.parquet")
    pq.write_table(rows("d"), place / "data/test-00000-of-00001.parquet")
    found, problems, listing = read()
    assert problems == []
    assert [(content, lines) for _, content, lines in found] == [
        (data("a"), ("a a",)),
        (data("b"), ("a b",)),
        (data("c"), ("x",)),
    ]
    assert found[1][0] == "owner/name/train-00000-of-00002.parquet#1"
    assert listing.title == "Hugging Face dataset (parquet)"
    assert listing.notes == ['only the split "train" is used; data.split can name "test"']
    assert [content for _, content, _ in read(split="test")[0]] == [data("d")]
    assert refused(split="dev") == 'owner/name: has no split "dev"; data.split must be one of "train", "test"'


def test_names_in_a_table_lead_nowhere(place):
    """A data set of somebody else never has files of this machine read."""
    (place / "b.txt").write_text("secret")
    cells = [{"bytes": data("a"), "path": None}, {"bytes": None, "path": str(place / "b.txt")}]
    table = rows("ab")
    pq.write_table(table.set_column(0, "image", pa.array(cells, PICTURE)), place / "train.parquet")
    assert refused() == 'owner/name/train.parquet#1: has no picture in column "image"; remove the row'


def test_archives(place):
    write_tar(place / "x.tar", {"a.png": data("a"), "a.txt": "a", "b.png": data("b"), "c.png": data("c"), "c.txt": "c"})
    found, problems, listing = read()
    assert problems == []
    assert found == [
        ("owner/name/x.tar#a", data("a"), ("a",)),
        ("owner/name/x.tar#b", data("b"), None),
        ("owner/name/x.tar#c", data("c"), ("c",)),
    ]
    assert listing.title == "Hugging Face dataset (webdataset)"


def test_pictures_with_a_table(place):
    (place / "train").mkdir()
    for name in "ba":
        Image.new("RGB", (4, 4)).save(place / f"train/{name}.png")
    table = [{"file_name": "b.png", "text": "a dog", "n": 1}, {"file_name": "a.png", "text": None, "n": 2}]
    (place / "train/metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    found, problems, listing = read()
    content = (place / "train/a.png").read_bytes()
    assert found == [("owner/name/b.png", content, ("a dog",)), ("owner/name/a.png", content, None)]
    assert (problems, listing.title) == ([], "Hugging Face dataset (imagefolder)")


def test_pictures_alone_need_a_caption(place):
    for name in "ab":
        Image.new("RGB", (4, 4)).save(place / f"{name}.png")
    assert refused() == 'owner/name: has no column of text (its columns: "image"); add one, or set data.caption'
    found, _, _ = read(caption="a cat")
    assert [(name, lines) for name, _, lines in found] == [("owner/name/a.png", None), ("owner/name/b.png", None)]


def test_other_kinds_are_refused(place):
    (place / "x.csv").write_text("url,text\nu,t\n")
    assert refused() == (
        "owner/name: is stored as csv, of which no pictures can be read from the Hub "
        f"(parquet, WebDataset and imagefolder can); {DOWNLOAD}"
    )


def test_several_threads_fetch_at_once(place):
    pq.write_table(rows(range(90)), place / "train.parquet", row_group_size=20)
    pictures = hub.read(ConceptSection(folder="owner/name"), []).groups[0].pictures
    wrong = []

    def work(first: int) -> None:
        wrong.extend(n for n in range(first, 90, 2) if pictures[n].rows.read(n) != data(n))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_offline(monkeypatch):
    """The library itself says so, as the tests run with HF_HUB_OFFLINE=1."""
    assert refused() == (
        "owner/name: there is no such folder, and the Hugging Face Hub cannot be reached (Couldn't reach 'owner/name' "
        "on the Hub (OfflineModeIsEnabled)); correct data.folder, go online and unset HF_HUB_OFFLINE, or " + DOWNLOAD
    )


def test_missing_and_gated(monkeypatch):
    from datasets.exceptions import DatasetNotFoundError

    failing(monkeypatch, DatasetNotFoundError("Dataset 'owner/name' is a gated dataset on the Hub.\nmore"))
    assert refused() == (
        "owner/name: there is no such folder, and no such data set on the Hugging Face Hub that may be read (Dataset "
        "'owner/name' is a gated dataset on the Hub.); correct data.folder, or set HF_TOKEN to a token with access"
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            ValueError("Config name is missing.\nPlease pick one: ['a']"),
            "Config name is missing. Please pick one: ['a']",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), "Dataset scripts are no longer supported"),
        (FileNotFoundError("No (supported) data files found"), "No (supported) data files found"),
    ],
)
def test_what_the_library_cannot_open(monkeypatch, error, reason):
    failing(monkeypatch, error)
    assert refused() == f"owner/name: cannot be read from the Hugging Face Hub ({reason}); {DOWNLOAD}"


def test_a_lost_connection_is_an_error_that_names_the_row(place, monkeypatch):
    import httpx2

    pq.write_table(rows("ab"), place / "train.parquet")
    pictures = hub.read(ConceptSection(folder="owner/name"), []).groups[0].pictures

    def lost(url: str, ahead: int):
        raise httpx2.ConnectError("no route")

    monkeypatch.setattr(hub, "_open", lost)
    with pytest.raises(DataError, match=r"owner/name/train\.parquet.*no route"):
        pictures[1].rows.read(1)


def test_the_layout_must_have_an_id():
    assert refused(name="a/b/c") == 'a/b/c: is no id of a data set; data.layout = "hub" needs "owner/name"'


def test_the_library_is_as_it_was(place):
    from datasets.utils import are_progress_bars_disabled, logging

    pq.write_table(rows("a"), place / "train.parquet")
    before = logging.get_verbosity(), are_progress_bars_disabled()
    read()
    refused(split="x")
    assert (logging.get_verbosity(), are_progress_bars_disabled()) == before


def test_a_folder_called_datasets_is_not_taken_for_the_library(tmp_path):
    """The checkout has one. Nor is anything left in the Hub's cache folder."""
    (tmp_path / "datasets").mkdir()
    code = (
        "from sdlora.config import ConceptSection\n"
        "from sdlora.data.layouts import hub\n"
        "from sdlora.errors import DataError\n"
        "try:\n"
        "    hub.read(ConceptSection(folder='owner/name'), [])\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    home = tmp_path / "home"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the Hugging Face Hub cannot be reached" in done.stdout
    assert not home.exists()


def test_without_the_library_the_folder_is_not_taken_for_it_either(tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    for name in [name for name in sys.modules if name.split(".")[0] == "datasets"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert refused() == (
        'owner/name: needs a package that is not installed: pip install "sdlora[datasets]"; '
        "or correct data.folder where it should be a folder"
    )

import hashlib
import os
import sqlite3
import time
from pathlib import Path

import pytest
from forked import at_once, needs_fork
from PIL import Image

from sdlora.config import ConceptSection
from sdlora.data import index as index_module
from sdlora.data.index import FileIndex, PictureFacts, content_hash, learn_facts, open_index, state_of
from sdlora.data.sample import Concept, Sample

CONCEPT = Concept("cats", ConceptSection())


@pytest.fixture(autouse=True)
def long_ago(monkeypatch):
    """Files that a test has just written count as written long ago, but where the test sets this."""
    monkeypatch.setattr(index_module, "_JUST_CHANGED_NS", 0)


def picture(path: Path, size=(6, 4), orientation=1, old=True) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, "red").save(path, exif=exif)
    if old:
        os.utime(path, (1e9, 1e9))
    return path


def known(path, index):
    return index.look_up(state_of(Sample(path, ("x",), CONCEPT)))


def learn(paths, index):
    problems: list[str] = []
    return learn_facts([Sample(path, ("x",), CONCEPT) for path in paths], index, problems), problems


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_facts_are_the_content_and_the_upright_size(tmp_path):
    paths = [picture(tmp_path / "a.png"), picture(tmp_path / "b.jpg", (60, 40), orientation=6)]
    with open_index(tmp_path / "i") as index:
        facts, problems = learn(paths, index)
    assert facts == [PictureFacts(sha256(paths[0]), 6, 4), PictureFacts(sha256(paths[1]), 40, 60)]
    assert facts[1].size == (40, 60) and problems == []


def test_what_is_known_is_not_read_again_until_the_file_changes(tmp_path, monkeypatch):
    path = picture(tmp_path / "a.png")
    with open_index(tmp_path / "i") as index:
        before, _ = learn([path], index)
    with monkeypatch.context() as patch, open_index(tmp_path / "i") as index:
        patch.setattr(index_module, "_facts_of_file", lambda *_: pytest.fail("read again"))
        assert learn([path], index)[0] == before
    picture(path, (9, 9))
    os.utime(path, (1e9 + 1, 1e9 + 1))
    with open_index(tmp_path / "i") as index:
        assert learn([path], index)[0] == [PictureFacts(sha256(path), 9, 9)]


def test_a_file_changed_a_moment_ago_is_not_remembered(tmp_path, monkeypatch):
    # The same size and, on a coarse clock, the same time: only reading tells that it is another picture.
    monkeypatch.setattr(index_module, "_JUST_CHANGED_NS", 2_000_000_000)
    path = picture(tmp_path / "a.png", old=False)
    now = time.time()
    os.utime(path, (now, now))
    with open_index(tmp_path / "i") as index:
        first, _ = learn([path], index)
        Image.new("RGB", (6, 4), "blue").save(path.with_name("b.png"))
        assert known(path, index) is None
        path.write_bytes(path.with_name("b.png").read_bytes())
        os.utime(path, (now, now))
        second, _ = learn([path], index)
    assert first != second


def test_two_files_that_change_places_are_noticed(tmp_path):
    # As from an archive, with equal sizes and times.
    red, blue = picture(tmp_path / "a.bmp"), tmp_path / "b.bmp"
    Image.new("RGB", (6, 4), "blue").save(blue)
    os.utime(blue, (1e9, 1e9))
    with open_index(tmp_path / "i") as index:
        before, _ = learn([red, blue], index)
        red.rename(tmp_path / "x.bmp")
        blue.rename(red)
        (tmp_path / "x.bmp").rename(blue)
        after, _ = learn([red, blue], index)
    assert after == before[::-1] and before[0] != before[1]


class Rows:
    """A table of pictures that counts how often it is read."""

    def __init__(self, data, version):
        self.data, self.version, self.reads = data, version, 0

    def read(self, row):
        self.reads += 1
        return self.data[row]

    def stamp(self, row):
        return f"{self.version}#{row}" if self.version else ""


@pytest.mark.parametrize(("version", "reads"), [("table 1", 2), ("", 4)])
def test_rows_are_remembered_as_long_as_their_table_is_the_same(tmp_path, version, reads):
    rows = Rows([picture(tmp_path / f"{n}.png", (n + 1, 4)).read_bytes() for n in range(2)], version)
    samples = [Sample(Path(f"t#{n}"), ("x",), CONCEPT, rows=rows, row=n) for n in range(2)]
    found = []
    for _ in range(2):
        with open_index(tmp_path / "i") as index:
            found.append(learn_facts(samples, index, []))
    assert found[0] == found[1] and [fact.size for fact in found[0]] == [(1, 4), (2, 4)]
    assert rows.reads == reads


def test_a_name_that_is_no_text_is_no_obstacle(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    try:
        picture(path)
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    with open_index(tmp_path / "i") as index:
        assert learn([path], index)[0][0].size == (6, 4)
        assert known(path, index)


def test_files_that_cannot_be_read_are_all_named(tmp_path):
    good = picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "c.jpg").write_bytes(b"")
    with open_index(tmp_path / "i") as index:
        facts, problems = learn([good, tmp_path / "b.png", tmp_path / "c.jpg", tmp_path / "gone.png"], index)
    assert [fact is not None for fact in facts] == [True, False, False, False]
    assert [name in problem for name, problem in zip(("b.png", "c.jpg", "gone.png"), problems, strict=True)] == [
        True
    ] * 3


def test_masks_are_remembered_too(tmp_path):
    mask = picture(tmp_path / "a-masklabel.png")
    with open_index(tmp_path / "i") as index:
        assert content_hash(mask, index) == sha256(mask)
        assert known(mask, index) is not None


@pytest.mark.parametrize("content", [b"", b"no database" * 1000])
def test_a_damaged_index_is_made_anew(tmp_path, content):
    (tmp_path / "i").write_bytes(content)
    with open_index(tmp_path / "i") as index:
        learn([picture(tmp_path / "a.png")], index)
    with open_index(tmp_path / "i") as index:
        assert known(tmp_path / "a.png", index) is not None


def test_without_a_place_for_the_index_nothing_is_remembered_but_all_works(tmp_path):
    (tmp_path / "file").write_text("")
    index = FileIndex(tmp_path / "file" / "i")
    assert learn([picture(tmp_path / "a.png")], index)[0][0].size == (6, 4)
    index.close()


def test_an_index_that_another_process_holds_is_not_thrown_away(tmp_path, monkeypatch):
    path = picture(tmp_path / "a.png")
    with open_index(tmp_path / "i") as index:
        learn([path], index)
    other = sqlite3.connect(tmp_path / "i", isolation_level=None)
    other.execute("PRAGMA journal_mode = DELETE")
    other.execute("BEGIN EXCLUSIVE")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda file, timeout=0.05: connect(file, timeout=min(timeout, 0.05)))
    with open_index(tmp_path / "i") as index:
        assert learn([path], index)[0][0].size == (6, 4)
    other.execute("ROLLBACK")
    other.close()
    with open_index(tmp_path / "i") as index:
        assert known(path, index) is not None


@needs_fork
def test_processes_may_use_it_at_once(tmp_path):
    for number in range(60):
        picture(tmp_path / f"{number}.png", (number + 1, 4))

    def learn_all():
        samples = [Sample(path, ("x",), Concept("c", ConceptSection())) for path in sorted(tmp_path.glob("*.png"))]
        problems = []
        with open_index(tmp_path / "index") as index:
            print(len([fact for fact in learn_facts(samples, index, problems) if fact]), problems)

    assert at_once([learn_all, learn_all], tmp_path) == ["60 []\n"] * 2
    with open_index(tmp_path / "index") as index:
        assert all(known(path, index) for path in tmp_path.glob("*.png"))

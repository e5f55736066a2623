import json
import os
import sqlite3
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial

import pytest
from forked import at_once, needs_fork
from PIL import Image

from sdlora.errors import ConfigError, FormatError, OutputError
from sdlora.generation.history import index as history_module
from sdlora.generation.history import query
from sdlora.generation.history.index import INDEX_NAME, History, history_of
from sdlora.generation.history.ratings import RATINGS_NAME
from sdlora.generation.pictures.files import save_picture
from sdlora.generation.recipe import UsedAdapter

DAY = datetime(2026, 11, 22, 12)
PICTURE = Image.new("RGB", (8, 8))


@pytest.fixture
def save(recipe, tmp_path):
    """`save(name, **changes)`: a picture with that recipe, each an hour later than the one before."""
    saved = []

    def write(name, **changes):
        changed = replace(recipe, **changes)
        path = save_picture(PICTURE, changed, tmp_path / name)
        when = (DAY + timedelta(hours=len(saved))).timestamp()
        os.utime(path, (when, when))
        saved.append(path)
        return path, changed

    return write


@pytest.fixture
def history(save, tmp_path):
    """Three pictures, one in a subfolder."""
    save("a.png", prompt="A red Ball, naïve café", seed=1, adapters=())
    save("sub/b.webp", prompt="a blue cat under redwood", seed=2**32 - 1, base="other", base_sha256="99" * 32)
    save(
        "c.jpg",
        prompt="猫が赤い帽子をかぶる ball",
        negative_prompt="ugly cat",
        seed=3,
        adapters=(UsedAdapter("My Cat", "12" * 32, "34" * 32, 0.5),),
    )
    found = History(tmp_path)
    found.refresh()
    return found


@pytest.mark.parametrize(
    ("since", "until", "found"),
    [
        (datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59), 3),
        (datetime(9999, 12, 31), None, 0),
        (DAY.astimezone() + timedelta(minutes=1), DAY + timedelta(minutes=61), 1),
    ],
)
def test_any_moments_are_searched(history, since, until, found):
    assert len(history.search(since=since, until=until)) == found


def test_a_file_of_a_far_time_is_known(history, save):
    path, _ = save("future.png", prompt="later")
    os.utime(path, ns=(0, 2**63 + 10**9))
    if path.stat().st_mtime_ns < 2**63:
        pytest.skip("this file system has no such times")
    history.refresh()
    assert names(history.search("later")) == ["future.png"]


def names(entries):
    return [entry.path.name for entry in entries]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, ["c.jpg", "b.webp", "a.png"]),
        ({"prompt": "ball"}, ["c.jpg", "a.png"]),
        ({"prompt": "RED"}, ["b.webp", "a.png"]),  # redwood begins so
        ({"prompt": "wood"}, []),
        ({"prompt": "red, ball!"}, ["a.png"]),
        ({"prompt": "_ - ball ?", "negative_prompt": " "}, ["c.jpg", "a.png"]),
        ({"prompt": "NAIVE cafe"}, ["a.png"]),
        ({"prompt": "赤い"}, ["c.jpg"]),  # no spaces between words
        ({"prompt": "赤い ball"}, ["c.jpg"]),
        ({"prompt": 'ball" OR cat* NEAR(a) -x prompt:'}, []),
        ({"prompt": "cat"}, ["b.webp"]),
        ({"negative_prompt": "cat"}, ["c.jpg"]),
        ({"adapter": "zor"}, ["b.webp"]),
        ({"adapter": "my cat"}, ["c.jpg"]),
        ({"adapter": "121212"}, ["c.jpg"]),
        ({"adapter": "34" * 32}, ["c.jpg"]),
        ({"adapter": "none"}, []),
        ({"adapter": "zor", "prompt": "cat", "rating": 0}, ["b.webp"]),
        ({"adapter": "zor", "prompt": "ball"}, []),
        ({"base": "OTHER"}, ["b.webp"]),
        ({"base": "ababab"}, ["c.jpg", "a.png"]),
        ({"seed": 2**32 - 1}, ["b.webp"]),
        ({"since": DAY + timedelta(minutes=30)}, ["c.jpg", "b.webp"]),
        ({"until": DAY + timedelta(minutes=30)}, ["a.png"]),
        ({"since": DAY, "until": DAY}, ["a.png"]),
        ({"limit": 1}, ["c.jpg"]),
        ({"limit": 1, "offset": 1}, ["b.webp"]),
        ({"limit": None, "offset": 2}, ["a.png"]),
        ({"rating": 0}, ["c.jpg", "b.webp", "a.png"]),
        ({"rating": 1}, []),
        ({"prompt": "ball", "adapter": "cat", "seed": 3, "base": "dreamy"}, ["c.jpg"]),
    ],
)
@pytest.mark.parametrize("many_uses", [query._MANY_USES, 1], ids=["listed", "looked up"])
def test_search(history, monkeypatch, many_uses, asked, found):
    monkeypatch.setattr(query, "_MANY_USES", many_uses)
    assert names(history.search(**asked)) == found


def test_an_entry_tells_what_is_shown(history, tmp_path):
    (entry,) = history.search(adapter="my cat")
    assert entry.path == tmp_path / "c.jpg" and entry.made == DAY + timedelta(hours=2)
    assert (entry.program, entry.seed, entry.steps, entry.width, entry.base) == ("sdlora", 3, 20, 24, "dreamy")
    assert [tuple(adapter) for adapter in entry.adapters] == [("My Cat", 0.5)]
    assert entry.prompt == "猫が赤い帽子をかぶる ball" and entry.stars == 0


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"limit": 0}, "limit is 0; expected 1 or more"),
        ({"offset": -1}, "offset is -1; expected 0 or more"),
        ({"rating": 6}, "rating is 6; expected 1 to 5"),
        ({"since": DAY, "until": DAY - timedelta(days=1)}, "is later than until"),
        ({"prompt": "a" * 2000}, "is too long"),
        ({"prompt": "_"}, "a search for '_' has no letter or digit to look for; give a word, or leave it out"),
        ({"negative_prompt": "(!)"}, r"a search for '\(!\)' has no letter"),
    ],
)
def test_what_makes_no_sense_is_refused(history, asked, sentence):
    with pytest.raises(ConfigError, match=sentence):
        history.search(**asked)


def test_what_was_just_saved_is_found_without_looking_at_the_folder(save, tmp_path):
    history = History(tmp_path)
    history.add(*save("a.png", prompt="one"))
    assert names(history.search("one")) == ["a.png"]
    history.add(*save("b.png", prompt="one"))
    assert names(history.search("one")) == ["b.png", "a.png"]
    with pytest.raises(FormatError, match="lies outside of"):
        history.add(tmp_path.parent / "c.png", save("c.png")[1])


def test_only_new_and_changed_pictures_are_read(history, save, tmp_path, monkeypatch):
    read = []
    real = history_module.read_row
    monkeypatch.setattr(history_module, "read_row", lambda path, place: read.append(path.name) or real(path, place))
    history.refresh()
    assert read == []
    save("new.png", prompt="something new")
    (tmp_path / "a.png").unlink()
    save_picture(PICTURE, save("x.png")[1], tmp_path / "c.jpg", replace=True)
    seen = []
    history.refresh(lambda done, count: seen.append((done, count)))
    assert sorted(read) == ["c.jpg", "new.png", "x.png"] and seen == [(3, 3)]
    assert names(history.search("something")) == ["new.png"]
    assert "a.png" not in names(history.search()) and history.count() == 4
    history.rebuild()
    assert len(read) == 7 and history.count() == 4


def test_pictures_of_others_and_files_that_are_none(save, tmp_path):
    comment = 'a strange dog <lora:foo:0.5>\nSteps: 9, Sampler: Euler, Seed: 99999999999999999999, Lora hashes: "foo: 0123456789ab"'
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + comment.encode("utf-16-be")
    PICTURE.save(tmp_path / "theirs.jpg", exif=exif)
    PICTURE.save(tmp_path / "bare.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    history = History(tmp_path)
    history.refresh()
    (entry,) = history.search()
    assert (entry.program, entry.prompt, entry.seed) == ("AUTOMATIC1111", "a strange dog", 99999999999999999999)
    assert (
        names(history.search(seed=99999999999999999999))
        == names(history.search(adapter="0123456789abcdef"))
        == ["theirs.jpg"]
    )
    assert history.count() == 1


# --- ratings ------------------------------------------------------------------------------------------


def test_ratings_outlive_the_index_and_new_names(history, tmp_path):
    history.rate(tmp_path / "a.png", 4)
    history.rate(tmp_path / "sub" / "b.webp", 2)
    assert [(entry.path.name, entry.stars) for entry in history.search(rating=1)] == [("b.webp", 2), ("a.png", 4)]
    assert names(history.search(rating=3)) == ["a.png"] and names(history.search(rating=0)) == ["c.jpg"]
    for file in tmp_path.glob(f"{INDEX_NAME}*"):
        file.unlink()
    (tmp_path / "a.png").rename(tmp_path / "sub" / "renamed.png")
    again = History(tmp_path)
    again.rebuild()
    assert [(entry.path.name, entry.stars) for entry in again.search(rating=3)] == [("renamed.png", 4)]
    again.rate(tmp_path / "sub" / "renamed.png", 0)
    assert names(again.search(rating=1)) == ["b.webp"]


def test_a_line_that_was_cut_off_costs_nothing_else(history, tmp_path):
    history.rate(tmp_path / "a.png", 4)
    with (tmp_path / RATINGS_NAME).open("ab") as file:
        file.write(b'{"picture": "')
    assert names(history.search(rating=4)) == ["a.png"]
    history.rate(tmp_path / "c.jpg", 5)
    assert names(History(tmp_path).search(rating=4)) == ["c.jpg", "a.png"]
    (tmp_path / RATINGS_NAME).write_bytes(b"nonsense\n[1]\n{}\n" + b'{"picture": "x", "stars": 9}\n' * 9)
    history.rebuild()
    assert history.search(rating=1) == []


def test_what_cannot_be_rated_is_refused(history, tmp_path):
    for stars in (-1, 6):
        with pytest.raises(ConfigError, match=f"a rating is {stars}; expected 1 to 5"):
            history.rate(tmp_path / "a.png", stars)
    PICTURE.save(tmp_path / "bare.png")
    with pytest.raises(FormatError, match=r"bare\.png: tells nothing.*so there is nothing by which its rating"):
        history.rate(tmp_path / "bare.png", 3)
    with pytest.raises(FormatError, match="cannot be read"):
        history.rate(tmp_path / "gone.png", 3)
    (tmp_path / RATINGS_NAME).mkdir()
    with pytest.raises(OutputError, match="nothing was rated"):
        history.rate(tmp_path / "a.png", 3)


def test_a_picture_knows_its_history(history, tmp_path):
    assert history_of(tmp_path / "sub" / "b.webp").folder == tmp_path
    other = tmp_path.parent / f"{tmp_path.name}-other"
    other.mkdir()
    assert history_of(other / "x.png").folder == other


# --- the index ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["nonsense", "cut", "other tables", "older", "odd facts"])
def test_a_damaged_or_older_index_is_made_again(history, tmp_path, damage):
    file = tmp_path / INDEX_NAME
    if damage == "nonsense":
        file.write_bytes(b"nonsense" * 1000)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:6000])
    else:
        with sqlite3.connect(file) as connection:
            if damage == "other tables":
                connection.execute("DROP TABLE uses")
            elif damage == "older":
                connection.execute("PRAGMA user_version = 77")
            else:
                connection.execute("UPDATE pictures SET facts = '{\"odd\": 1}'")
        connection.close()
    again = History(tmp_path)
    again.refresh()
    assert names(again.search("ball")) == ["c.jpg", "a.png"] and names(again.search(adapter="zorb")) == ["b.webp"]


def test_a_folder_that_cannot_be_written_is_searched_all_the_same(history, tmp_path, monkeypatch):
    real = sqlite3.connect

    def refuse(place, *arguments, **options):
        if place != ":memory:":
            raise OSError("read-only")
        return real(place, *arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", refuse)
    other = History(tmp_path)
    assert names(other.search("ball")) == ["c.jpg", "a.png"]


def test_no_such_folder(tmp_path):
    with pytest.raises(FormatError, match="there is no such folder"):
        History(tmp_path / "nowhere").refresh()
    assert not (tmp_path / "nowhere").exists()


@needs_fork
def test_two_processes_may_write_at_once(recipe, tmp_path):
    def write(first):
        history = History(tmp_path)
        for number in range(15):
            made = replace(recipe, seed=first + number)
            path = save_picture(Image.new("RGB", (8, 8)), made, tmp_path / "same.png")
            history.add(path, made)
            history.rate(path, 1 + number % 5)
            history.refresh()

    at_once([partial(write, 1000), partial(write, 2000)], tmp_path)
    history = History(tmp_path)
    found = history.search(limit=None)
    assert sorted(entry.seed for entry in found) == [*range(1000, 1015), *range(2000, 2015)]
    assert sorted(entry.stars for entry in found) == sorted([1, 2, 3, 4, 5] * 6)
    history.rebuild()
    assert {(entry.path, entry.seed, entry.stars) for entry in history.search(limit=None)} == {
        (entry.path, entry.seed, entry.stars) for entry in found
    }
    assert len((tmp_path / RATINGS_NAME).read_text().splitlines()) == 30
    assert all(json.loads(line)["stars"] for line in (tmp_path / RATINGS_NAME).read_text().splitlines())

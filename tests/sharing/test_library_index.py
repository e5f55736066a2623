"""What a library reads again, and that its index is never in the way."""

import json
import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from library_files import DOGS, folder, library, make, names

from sdlora.errors import ConfigError, FormatError
from sdlora.sharing import library as module
from sdlora.sharing.library import AdapterLibrary
from sdlora.storage import cache_folder, sha256_of_file

__all__ = ["folder", "library"]


def read_files(library, monkeypatch, **options):
    """Return the names of the files whose headers, and of those that are read whole, in a refresh."""
    headers, whole = [], []
    with monkeypatch.context() as context:
        real_header, real_hashes = module.read_file, module.hashes_of
        context.setattr(module, "read_file", lambda path, *rest: headers.append(path.name) or real_header(path, *rest))
        context.setattr(module, "hashes_of", lambda path: whole.append(path.name) or real_hashes(path))
        library.refresh(**options)
    return sorted(headers), sorted(whole)


# --- what is read again --------------------------------------------------------------------------------


def test_only_what_changed_is_read_again(library, folder, monkeypatch):
    assert read_files(library, monkeypatch) == ([], [])
    make(folder / "dogs" / "v1.safetensors", {**DOGS, "ss_output_name": "new"}, value=3.0)
    make(folder / "birds.safetensors", {}, value=4.0)
    (folder / "copied.safetensors").unlink()
    assert read_files(library, monkeypatch) == (["birds.safetensors", "v1.safetensors"],) * 2
    assert [len(entry.paths) for entry in library.search()] == [1, 1, 1]
    assert names(library.search("new")) == ["dogs/v1"]
    assert read_files(AdapterLibrary(folder), monkeypatch) == ([], [])  # another process knows it too


def test_a_renamed_file_keeps_its_identity_without_being_hashed_again(library, folder, monkeypatch):
    cats = library.find("cats/v1")
    (folder / "cats").rename(folder / "kittens")
    headers, whole = read_files(library, monkeypatch)
    assert (headers, whole) == (["v1.safetensors"], [])
    assert library.find(cats.id).paths == [folder / "copied.safetensors", folder / "kittens" / "v1.safetensors"]


def test_a_new_file_under_the_number_of_a_deleted_one_is_another_file(library, folder):
    """As systems give it, here by writing into a renamed one, of one size and date."""
    path, other = folder / "dogs" / "v1.safetensors", folder / "dogs" / "v2.safetensors"
    state = path.stat()
    path.rename(other)
    make(folder / "new.safetensors", DOGS, value=5.0)
    other.write_bytes((folder / "new.safetensors").read_bytes())
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    now = other.stat()
    assert (now.st_size, now.st_ino, now.st_mtime_ns) == (state.st_size, state.st_ino, state.st_mtime_ns)
    (folder / "new.safetensors").unlink()
    library.refresh()
    assert library.find("dogs/v2").id == sha256_of_file(other)


@pytest.mark.parametrize("written", [False, True])
def test_files_of_one_size_and_date_are_told_apart(library, folder, written):
    """Whether they change places or one is written over the other."""
    first, second = folder / "a.safetensors", folder / "b.safetensors"
    for path, value in ((first, 7.0), (second, 8.0)):
        make(path, DOGS, value=value)
        os.utime(path, ns=(10**18, 10**18))
    library.refresh()
    if written:
        data = second.read_bytes()
        second.write_bytes(first.read_bytes())
        first.write_bytes(data)
        for path in (first, second):
            os.utime(path, ns=(10**18, 10**18))
    else:
        first.rename(folder / "c")
        second.rename(first)
        (folder / "c").rename(second)
    library.refresh()
    for path in (first, second):
        assert library.find(path.stem).id == sha256_of_file(path)


def test_a_question_that_cannot_be_answered_costs_nothing(library, index, monkeypatch):
    from sdlora.sharing import library_query

    before = index.read_bytes()
    expected = library.search()
    words = " ".join(f"{number}" for number in range(250))
    with pytest.raises(ConfigError, match="the search has 250 different words; expected at most 100"):
        library.search(words)
    monkeypatch.setattr(library_query, "_MOST_WORDS", 10_000)
    monkeypatch.setattr(library_query, "_LONGEST_TEXT", 10_000)
    with pytest.raises(FormatError, match=r"the index cannot answer that .*; ask for less") as error:
        library.search(" ".join(map(str, range(2000))))
    assert "\n" not in str(error.value)
    assert index.read_bytes() == before and library.search() == expected


def test_files_from_the_far_future_are_listed(library, folder, monkeypatch):
    from sdlora.adapters import folders

    monkeypatch.setattr(folders, "_kept", lambda ns, kept=folders._kept: kept(ns * 10))
    library.rebuild()
    assert len(library.search()) == 2 and json.dumps(library.search()[0].to_json())


def test_headers_alone_are_listed_without_hashes_until_these_are_wanted(folder, monkeypatch):
    library = AdapterLibrary(folder)
    library.refresh(hashes=False)
    assert [entry.id for entry in library.search("cats")] == ["", ""]
    assert library.find("dogs/v1").autov3 == ""
    assert library.search(hash="e3b0c442") == []
    assert len(read_files(library, monkeypatch)[1]) == 3
    assert len(library.search("cats")) == 1


def test_progress_counts_the_files_that_are_read(folder):
    seen = []
    library = AdapterLibrary(folder)
    library.refresh(lambda done, count: seen.append((done, count)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    seen.clear()
    library.refresh(lambda done, count: seen.append((done, count)))
    assert seen == []


def test_what_was_hashed_before_an_interruption_stays(folder, monkeypatch):
    library, real = AdapterLibrary(folder), module.hashes_of

    def interrupted(path):
        if path.parent.name == "dogs":
            raise KeyboardInterrupt
        return real(path)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(module, "hashes_of", interrupted)
        library.refresh()
    assert len(library.search("cats")[0].paths) == 2
    assert len(read_files(library, monkeypatch)[1]) == 1


def test_what_the_system_refused_is_tried_again(folder, monkeypatch):
    path = folder / "dogs" / "v1.safetensors"
    library = AdapterLibrary(folder)
    with monkeypatch.context() as context:
        real = type(path).open

        def refused(self, *arguments, **options):
            if self == path:
                raise PermissionError(13, "Permission denied")
            return real(self, *arguments, **options)

        context.setattr(type(path), "open", refused)
        library.refresh()
        assert "cannot be read (Permission denied)" in library.refused()[0].problem
    library.refresh()
    assert len(library.search()) == 2


def test_a_file_that_changes_while_it_is_hashed_is_not_taken_for_what_it_was(folder, monkeypatch):
    library, real = AdapterLibrary(folder), module.hashes_of
    path = folder / "dogs" / "v1.safetensors"

    def changing(file):
        found = real(file)
        if file == path:
            make(path, {}, value=9.0)
        return found

    with monkeypatch.context() as context:
        context.setattr(module, "hashes_of", changing)
        library.refresh()
    assert library.find("dogs/v1").id == ""
    library.refresh()
    assert library.find("dogs/v1").id == sha256_of_file(path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "nowhere", tmp_path / "file", "x" * 5000):
        with pytest.raises(FormatError, match="there is no such folder"):
            AdapterLibrary(place).refresh()


# --- the index -----------------------------------------------------------------------------------------


@pytest.fixture
def index(library):
    """The index file, and that nothing of it is in the library's folder."""
    assert not [file for file in library.folder.rglob("*") if "sqlite" in file.name]
    (file,) = (cache_folder() / "libraries").glob("*.sqlite")
    return file


def table_of_another_version(file):
    with sqlite3.connect(file) as connection:
        connection.execute("DROP TABLE files")
        connection.execute("CREATE TABLE files (something INTEGER)")
        connection.execute("PRAGMA user_version = 12345")


def the_right_version_of_the_wrong_table(file):
    with sqlite3.connect(file) as connection:
        connection.execute("ALTER TABLE files RENAME COLUMN tags TO labels")


def facts_that_are_no_json(file):
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE files SET facts = 'x'")


def facts_of_another_make(file):
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE files SET facts = '{\"title\": 3}'")


def damaged_pages(file):
    data = bytearray(file.read_bytes())
    for start in range(4096, len(data), 4096):
        data[start : start + 2000] = os.urandom(2000)
    file.write_bytes(data)


DAMAGE = {
    "gone": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "no database": lambda file: file.write_bytes(b"hello" * 3000),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:5000]),
    "pages": damaged_pages,
    "a folder": lambda file: (file.unlink(), file.mkdir(), (file / "x").write_text("")),
    "another version": table_of_another_version,
    "another table": the_right_version_of_the_wrong_table,
    "no JSON": facts_that_are_no_json,
    "other facts": facts_of_another_make,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("refreshed", [False, True])
def test_a_damaged_index_is_made_again_without_a_word(library, folder, index, damage, refreshed, capsys):
    expected = [entry.to_json() for entry in library.search()]
    DAMAGE[damage](index)
    again = AdapterLibrary(folder)
    if refreshed:
        again.refresh()
    elif damage in ("gone", "empty", "another version"):
        return  # what was never read is not there; nothing was damaged
    assert [entry.to_json() for entry in again.search()] == expected
    again.refresh()
    assert [entry.to_json() for entry in again.search()] == expected
    assert len(again.refused()) == 1
    assert capsys.readouterr() == ("", "")


def test_rebuilding_reads_all_files(library, monkeypatch):
    expected = library.search()
    read = []
    real = module.read_file
    monkeypatch.setattr(module, "read_file", lambda path, *rest: read.append(path.name) or real(path, *rest))
    library.rebuild()
    assert len(read) == 4 and library.search() == expected


def test_a_cache_that_cannot_be_written_is_no_obstacle(folder, monkeypatch):
    monkeypatch.setenv("SDLORA_CACHE", os.devnull + "/none")
    library = AdapterLibrary(folder)
    library.refresh()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: names(library.search("cat")), range(20))) == [["cats/v1"]] * 20
    library.rebuild()
    assert library.find("grey cats").autov3


def test_the_index_may_be_named(folder, tmp_path):
    AdapterLibrary(folder, tmp_path / "mine.sqlite").refresh()
    assert names(AdapterLibrary(folder, tmp_path / "mine.sqlite").search("zorb")) == ["cats/v1"]


def test_listing_needs_no_torch(folder):
    code = (
        "import sys; from sdlora.sharing.library import AdapterLibrary\n"
        "library = AdapterLibrary(sys.argv[1]); library.refresh(); found = library.search('zorb')\n"
        "sys.exit(len(found) != 1 or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0


def test_processes_share_an_index_while_files_change(folder, tmp_path):
    """Each refreshes, searches and begins anew again and again; none fails, and all know all files in the end."""
    for number in range(40):
        make(folder / f"{number}.safetensors", {"ss_output_name": f"number {number}"}, value=10.0 + number)
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from sdlora.sharing.library import AdapterLibrary\n"
        "for turn in range(6):\n"
        "    library = AdapterLibrary(sys.argv[1], Path(sys.argv[2]))\n"
        "    if turn == 3 and sys.argv[3] == '0': library.rebuild()\n"
        "    library.refresh()\n"
        "    library.search('number')\n"
        "    if turn == 2 and sys.argv[3] == '1': Path(sys.argv[2]).write_bytes(b'damaged' * 1000)\n"
        "ended = [Path(sys.argv[2]).with_name(f'ended{n}') for n in range(3)]\n"
        "ended[int(sys.argv[3])].touch()\n"
        "while not all(path.exists() for path in ended): time.sleep(0.01)\n"  # nobody begins anew any more
        "library.refresh()\n"
        "print(len(library.search('number')), all(entry.id for entry in library.search()))\n"
    )
    arguments = [sys.executable, "-c", code, str(folder), str(tmp_path / "shared.sqlite")]
    running = [
        subprocess.Popen([*arguments, str(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert (out, err, process.returncode) == ("40 True\n", "", 0)

"""`sdlora dataset`: its help, and the cache."""

import os
from pathlib import Path

import pytest
import torch

from sdlora.cli.main import main
from sdlora.config import DataSection
from sdlora.data.cache_folder import data_cache
from sdlora.data.store import TensorStore


@pytest.fixture
def cache() -> Path:
    folder = data_cache(DataSection())
    for name, age in (("a", 1e9), ("b", 1.2e9)):
        store = TensorStore(folder / "pictures" / f"{name * 16}")
        with store.writing() as writer:
            writer.add(name, torch.ones(250_000))  # 1 MB
        (path,) = store.paths_in_use()
        os.utime(path, (age, age))
    (folder / "files.sqlite3").write_bytes(b"")
    (folder / "class-pictures" / "x").mkdir(parents=True)
    picture = folder / "class-pictures" / "x" / "00000.png"
    picture.write_bytes(b"1234567")
    os.utime(picture, (1e9, 1e9))
    return folder


def test_the_cache_is_measured(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", "cache"]) == 0
    assert capsys.readouterr().out == f"{cache}: 3 files, 2.0 MB\n"


def test_the_cache_is_cleared(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", "cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"removed 3 files, 2.0 MB\n{cache}: 0 files, 0 bytes\n"
    assert not list(cache.rglob("*.safetensors"))


def test_the_cache_is_cut_to_a_size(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", "cache", "--limit-gb", "0.0015"]) == 0
    assert capsys.readouterr().out.startswith("removed 1 files")
    assert [path.parent.name for path in cache.rglob("*.safetensors")] == ["b" * 16]  # the one used later


def test_another_folder_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", "cache", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 0 files, 0 bytes\n"


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["dataset", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("check", "caption", "cache"))

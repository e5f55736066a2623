import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forked import at_once, needs_fork

from sdlora.data import store as store_module
from sdlora.data.cache_folder import CacheSize, clear_cache, measure_cache, trim_cache
from sdlora.data.store import TensorStore, Together
from sdlora.errors import DataError, OutputError

STORE = "0123456789abcdef"


def filled(folder, **tensors):
    """A new store of the folder, after another one has written `tensors` to a shard."""
    writing = TensorStore(folder)
    with writing.writing() as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return TensorStore(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_one_process_writes_another_reads(tmp_path, dtype):
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    store = filled(tmp_path, a=tensor, b=tensor + 1)
    assert store.find(["a", "b", "c"]) == {"a", "b"}
    assert torch.equal(store.read("b"), tensor + 1)
    assert store.read("a").dtype == dtype
    store.read("a").zero_()  # what is read is the reader's own
    assert torch.equal(store.read("a"), tensor)


def test_what_was_written_can_be_read_at_once(tmp_path):
    store = TensorStore(tmp_path)
    with store.writing() as writer:
        writer.add("a", torch.ones(3))
    assert torch.equal(store.read("a"), torch.ones(3))
    assert store.find(["a"]) == {"a"}


def test_an_interruption_loses_nothing_that_was_added(tmp_path):
    with pytest.raises(KeyboardInterrupt), TensorStore(tmp_path).writing() as writer:
        writer.add("a", torch.ones(3))
        raise KeyboardInterrupt
    assert TensorStore(tmp_path).find(["a"]) == {"a"}


def test_a_shard_is_written_when_it_is_full_or_old_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_SHARD_BYTES", 100)
    store = TensorStore(tmp_path)
    with store.writing() as writer:
        for number in range(6):
            writer.add(str(number), torch.full((10,), float(number)))  # 40 bytes
        assert len(list(tmp_path.glob("*.safetensors"))) == 2
        monkeypatch.setattr(store_module, "_SECONDS_UNTIL_WRITTEN", 0.0)
        time.sleep(0.01)
        writer.add("late", torch.ones(1))
        assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert TensorStore(tmp_path).find([*map(str, range(6)), "late"]) == {*map(str, range(6)), "late"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign", "header"])
def test_a_damaged_shard_is_removed_and_counts_as_missing(tmp_path, damage):
    filled(tmp_path, a=torch.ones(100))
    filled(tmp_path, b=torch.zeros(100))
    paths = {
        name: next(p for p in tmp_path.glob("*.safetensors") if f'"{name}"' in str(p.read_bytes()[:80]))
        for name in "ab"
    }
    data = bytearray(paths["a"].read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    elif damage == "truncate":
        del data[-7:]
    elif damage == "header":
        data[8] ^= 255
    paths["a"].write_bytes({"empty": b"", "foreign": b"<html>"}.get(damage, bytes(data)))
    store = TensorStore(tmp_path)
    assert store.find(["a", "b"]) == {"b"}
    assert store.damaged == 1
    assert not paths["a"].exists() and paths["b"].exists()
    assert TensorStore(tmp_path).find(["a", "b"]) == {"b"}


def test_a_file_that_is_being_written_is_left_alone(tmp_path):
    folder = tmp_path / "pictures" / STORE
    store = filled(folder, a=torch.ones(1))
    half = folder / ".writing-abc.safetensors"
    half.write_bytes(b"half")
    store.find(["a"])
    clear_cache(tmp_path)
    assert half.exists() and store.damaged == 0
    os.utime(half, (0, 0))  # by a process killed long ago
    clear_cache(tmp_path)
    assert not half.exists()


def test_a_shard_that_vanishes_is_told_in_a_sentence(tmp_path):
    store = filled(tmp_path / "pictures" / STORE, a=torch.ones(3))
    store.find(["a"])
    clear_cache(tmp_path, force=True)
    with pytest.raises(DataError, match="was removed or cut short while it was in use; start again"):
        store.read("a")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/cache: encoded pictures .* set data\.cache\.folder"):
        TensorStore(tmp_path / "file" / "cache")


def test_several_threads_read(tmp_path):
    store = filled(tmp_path, **{str(n): torch.full((1000,), float(n)) for n in range(50)})
    store.find([str(n) for n in range(50)])
    with ThreadPoolExecutor(4) as pool:
        read = pool.map(lambda n: (n, store.read(str(n))), [n % 50 for n in range(500)])
        assert all(torch.equal(tensor, torch.full((1000,), float(n))) for n, tensor in read)


def test_the_work_is_divided_without_rest():
    items = list(range(11))
    parts = [Together(rank, 3).part(items) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == items


def test_what_other_processes_should_have_written_is_missed(tmp_path):
    with pytest.raises(DataError, match=r"1 entries .* must be a folder that all processes share"):
        filled(tmp_path, a=torch.ones(1)).require(["a", "b"])


@needs_fork
def test_processes_that_fill_a_store_at_once_do_not_disturb_each_other(tmp_path):
    def fill():
        store = TensorStore(tmp_path / "store")
        for n in range(40):
            if not store.find([str(n)]):
                with store.writing() as writer:
                    writer.add(str(n), torch.full((100,), float(n)))
        print(sum(float(store.read(str(n))[0]) for n in range(40)), store.damaged)

    assert at_once([fill, fill], tmp_path) == ["780.0 0\n"] * 2


# --- size --------------------------------------------------------------------------------------------


def aged(cache, name, hours):
    """A shard that was last used so many hours ago."""
    store = filled(cache / "pictures" / f"{int(hours):016x}", **{name: torch.full((250,), float(hours))})
    store.find([name])
    (path,) = store.paths_in_use()
    then = time.time() - hours * 3600
    os.utime(path, (then, then))
    return path


def test_the_least_recently_used_goes_first_and_what_is_needed_stays(tmp_path):
    old, older, oldest, new = (aged(tmp_path, "abcd"[n], hours) for n, hours in enumerate((5, 10, 20, 0)))
    each = old.stat().st_size
    assert measure_cache(tmp_path) == CacheSize(4, 4 * each)
    assert trim_cache(tmp_path, 4 * each) == CacheSize(0, 0)
    assert trim_cache(tmp_path, 3 * each, keep={oldest}) == CacheSize(1, each)
    assert [p.exists() for p in (old, older, oldest, new)] == [True, False, True, True]
    assert trim_cache(tmp_path, 0) == CacheSize(2, 2 * each)
    assert new.exists()  # in use by some process
    assert clear_cache(tmp_path).files == 0 and new.exists()
    assert clear_cache(tmp_path, force=True) == CacheSize(1, each)
    assert measure_cache(tmp_path) == CacheSize(0, 0)


def test_nothing_of_anybody_else_is_touched(tmp_path):
    shard = aged(tmp_path, "a", 50)
    others = [
        tmp_path / "adapter.safetensors",
        tmp_path / "pictures" / "model.safetensors",
        tmp_path / "checkpoints" / "0123456789abcdef" / f"{'0' * 32}.safetensors",
        shard.with_name("mine.safetensors"),
        tmp_path / "class-pictures" / "x" / "holiday.png",
    ]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"precious")
        os.utime(path, (0, 0))
    assert trim_cache(tmp_path, 0).files == 1
    assert clear_cache(tmp_path, force=True).files == 0
    store = TensorStore(shard.parent)
    store.find(["a"])
    assert store.damaged == 0 and all(path.exists() for path in others)


def test_reading_keeps_all_shards_of_a_run_young(tmp_path, monkeypatch):
    path = aged(tmp_path, "a", 50)
    other = filled(path.parent, b=torch.ones(9))
    (waiting,) = set(path.parent.glob("*.safetensors")) - {path}
    other.find(["a", "b"])
    assert time.time() - path.stat().st_mtime < 60
    for shard in (path, waiting):
        os.utime(shard, (0, 0))
    other.read("a")
    assert path.stat().st_mtime == 0  # not at every read
    monkeypatch.setattr(store_module, "_SECONDS_BETWEEN_TOUCHES", 0.0)
    other.read("a")
    assert min(time.time() - shard.stat().st_mtime for shard in (path, waiting)) < 60
    assert waiting.stat().st_mtime > 0


def test_a_shard_that_cannot_be_opened_now_is_not_thrown_away(tmp_path, monkeypatch):
    filled(tmp_path, a=torch.ones(3))
    real = Path.open

    def refuse(self, *arguments, **options):
        if self.suffix == ".safetensors":
            raise OSError(24, "Too many open files")
        return real(self, *arguments, **options)

    store = TensorStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        assert store.find(["a"]) == set() and store.damaged == 0
    assert store.find(["a"]) == {"a"}

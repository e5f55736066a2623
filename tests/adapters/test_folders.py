"""Which adapters lie below a folder."""

import os

import pytest

from sdlora.adapters.folders import adapters_below, state_of


@pytest.fixture
def touch(tmp_path):
    def touch(*places):
        for place in places:
            path = tmp_path / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")

    return touch


def below(folder):
    return [path.relative_to(folder).as_posix() for path in adapters_below(folder)]


def test_files_are_found_by_their_suffix_in_order_of_names(tmp_path, touch):
    touch("b.safetensors", "a/c.SAFETENSORS", "a/d.txt", "a/e.safetensors.part", "x.safetensors/y.safetensors")
    assert below(tmp_path) == ["a/c.SAFETENSORS", "b.safetensors", "x.safetensors/y.safetensors"]


def test_hidden_places_and_training_states_are_left_out(tmp_path, touch):
    touch(".a.safetensors", ".cache/b.safetensors", "run/checkpoints/c.safetensors", "checkpoints.safetensors")
    assert below(tmp_path) == ["checkpoints.safetensors"]
    assert below(tmp_path / "nowhere") == []


def test_folders_of_pefts_are_one_adapter_with_or_without_components(tmp_path, touch):
    for place in ("one/unet", "one/text_encoder", "two"):
        touch(f"{place}/adapter_config.json", f"{place}/adapter_model.safetensors")
    touch("one/embeddings/zorb.safetensors", "three/adapter_model.safetensors")
    assert below(tmp_path) == ["one", "one/embeddings/zorb.safetensors", "three/adapter_model.safetensors", "two"]
    assert below(tmp_path / "two") == below(tmp_path / "one" / "unet") == ["."]


def test_links_are_followed_and_loops_of_them_end(tmp_path, touch):
    touch("real/a.safetensors", "elsewhere/b.safetensors")
    library = tmp_path / "library"
    library.mkdir()
    (library / "a-link").symlink_to(tmp_path / "real")
    (library / "loop").symlink_to(library)
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (library / "self").symlink_to(library / "self")
    (library / "gone.safetensors").symlink_to(tmp_path / "nothing")
    (library / "file.safetensors").symlink_to(tmp_path / "real" / "a.safetensors")
    found = adapters_below(library)
    assert library / "file.safetensors" in found
    assert sorted(path.name for path in found) == ["a.safetensors", "b.safetensors", "file.safetensors"]


def test_a_folder_goes_by_its_own_name_where_a_link_leads_to_it_too(tmp_path, touch):
    touch("z/deep/a.safetensors")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    assert below(tmp_path) == ["z/deep/a.safetensors"]


def test_the_state_changes_with_any_file_of_the_adapter(tmp_path, touch):
    touch("mine/unet/adapter_config.json", "mine/unet/adapter_model.safetensors", "a.safetensors")
    for adapter, file in (("mine", "mine/unet/adapter_config.json"), ("a.safetensors", "a.safetensors")):
        before = state_of(tmp_path / adapter)
        assert state_of(tmp_path / adapter) == before
        os.utime(tmp_path / file, ns=(5, 5))
        assert state_of(tmp_path / adapter) != before
    state = state_of(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    renamed = state_of(tmp_path / "b.safetensors")
    assert (renamed.signature, renamed.inode) == (state.signature, state.inode)
    (tmp_path / "b.safetensors").write_bytes(b"y")
    os.utime(tmp_path / "b.safetensors", ns=(5, 5))
    written = state_of(tmp_path / "b.safetensors")
    assert (written.signature, written.inode) == (state.signature, state.inode) and written.changed != renamed.changed
    with pytest.raises(OSError):
        state_of(tmp_path / "a.safetensors")


def test_times_that_64_bits_do_not_hold_are_cut(tmp_path, touch, monkeypatch):
    touch("a.safetensors", "mine/adapter_config.json", "mine/adapter_model.safetensors")

    class Late:
        st_mode, st_size, st_dev, st_ino, st_ctime_ns, st_mtime_ns = 0o100644, 1, 1, 1, 5, 10**19

    with monkeypatch.context() as context:
        context.setattr(type(tmp_path), "stat", lambda *_, **__: Late)
        context.setattr(type(tmp_path), "is_dir", lambda path: path.name == "mine")
        states = [state_of(tmp_path / name) for name in ("a.safetensors", "mine")]
    assert [state.modified_ns for state in states] == [2**63 - 1] * 2
    assert all(str(10**19) in state.signature for state in states)


def test_what_a_link_leads_to_may_not_be_ours_to_read(tmp_path, touch, monkeypatch):
    """As of links into a folder without permissions, which a test that runs as root cannot make."""
    touch("a.safetensors", "link.safetensors", "mine/adapter_model.safetensors")
    scan, stat = os.scandir, os.stat

    class Unreadable:
        name, path = "link.safetensors", str(tmp_path / "link.safetensors")

        def is_dir(self):
            return False

        def is_file(self):
            raise PermissionError(13, "Permission denied")

    def refusing(path, *arguments, **options):
        if os.fspath(path).endswith("adapter_config.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    def scanned(place):
        return [Unreadable() if entry.name == Unreadable.name else entry for entry in scan(place)]

    monkeypatch.setattr(os, "scandir", scanned)
    monkeypatch.setattr(os, "stat", refusing)
    assert below(tmp_path) == ["a.safetensors", "mine/adapter_model.safetensors"]

"""Files beside an adapter for AUTOMATIC1111 and Forge."""

import json
from hashlib import sha256

import pytest
from shared_files import save_picture

from sdlora.adapters.file import read_adapter
from sdlora.errors import ConfigError, FormatError, OutputError
from sdlora.headers import read_header
from sdlora.sharing.sidecar import THUMBNAIL, Wishes, write_sidecar
from sdlora.storage import sha256_of_tensor_data


def test_the_keys_are_those_that_these_programs_read(trained_adapter, picture, tmp_path):
    file = trained_adapter(words=("zorb2",))
    written = write_sidecar(file, Wishes(0.8, "n", "blurry"), preview=picture)
    assert (
        json.loads((tmp_path / "zorb.json").read_text())
        == written.entries
        == {
            "description": "Zorb: LoRA of rank 2 for Stable Diffusion 1.x, trained on 18 pictures",
            "sd version": "SD1",
            "activation text": "zorblin, zorb2",
            "preferred weight": 0.8,
            "negative text": "blurry",
            "notes": "n",
        }
    )
    assert b"anna" not in (tmp_path / "zorb.preview.png").read_bytes()
    assert written.files == (tmp_path / "zorb.json", tmp_path / "zorb.preview.png")


@pytest.mark.parametrize(("family", "version"), [("sd2", "SD2"), ("sdxl", "SDXL")])
def test_families_by_their_names_there(trained_adapter, family, version):
    assert write_sidecar(trained_adapter(family=family), Wishes()).entries["sd version"] == version


def test_what_the_user_wrote_stays_but_for_what_flags_say(trained_adapter, tmp_path):
    file = trained_adapter()
    mine = {"activation text": "mine", "notes": "old", "sd version": "Unknown", "preferred weight": 0.0, "x": [1]}
    (tmp_path / "zorb.json").write_text(json.dumps(mine))
    entries = write_sidecar(file, Wishes(notes="new")).entries
    assert (entries["activation text"], entries["notes"], entries["x"]) == ("mine", "new", [1])
    assert (entries["sd version"], entries["preferred weight"]) == ("SD1", 0)


@pytest.mark.parametrize("text", ["[1]", "no json", "[" * 100_000])
def test_another_file_of_that_name_is_refused(trained_adapter, tmp_path, text):
    file = trained_adapter()
    (tmp_path / "zorb.json").write_text(text)
    with pytest.raises(FormatError, match=r"zorb\.json: is there and no JSON object"):
        write_sidecar(file, Wishes())
    assert (tmp_path / "zorb.json").read_text() == text


def test_a_preview_is_replaced_only_when_told(trained_adapter, picture, tmp_path):
    file, other = trained_adapter(), save_picture(tmp_path / "other.png", (8, 8))
    write_sidecar(file, Wishes(), preview=picture)
    before = (tmp_path / "zorb.preview.png").read_bytes()
    with pytest.raises(OutputError, match="say --overwrite"):
        write_sidecar(file, Wishes(notes="n"), preview=other)
    assert (tmp_path / "zorb.preview.png").read_bytes() == before
    assert json.loads((tmp_path / "zorb.json").read_text())["notes"] == ""
    write_sidecar(file, Wishes(), preview=other, overwrite=True)
    assert (tmp_path / "zorb.preview.png").read_bytes() != before


def test_a_thumbnail_changes_the_header_alone(trained_adapter, picture, tmp_path):
    file = trained_adapter()
    text, hash3 = read_header(file).metadata, sha256_of_tensor_data(file)
    written = write_sidecar(file, Wishes(), preview=picture, thumbnail=True)
    now = read_header(file).metadata
    assert now.pop(THUMBNAIL).startswith("data:image/jpeg;base64,/9j/") and now == text
    assert sha256_of_tensor_data(file) == hash3 == text["sshs_model_hash"]
    assert written.sha256 == sha256(file.read_bytes()).hexdigest()
    assert read_adapter(file).layers and not (tmp_path / "zorb.preview.png").exists()
    other = save_picture(tmp_path / "other.png", (8, 8))
    with pytest.raises(OutputError, match="has a thumbnail already"):
        write_sidecar(file, Wishes(), preview=other, thumbnail=True)


@pytest.mark.parametrize(
    ("wishes", "thumbnail", "sentence"),
    [
        (Wishes(), True, "--thumbnail needs a picture"),
        (Wishes(11), False, "--weight is 11; expected a number from -10 to 10"),
        (Wishes(float("nan")), False, "--weight is nan"),
    ],
)
def test_wishes_that_make_no_sense(trained_adapter, wishes, thumbnail, sentence):
    with pytest.raises(ConfigError, match=sentence):
        write_sidecar(trained_adapter(), wishes, thumbnail=thumbnail)


def test_what_cannot_be_written_leaves_all_as_it_was(trained_adapter, picture, tmp_path):
    file = trained_adapter()
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="--notes or --negative: holds half a character"):
        write_sidecar(file, Wishes(notes="\ud800"), preview=picture, thumbnail=True)
    (tmp_path / "zorb.preview.png").mkdir()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"zorb\.preview\.png: is there already and no file; move it away"):
            write_sidecar(file, Wishes(), preview=picture, overwrite=overwrite)
    assert file.read_bytes() == before and not (tmp_path / "zorb.json").exists()
    (tmp_path / "zorb.json").mkdir()
    with pytest.raises(FormatError, match=r"zorb\.json: is there and no JSON object"):
        write_sidecar(file, Wishes(), preview=picture, thumbnail=True)
    assert file.read_bytes() == before


def test_a_link_goes_on_leading_to_the_adapter(trained_adapter, picture, tmp_path):
    file = trained_adapter()
    (tmp_path / "linked").mkdir()
    link = tmp_path / "linked" / "mine.safetensors"
    link.symlink_to(file)
    written = write_sidecar(link, Wishes(), preview=picture, thumbnail=True)
    assert link.is_symlink() and THUMBNAIL in read_header(file).metadata
    assert written.sha256 == sha256(file.read_bytes()).hexdigest()
    assert (tmp_path / "linked" / "mine.json").exists()


def test_a_picture_that_is_shown_instead_is_told(trained_adapter, picture, tmp_path):
    file = trained_adapter()
    assert write_sidecar(file, Wishes(), preview=picture).notes == ()
    save_picture(tmp_path / "zorb.jpg")
    assert write_sidecar(file, Wishes(), preview=picture).notes == (
        "zorb.jpg is there too, and AUTOMATIC1111 and Forge may show that in place of zorb.preview.png; move it away",
    )
    assert write_sidecar(file, Wishes()).notes == ()

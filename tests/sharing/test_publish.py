"""Adapters go to a Hub on this machine; what arrives there is compared byte for byte."""

import hashlib
import json

import pytest
from hub_server import TOKEN, Page, Repository
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from shared_files import save_picture

from sdlora.adapters.file import read_adapter
from sdlora.errors import ConfigError, DataError, FormatError, NetworkError, OutputError
from sdlora.sharing import publish as module
from sdlora.sharing.card import CardWishes
from sdlora.sharing.publish import PublishWishes, publication, publish

ID = "anna/zorb"


def test_everything_arrives_in_one_commit(hub, trained_adapter, picture):
    file = trained_adapter(words=("zorb two",))
    wishes = PublishWishes(pictures=[(picture, "a zorblin")], message="First", about=CardWishes(license="mit"))
    wanted = publication(file, ID, wishes)
    assert publish(wanted) == f"{hub.address}/{ID}/commit/{'c' * 40}"
    (commit,) = hub.repositories[ID].commits
    assert commit["message"] == "First"
    arrived = commit["files"]
    word = file.parent / "embeddings" / "zorb two.safetensors"
    assert list(arrived) == ["zorb.safetensors", "embeddings/zorb two.safetensors", "README.md", "samples/00.png"]
    assert arrived["zorb.safetensors"] == file.read_bytes()
    assert arrived["embeddings/zorb two.safetensors"] == word.read_bytes()
    assert b"anna" not in arrived["samples/00.png"] and arrived["samples/00.png"].startswith(b"\x89PNG")
    card = ModelCard(arrived["README.md"].decode())
    assert card.data.license == "mit" and f'load_lora_weights("{ID}"' in card.text
    assert not hub.repositories[ID].private
    assert {headers.get("authorization") for _, path, headers in hub.requests if path.startswith("/api")} == {
        f"Bearer {TOKEN}"
    }


def test_a_plan_asks_nothing_of_the_network(hub, trained_adapter):
    plan = publication(trained_adapter(), ID, PublishWishes()).to_json()
    assert hub.requests == []
    assert [entry["path"] for entry in plan["files"]] == ["zorb.safetensors", "README.md"]
    assert plan["card"].startswith("---\n") and plan["notes"] == ["the card names no licence; name one with --license"]


def test_a_private_repository_stays_private(hub, trained_adapter):
    wanted = publication(trained_adapter(), ID, PublishWishes(private=True))
    publish(wanted)
    assert hub.repositories[ID].private
    hub.repositories[ID] = Repository()
    with pytest.raises(OutputError, match="is there and everybody can see it"):
        publish(wanted)
    assert hub.repositories[ID].commits == []


def test_files_that_are_there_are_replaced_only_when_told(hub, trained_adapter):
    hub.repositories[ID] = Repository({"README.md": b"mine", "other.txt": b"x"})
    file = trained_adapter()
    with pytest.raises(OutputError, match=r"has README\.md already; say --overwrite"):
        publish(publication(file, ID, PublishWishes()))
    assert hub.repositories[ID].files == {"README.md": b"mine", "other.txt": b"x"}
    publish(publication(file, ID, PublishWishes(overwrite=True)))
    assert hub.repositories[ID].files["other.txt"] == b"x"
    assert hub.repositories[ID].files["README.md"].startswith(b"---")


def test_paths_in_headers_are_refused_and_captions_told(hub, trained_adapter):
    file = trained_adapter(ss_comment="see /home/anna/cat", ss_tag_frequency=json.dumps({"a": {"x": 1, "y": 2}}))
    with pytest.raises(
        FormatError, match=r"header is private: ss_comment tells a path .*/home/anna/cat; leave that out"
    ):
        publication(file, ID, PublishWishes())
    file = trained_adapter(ss_tag_frequency=json.dumps({"a": {"x": 1, "y": 2}}))
    assert any(
        "zorb.safetensors: ss_tag_frequency tells captions" in note
        for note in publication(file, ID, PublishWishes()).notes
    )


def test_what_cannot_be_read_is_not_published(trained_adapter, tmp_path):
    file = trained_adapter(words=("w",))
    (tmp_path / "embeddings" / "w.safetensors").unlink()
    with pytest.raises(FormatError, match="together with the new word 'w'"):
        publication(file, ID, PublishWishes())
    save_file({"lora_unet_conv_in.lora_up.weight": read_adapter(trained_adapter("b")).layers.popitem()[1].up}, file)
    with pytest.raises(FormatError):
        publication(file, ID, PublishWishes())
    with pytest.raises(FormatError, match=r"rename it to end in \.safetensors"):
        publication(trained_adapter("c").rename(tmp_path / "c.ckpt"), ID, PublishWishes())


@pytest.mark.parametrize("name", ["zorb", "a/b/c", "../x", "https://huggingface.co/a/b", ""])
def test_what_is_no_id_is_refused(trained_adapter, name):
    with pytest.raises(ConfigError, match="is no Hugging Face id; expected owner/name"):
        publication(trained_adapter(), name, PublishWishes())


def test_a_card_that_is_there_brings_its_pictures(hub, trained_adapter, tmp_path):
    file = trained_adapter()
    save_picture(tmp_path / "samples" / "me.png")
    widget = "widget:\n- output:\n    url: samples/me.png\n- output:\n    url: https://example.org/x.png\n- 1\n"
    (tmp_path / "README.md").write_text(f"---\n{widget}---\n# Mine, but not from /home/anna/x\n")
    with pytest.raises(
        FormatError, match=r"README\.md: not published, it tells paths of a machine: /home/anna/x; take"
    ):
        publication(file, ID, PublishWishes(card=tmp_path / "README.md"))
    (tmp_path / "README.md").write_text(f"---\n{widget}---\n# My\\_cat ![](./samples/me.png)\n")
    wanted = publication(file, ID, PublishWishes(card=tmp_path / "README.md"))
    assert [entry.place for entry in wanted.files] == ["zorb.safetensors", "README.md", "samples/me.png"]
    assert wanted.notes == ()
    publish(wanted)
    arrived = hub.repositories[ID].files
    assert arrived["README.md"] == (tmp_path / "README.md").read_bytes()
    assert b"anna" not in arrived["samples/me.png"]


def test_what_was_checked_is_what_is_sent(hub, trained_adapter):
    file = trained_adapter(words=("zorb two",))
    before = file.read_bytes()
    wanted = publication(file, ID, PublishWishes())
    file.write_bytes(b"something else")
    assert wanted.to_json()["files"][0]["sha256"] == hashlib.sha256(before).hexdigest()
    publish(wanted)
    assert hub.repositories[ID].files["zorb.safetensors"] == before


def test_a_large_file_that_changed_is_not_sent(hub, trained_adapter, monkeypatch):
    monkeypatch.setattr(module, "_KEPT_BYTES", 0)
    file = trained_adapter()
    wanted = publication(file, ID, PublishWishes())
    plan = wanted.to_json()
    for change in (lambda: file.write_bytes(b"something else"), file.unlink):
        change()
        with pytest.raises(FormatError, match=r"zorb\.safetensors: has changed since it was checked, nothing was sent"):
            publish(wanted)
    assert hub.requests == [] and wanted.to_json() == plan


@pytest.mark.parametrize(
    "matter", ["tags: 3", "1: 2", "eval_results: 4", "self: 1", "- 1", "3", "", "widget: 7", "base_model: [1]"]
)
def test_front_matter_of_every_kind_is_sent_as_it_is(trained_adapter, tmp_path, matter):
    (tmp_path / "README.md").write_text(f"---\n{matter}\n---\n# x\n")
    wanted = publication(trained_adapter(), ID, PublishWishes(card=tmp_path / "README.md"))
    assert [entry.place for entry in wanted.files] == ["zorb.safetensors", "README.md"]


@pytest.mark.parametrize("url", ["../secret.png", "/etc/passwd", "C:/x.png", "missing.png", r"..\x.png"])
def test_a_card_brings_nothing_from_elsewhere(trained_adapter, tmp_path, url):
    file = trained_adapter()
    save_picture(tmp_path.parent / "secret.png")
    (tmp_path / "README.md").write_text(f"---\nwidget:\n- output:\n    url: '{url}'\n---\n")
    with pytest.raises(FormatError, match="which does not lie beside it"):
        publication(file, ID, PublishWishes(card=tmp_path / "README.md"))


@pytest.mark.parametrize(("name", "error"), [("id_rsa", FormatError), ("a.png", DataError), ("b.webp", FormatError)])
def test_a_card_brings_nothing_but_pictures(trained_adapter, tmp_path, name, error):
    file = trained_adapter()
    (tmp_path / name).write_text("key")
    (tmp_path / "README.md").write_text(f"---\nwidget:\n- output:\n    url: {name}\n---\n")
    with pytest.raises(error, match=name):
        publication(file, ID, PublishWishes(card=tmp_path / "README.md"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("---\na: [\n---\n", "front matter is no YAML"),
        ("---\n2024-99-99\n---\n", "is no YAML"),
        (b"\xff\xfe\xff", "cannot be read"),
    ],
)
def test_cards_that_are_none(trained_adapter, tmp_path, content, sentence):
    (tmp_path / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FormatError, match=sentence):
        publication(trained_adapter(), ID, PublishWishes(card=tmp_path / "README.md"))


def test_nobody_logged_in(hub, trained_adapter, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(NetworkError, match=r"anna/zorb: nobody is logged in; run 'hf auth login'"):
        publish(publication(trained_adapter(), ID, PublishWishes()))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("start", "status", "code", "sentence"),
    [
        ("GET /api/models", 401, "", r"does not accept the login \(401\); run 'hf auth login'"),
        ("GET /api/models", 403, "GatedRepo", "is gated; accept its terms on"),
        ("POST /api/repos/create", 403, "", r"the login may not do this \(403\); use a token that may write to anna"),
        ("POST /api/models/anna/zorb/commit", 409, "", r"changed by somebody else meanwhile \(409\)"),
        ("POST /api/models/anna/zorb/preupload", 403, "", r"may not do this \(403\)"),
        ("POST /api/models/anna/zorb/commit", 412, "", r"changed by somebody else meanwhile \(412\)"),
        ("POST /api/models/anna/zorb/commit", 429, "", r"too many requests \(429\)"),
        ("POST /api/models/anna/zorb/commit", 500, "", r"the server failed \(500\); try again later"),
        ("POST /anna/zorb.git/info/lfs", 413, "", r"too large for the server \(413\)"),
        ("PUT /lfs/", 403, "", r"may not do this \(403\)"),
    ],
)
def test_refusals_are_one_sentence(hub, trained_adapter, start, status, code, sentence):
    hub.refusals[start] = (status, code)
    with pytest.raises(NetworkError, match=sentence) as error:
        publish(publication(trained_adapter(), ID, PublishWishes()))
    assert str(error.value).startswith("anna/zorb: ") and "\n" not in str(error.value)
    assert all(not repository.files for repository in hub.repositories.values())


def test_answers_that_make_no_sense(hub, trained_adapter):
    wanted = publication(trained_adapter(), ID, PublishWishes())
    for body in (b"<html>hotel wifi</html>", b"[1]", b'"x"', b"{}", b'{"id": "a", "siblings": 3}'):
        hub.pages["/api/models/anna/zorb"] = Page(body)
        with pytest.raises(NetworkError, match="does not answer as expected"):
            publish(wanted)


def test_no_network(hub, trained_adapter, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    wanted = publication(trained_adapter(), ID, PublishWishes())
    with pytest.raises(NetworkError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        publish(wanted)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE is set; unset it"):
        publish(wanted)

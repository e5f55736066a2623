"""Ids and addresses of strangers, and the names that they give to files."""

from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlora.errors import ConfigError
from sdlora.sharing.address import HubPlace, WebPlace, check_url, parse_address, safe_file_name, shown
from sdlora.sharing.download import _name


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("owner/name", HubPlace("owner/name")),
        (" owner/name/sub/a b.safetensors ", HubPlace("owner/name", "sub/a b.safetensors")),
        ("https://huggingface.co/owner/name", HubPlace("owner/name")),
        ("https://hf.co/owner/name/tree/v2", HubPlace("owner/name", "", "v2")),
        (
            "https://huggingface.co/owner/name/resolve/refs%2Fpr%2F1/a%20b.safetensors?download=true",
            HubPlace("owner/name", "a b.safetensors", "refs/pr/1"),
        ),
        (
            "https://huggingface.co/owner/name/blob/main/s/a.safetensors",
            HubPlace("owner/name", "s/a.safetensors", "main"),
        ),
        ("https://example.org/a.safetensors", WebPlace("https://example.org/a.safetensors")),
        ("http://127.0.0.1:8000/a", WebPlace("http://127.0.0.1:8000/a")),
        ("https://civitai.com/api/download/models/5", WebPlace("https://civitai.com/api/download/models/5")),
        (
            "https://civitai.com/models/1/zorb?modelVersionId=5",
            WebPlace("https://civitai.com/api/download/models/5"),
        ),
    ],
)
def test_what_is_understood(text, place, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert parse_address(text) == place


def test_a_hub_of_ones_own_is_the_hub(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org/")
    assert parse_address("https://hub.example.org/owner/name") == HubPlace("owner/name")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name", "is neither a Hugging Face id"),
        ("folder/a.safetensors", "is neither a Hugging Face id"),
        ("owner/name/../../x", "is neither a Hugging Face id"),
        ("owner/name//etc/x", "is neither a Hugging Face id"),
        ("http://example.org/a.safetensors", "http://example.org/a.safetensors: is not asked; only https"),
        ("ftp://example.org/a", "is not asked"),
        ("file:///etc/passwd", "is not asked"),
        ("https://[::1", "is no address"),
        ("https://example.org:99999/", "is no address"),
        ("https://./", "is no address"),
        ("https://a..b/x", "is no address"),
        (f"https://{'a' * 64}.org/x", "is no address"),
        ("https://example.org/\udcff", "is no address"),
        ("https://huggingface.co/datasets/owner/name", "is no model on the Hub"),
        ("https://huggingface.co/owner", "is no model on the Hub"),
        ("https://huggingface.co/owner/name/resolve/main/..%2F..%2Fx", "is no model on the Hub"),
        ("https://civitai.com/models/1/zorb", "is a page with several versions"),
    ],
)
def test_what_is_refused(text, sentence):
    with pytest.raises(ConfigError, match=sentence.replace(".", r"\.")):
        parse_address(text)


def test_nobody_is_led_to_this_machine_or_off_the_safe_way():
    assert check_url("http://127.0.0.1/b", "http://localhost:1/a")
    for url in ("http://127.0.0.1/b", "https://localhost/b", "http://example.org/b", "file:///etc/passwd"):
        with pytest.raises(ConfigError, match=r"^https://a\.org/x: leads to .* is not asked"):
            check_url(url, "https://a.org/x?key=secret")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.2",
        "localhost.",
        "a.LOCALHOST",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[fe80::1]",
        "0.0.0.0",
        "2130706433",
        "0x7f000001",
        "127.1",
        "0177.0.0.1",
        "\uff11\uff12\uff17.0.0.1",
        "192.168.0.1",
        "10.0.0.1.",
        "169.254.169.254",
        "224.0.0.1",
    ],
)
def test_no_redirect_leads_inside(host):
    assert check_url(f"https://{host}/a") == f"https://{host}/a"  # whoever gives it means it
    assert check_url(f"https://{host}/b", f"https://{host}/a")
    with pytest.raises(
        ConfigError, match="is not asked, as it may be on this machine or its network; give it yourself"
    ):
        check_url(f"https://{host}/b", "https://a.org/x")


def test_redirects_to_the_rest_of_the_world_are_followed():
    for host in ("b.org", "b.org.", "1.1.1.1", "[2606:4700::1111]", "[::ffff:1.1.1.1]", "bücher.example", "0x.org"):
        assert check_url(f"https://{host}/b", "https://a.org/x") == f"https://{host}/b"


def test_secrets_in_addresses_are_not_shown():
    assert shown("https://me:pass@a.org:8443/x?token=secret#y") == "https://a.org:8443/x"
    assert shown("https://anna:secret@host:99999/x?y") == "https://host:99999"
    for url in ("https://anna:secret@[host/x", "https://anna:sec/ret@host/", "https://anna:sec?ret@host/"):
        assert "ret" not in shown(url)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("zorb.safetensors", "zorb.safetensors"),
        ("猫 zorb v1.5.safetensors", "猫 zorb v1.5.safetensors"),
        ("../../etc/passwd", "passwd.safetensors"),
        (r"C:\Users\x\a.SAFETENSORS", "a.safetensors"),
        ("...", "adapter.safetensors"),
        ("", "adapter.safetensors"),
        (".hidden", "hidden.safetensors"),
        ("a\0b\n\x1b[31m\u202ec.pt", "ab[31mc.safetensors"),
        ("CON", "_CON.safetensors"),
        ("lpt1.safetensors", "_lpt1.safetensors"),
        ("com1.x", "_com1.x.safetensors"),
        ("console", "console.safetensors"),
        ('a<b>:"|?*c', "abc.safetensors"),
        ("x" * 500, "x" * 150 + ".safetensors"),
        ("猫" * 500, "猫" * 50 + ".safetensors"),
        ("\ud800.x.ckpt", "x.safetensors"),
        ("embeddings", "embeddings.safetensors"),
    ],
)
def test_names_are_made_safe(name, safe):
    assert safe_file_name(name) == safe


@given(st.text())
def test_whatever_a_server_says_is_one_name_in_one_folder(name):
    safe = safe_file_name(name)
    assert safe.endswith(".safetensors") and 0 < len(safe.encode()) <= 170 and not safe.startswith(".")
    assert PurePosixPath(safe).name == PureWindowsPath(safe).name == safe
    assert safe.isprintable() and not PureWindowsPath(safe).is_reserved()
    assert safe_file_name(safe) == safe


@given(st.text() | st.builds("https://{}/{}".format, st.text(), st.text()) | st.builds("a/b/{}".format, st.text()))
def test_whatever_is_asked_for_is_a_place_or_refused(text):
    try:
        place = parse_address(text)
    except ConfigError as error:
        assert len(str(error)) < 700 and str(error).isprintable()
    else:
        assert isinstance(place, HubPlace | WebPlace)


@given(st.text() | st.builds("attachment; filename{}={}".format, st.sampled_from(["", "*", "*0", "*0*"]), st.text()))
def test_whatever_a_header_says_names_a_file_or_nothing(text):
    assert safe_file_name(_name({"content-disposition": text})).endswith(".safetensors")

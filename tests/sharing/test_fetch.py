"""Adapters come from a server on this machine; what is not one leaves nothing behind."""

import hashlib
import io
import json
import os
import pickle

import pytest
import torch
from hub_server import TOKEN, Page, Repository, serving
from safetensors.torch import save, save_file
from shared_files import trained

from sdlora.adapters.file import read_adapter
from sdlora.errors import ConfigError, FormatError, NetworkError, OutputError, SdloraError
from sdlora.sharing import address, download
from sdlora.sharing import fetch as module
from sdlora.sharing.fetch import FetchWishes, fetch
from sdlora.storage import rewrite_metadata

ID = "anna/zorb"
CHECKPOINT = save({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 2)})


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def adapter(tmp_path):
    """The bytes of an adapter without new words."""
    return trained(tmp_path / "source" / "zorb.safetensors").read_bytes()


def there(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def test_the_only_adapter_of_a_repository_with_its_words(hub, tmp_path, out):
    source = trained(tmp_path / "source" / "zorb.safetensors", words=("w w",))
    word = (source.parent / "embeddings" / "w w.safetensors").read_bytes()
    hub.repositories[ID] = Repository(
        {
            "sub/zorb.safetensors": source.read_bytes(),
            "sub/embeddings/w w.safetensors": word,
            "unet/model.safetensors": CHECKPOINT,
            "README.md": b"x",
        }
    )
    got = fetch(ID, FetchWishes(out))
    assert there(out) == ["embeddings/w w.safetensors", "zorb.safetensors"]
    assert got.path.read_bytes() == source.read_bytes() and got.words == (out / "embeddings" / "w w.safetensors",)
    assert read_adapter(got.path).tokens.keys() == {"w w"}
    assert got.source == f"{hub.address}/{ID}/resolve/main/sub/zorb.safetensors"
    assert {headers.get("authorization") for headers in hub.asked(f"/{ID}/resolve/main/sub/zorb.safetensors")} == {
        f"Bearer {TOKEN}"
    }
    assert fetch(ID, FetchWishes(out, overwrite=True)).words == ()  # they are there


def test_words_beside_the_adapter_count_too(hub, tmp_path, out):
    source = trained(tmp_path / "source" / "zorb.safetensors", words=("w",))
    word = (source.parent / "embeddings" / "w.safetensors").read_bytes()
    hub.repositories[ID] = Repository({"zorb.safetensors": source.read_bytes(), "w.safetensors": word})
    fetch(ID, FetchWishes(out))
    assert there(out) == ["embeddings/w.safetensors", "zorb.safetensors"]


def test_words_under_the_name_of_a_device_are_found_as_linux_has_them(hub, tmp_path, out):
    source = trained(tmp_path / "source" / "zorb.safetensors", words=("con",))
    (file,) = (source.parent / "embeddings").iterdir()
    assert file.name.startswith("_con-")
    file = file.rename(file.with_name("con.safetensors"))
    assert read_adapter(source).tokens.keys() == {"con"}
    hub.repositories[ID] = Repository(
        {"zorb.safetensors": source.read_bytes(), "embeddings/con.safetensors": file.read_bytes()}
    )
    got = fetch(f"{ID}/zorb.safetensors", FetchWishes(out))
    assert got.words[0].name.startswith("_con-") and read_adapter(got.path).tokens.keys() == {"con"}


@pytest.mark.parametrize("word", [None, b"<html>", CHECKPOINT])
def test_an_adapter_without_its_words_is_not_kept(hub, tmp_path, out, word):
    source = trained(tmp_path / "source" / "zorb.safetensors", words=("w",))
    files = {"zorb.safetensors": source.read_bytes()}
    hub.repositories[ID] = Repository(files | ({"embeddings/w.safetensors": word} if word else {}))
    with pytest.raises(FormatError, match=r"new word 'w'|: embeddings/w\.safetensors: is a web page") as error:
        fetch(f"{ID}/zorb.safetensors", FetchWishes(out))
    assert there(out) == [] and ".fetching" not in str(error.value)


def test_another_word_of_that_name_is_never_replaced(hub, tmp_path, out):
    source = trained(tmp_path / "source" / "zorb.safetensors", words=("w",))
    word = (source.parent / "embeddings" / "w.safetensors").read_bytes()
    hub.repositories[ID] = Repository({"zorb.safetensors": source.read_bytes(), "embeddings/w.safetensors": word})
    (out / "embeddings").mkdir(parents=True)
    save_file({"emb_params": torch.zeros(1, 768)}, out / "embeddings" / "w.safetensors")
    with pytest.raises(OutputError, match="knows 'w' with other vectors"):
        fetch(f"{ID}/zorb.safetensors", FetchWishes(out, overwrite=True))
    assert there(out) == ["embeddings/w.safetensors"]


def test_several_adapters_are_listed(hub, adapter, out):
    hub.repositories[ID] = Repository({"a.safetensors": adapter, "b.safetensors": adapter, "c.safetensors": CHECKPOINT})
    with pytest.raises(
        FormatError, match=r"holds several files: a\.safetensors, b\.safetensors; choose one with --file"
    ):
        fetch(ID, FetchWishes(out))
    assert fetch(ID, FetchWishes(out, file="b.safetensors")).path.name == "b.safetensors"


def test_a_repository_of_pickles(hub, out):
    hub.repositories[ID] = Repository({"a.bin": b"x"})
    with pytest.raises(FormatError, match=r"holds no \.safetensors file but pickles such as a\.bin"):
        fetch(ID, FetchWishes(out))
    with pytest.raises(FormatError, match="this could run code when opened"):
        fetch(f"{ID}/a.bin", FetchWishes(out))


def test_revisions_and_addresses(hub, adapter, out):
    hub.repositories[ID] = Repository({"a.safetensors": adapter})
    assert fetch(f"{hub.address}/{ID}/blob/main/a.safetensors", FetchWishes(out)).path == out / "a.safetensors"
    with pytest.raises(NetworkError, match="has no branch, tag or commit called 'dev'"):
        fetch(ID, FetchWishes(out, revision="dev"))
    with pytest.raises(NetworkError, match="anna/zorb has no such branch, tag or commit"):
        fetch(f"{ID}/b.safetensors", FetchWishes(out, revision="dev"))
    with pytest.raises(ConfigError, match="the address names 'main' and --revision 'dev'; leave one out"):
        fetch(f"{hub.address}/{ID}/blob/main/a.safetensors", FetchWishes(out, revision="dev"))


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (401, "RepoNotFound", "there is no such model on"),
        (403, "GatedRepo", "is gated; accept its terms"),
        (404, "EntryNotFound", "anna/zorb has no such file"),
        (503, "", r"the server failed \(503\)"),
        (418, "", r"the server refuses \(418\)"),
    ],
)
def test_refusals_of_the_hub(hub, out, status, code, sentence):
    hub.refusals[f"GET /{ID}/resolve"] = (status, code)
    with pytest.raises(NetworkError, match=sentence):
        fetch(f"{ID}/a.safetensors", FetchWishes(out))
    assert there(out) == []


def test_hashes_are_compared(hub, adapter, out):
    hub.repositories[ID] = Repository({"a.safetensors": adapter})
    wanted = hashlib.sha256(adapter).hexdigest()
    assert fetch(ID, FetchWishes(out, sha256=wanted.upper())).path.exists()
    with pytest.raises(FormatError, match=rf"came with SHA-256 {wanted}, --sha256 says 0000.*nothing was kept"):
        fetch(ID, FetchWishes(out / "b", sha256="0" * 64))
    hub.corrupt = True
    with pytest.raises(FormatError, match=rf"the Hub says {wanted}; nothing was kept"):
        fetch(ID, FetchWishes(out / "b"))
    assert there(out) == ["a.safetensors"]
    with pytest.raises(ConfigError, match="--sha256 abc: expected 64 hexadecimal digits"):
        fetch(ID, FetchWishes(out, sha256="abc"))


def test_what_is_there_is_replaced_only_when_told(hub, adapter, out):
    hub.repositories[ID] = Repository({"a.safetensors": adapter})
    out.mkdir()
    (out / "a.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"a\.safetensors: is there already"):
        fetch(ID, FetchWishes(out))
    assert (out / "a.safetensors").read_bytes() == b"mine"
    fetch(ID, FetchWishes(out, overwrite=True))
    assert (out / "a.safetensors").read_bytes() == adapter
    assert fetch(ID, FetchWishes(out, name="b")).path == out / "b.safetensors"


@pytest.mark.parametrize("late", ["zorb.safetensors", "embeddings/w.safetensors"])
def test_what_came_meanwhile_is_not_replaced_and_no_word_stays(hub, tmp_path, out, monkeypatch, late):
    source = trained(tmp_path / "source" / "zorb.safetensors", words=("v", "w"))
    files = {f"embeddings/{word}.safetensors": source.parent / "embeddings" / f"{word}.safetensors" for word in "vw"}
    hub.repositories[ID] = Repository(
        {"zorb.safetensors": source.read_bytes(), **{name: file.read_bytes() for name, file in files.items()}}
    )

    def read(path):
        (out / late).parent.mkdir(exist_ok=True)
        (out / late).write_bytes(b"mine")
        return read_adapter(path)

    with monkeypatch.context() as context:
        context.setattr(module, "read_adapter", read)
        context.setattr(module, "refuse_other_words", lambda *_: None)
        with pytest.raises(OutputError, match="is there already"):
            fetch(ID, FetchWishes(out))
    assert there(out) == [late] and (out / late).read_bytes() == b"mine"


def test_words_do_not_stay_where_the_adapter_cannot_be_moved(hub, tmp_path, out, monkeypatch):
    source = trained(tmp_path / "source" / "zorb.safetensors", words=("w",))
    word = (source.parent / "embeddings" / "w.safetensors").read_bytes()
    hub.repositories[ID] = Repository({"zorb.safetensors": source.read_bytes(), "embeddings/w.safetensors": word})
    out.mkdir()
    (out / "zorb.safetensors").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        fetch(ID, FetchWishes(out, overwrite=True))
    assert list(out.iterdir()) == [out / "zorb.safetensors"]


def test_the_words_count_too_and_are_not_without_number(hub, tmp_path, out):
    source = trained(tmp_path / "source" / "zorb.safetensors", words=("w",))
    word = (source.parent / "embeddings" / "w.safetensors").read_bytes()
    hub.repositories[ID] = Repository({"zorb.safetensors": source.read_bytes(), "embeddings/w.safetensors": word})
    most = source.stat().st_size + len(word)
    with pytest.raises(OutputError, match=r"embeddings/w\.safetensors: is larger than"):
        fetch(ID, FetchWishes(out, most_bytes=most - 1))
    assert there(out) == []
    assert fetch(ID, FetchWishes(out, most_bytes=most)).words
    many = json.dumps({f"{number}": "x" for number in range(101)})
    hub.repositories[ID] = Repository({"a.safetensors": trained(tmp_path / "a.safetensors").read_bytes()})
    rewrite_metadata(tmp_path / "a.safetensors", tmp_path / "b.safetensors", {"sdlora_words": many})
    hub.repositories[ID] = Repository({"b.safetensors": (tmp_path / "b.safetensors").read_bytes()})
    with pytest.raises(FormatError, match="names 101 new words; expected at most 100"):
        fetch(ID, FetchWishes(out))


def test_pefts_folders_are_not_fetched(hub, site, adapter, out):
    hub.repositories[ID] = Repository({"unet/adapter_model.safetensors": adapter, "unet/adapter_config.json": b"{}"})
    sentence = "PEFT's folders are not fetched; download the weights and adapter_config.json, and run"
    site.pages["/adapter_model.safetensors"] = Page(adapter)
    address = f"{site.address}/adapter_model.safetensors"
    for place in (ID, f"{ID}/unet/adapter_model.safetensors", address):
        with pytest.raises(FormatError, match=sentence):
            fetch(place, FetchWishes(out))
    hub.repositories[ID].files["zorb.safetensors"] = adapter
    assert fetch(ID, FetchWishes(out)).path == out / "zorb.safetensors"


def test_what_everybody_calls_alike_is_called_by_its_repository(hub, adapter, out):
    hub.repositories[ID] = Repository({"pytorch_lora_weights.safetensors": adapter})
    assert fetch(ID, FetchWishes(out)).path == out / "zorb.safetensors"


# ------------------------------------------------------------------- from the web


@pytest.fixture
def site(hub):
    """Another server than the Hub."""
    with serving() as running:
        yield running


def web(site, body, name="", **headers):
    """Return the address of a page."""
    disposition = {"content-disposition": name} if name else {}
    site.pages["/download/models/5"] = Page(body, {**disposition, **headers})
    return f"{site.address}/download/models/5"


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ("", "5.safetensors"),
        ('attachment; filename="zorb v1.safetensors"', "zorb v1.safetensors"),
        ("attachment; filename*=UTF-8''%E7%8C%AB.safetensors", "猫.safetensors"),
        ('attachment; filename="../../../evil.safetensors"', "evil.safetensors"),
        ('attachment; filename="/etc/cron.d/evil"', "evil.safetensors"),
        ("attachment; filename*=UTF-8''..%2F..%2Fevil", "evil.safetensors"),
        ("attachment; filename*=nonsense''%ff", "ÿ.safetensors"),
        ("attachment; filename*=a; filename*0=b", "5.safetensors"),
        ("nonsense;;;=", "5.safetensors"),
    ],
)
def test_names_are_the_servers_and_lead_nowhere(site, adapter, out, disposition, name):
    got = fetch(web(site, adapter, disposition), FetchWishes(out))
    assert got.path.parent == out and there(out) == [got.path.name]
    assert got.path.name == name


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("body", "headers", "sentence"),
    [
        (b"<html>sign in", {"content-type": "text/html; charset=utf-8"}, "is a web page, not a model file; open it in"),
        (b"  <!DOCTYPE html>", {"content-type": "application/octet-stream"}, "is a web page saved under this name"),
        (pickle.dumps(_Runs()), {}, "is a pickle or zip archive, which could run code"),
        (b"PK\x03\x04" + b"\0" * 600, {}, "is a pickle or zip archive"),
        (b"", {}, "is empty"),
        (b'{"error": "no"}' * 50, {}, "not a safetensors file"),
        (CHECKPOINT, {}, "is a whole Stable Diffusion checkpoint"),
        (CHECKPOINT[:-1], {}, "is truncated"),
        (save({"x.y": torch.ones(3)}), {}, "holds no adapter"),
    ],
)
def test_what_is_no_adapter_leaves_nothing_behind(site, out, body, headers, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    url = web(site, body, **headers)
    with pytest.raises(FormatError, match=sentence) as error:
        fetch(url, FetchWishes(out))
    assert list(out.iterdir()) == [] and not (tmp_path / "ran").exists()
    assert str(error.value).startswith(url) and str(tmp_path) not in str(error.value)


def test_numbers_that_are_none_are_refused(site, tmp_path, out):
    tensors = {"lora_unet_conv_in.lora_up.weight": torch.ones(2, 1, 1, 1), "lora_unet_conv_in.alpha": torch.tensor(1.0)}
    tensors["lora_unet_conv_in.lora_down.weight"] = torch.full((1, 4, 3, 3), float("nan"))
    with pytest.raises(FormatError, match="holds NaN or infinity"):
        fetch(web(site, save(tensors)), FetchWishes(out))
    assert list(out.iterdir()) == []


def test_words_cannot_come_from_the_web_but_from_the_folder(site, tmp_path, out):
    source = trained(tmp_path / "source" / "zorb.safetensors", words=("w",))
    url = web(site, source.read_bytes())
    with pytest.raises(FormatError, match=r"new word 'w', which is not in the file; put its own w\.safetensors into"):
        fetch(url, FetchWishes(out))
    (out / "embeddings").mkdir()
    (out / "embeddings" / "w.safetensors").write_bytes((source.parent / "embeddings" / "w.safetensors").read_bytes())
    assert fetch(url, FetchWishes(out)).words == ()
    assert there(out) == ["5.safetensors", "embeddings/w.safetensors"]


def test_more_than_allowed_is_refused_told_or_not(site, adapter, out):
    for headers in ({}, {"transfer-encoding": "chunked"}):
        with pytest.raises(OutputError, match="is larger than 1e-07 GB; say --max-gigabytes"):
            fetch(web(site, adapter, **headers), FetchWishes(out, most_bytes=100))
    assert list(out.iterdir()) == []


def test_a_download_that_breaks_off(site, adapter, out):
    url = web(site, adapter, **{"content-length": str(len(adapter) + 10), "connection": "close"})
    with pytest.raises(NetworkError, match="cannot be reached, or broke off"):
        fetch(url, FetchWishes(out))
    assert list(out.iterdir()) == []


def test_nothing_there(site, out, monkeypatch):
    from huggingface_hub import constants

    with pytest.raises(NetworkError, match=r"there is no such file \(404\); check the address"):
        fetch(f"{site.address}/nothing", FetchWishes(out))
    with pytest.raises(NetworkError, match="cannot be reached"):
        fetch("http://127.0.0.1:9/a", FetchWishes(out))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE is set; unset it"):
        fetch(f"{site.address}/nothing", FetchWishes(out))


def test_redirects_end(site, out):
    url = web(site, b"")
    site.pages["/download/models/5"] = Page(b"", {"location": "/download/models/5"}, 302)
    with pytest.raises(NetworkError, match="leads from one address to another without end"):
        fetch(url, FetchWishes(out))
    for location in ("http://[::1", "https://a:b/", "https://./", "https://a..b/", f"https://{'a' * 64}/"):
        site.pages["/download/models/5"] = Page(b"", {"location": location}, 302)
        with pytest.raises(ConfigError, match="is no address"):
            fetch(url, FetchWishes(out))
    site.pages["/download/models/5"] = Page(b"", {"location": "http://example.org/a"}, 302)
    with pytest.raises(ConfigError, match=r"leads to http://example\.org/a, which is not asked"):
        fetch(url, FetchWishes(out))


def hostile(header):
    """Return a safetensors file that begins with that JSON."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 8


@pytest.mark.parametrize(
    "header",
    [
        *({"__metadata__": odd, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}} for odd in ([1], "x", 5)),
        {"__metadata__": {"sdlora_words": 5}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        *({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}} for shape in (None, ["1"], 3, [None])),
        {"a": None},
        [1],
    ],
)
def test_a_repository_may_hold_any_header(hub, adapter, out, header):
    hub.repositories[ID] = Repository({"a.safetensors": adapter, "b.safetensors": hostile(header)})
    assert fetch(ID, FetchWishes(out)).path == out / "a.safetensors"


def test_a_server_may_say_any_name(hub, adapter, out):
    hub.repositories[ID] = Repository({"a.safetensors": adapter})
    siblings = [{"rfilename": 3}, {"rfilename": "a.safetensors"}]
    hub.pages[f"/api/models/{ID}"] = Page(json.dumps({"id": ID, "siblings": siblings}).encode())
    assert fetch(ID, FetchWishes(out)).path == out / "a.safetensors"
    hub.pages[f"/api/models/{ID}"] = Page(
        json.dumps({"id": ID, "siblings": [{"rfilename": "\udcff.safetensors"}]}).encode()
    )
    for place in (ID, f"{ID}/\udcff.safetensors"):
        with pytest.raises(FormatError, match=r"anna/zorb: has no file called .*, as no address can hold that name"):
            fetch(place, FetchWishes(out))


@pytest.mark.parametrize("address", ["https://hf:abc", "hf.co", "ftp://hf.co", "https://"])
def test_a_hub_that_is_none(monkeypatch, out, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    for place in (ID, f"{ID}/a.safetensors", "https://example.org/a"):
        with pytest.raises(ConfigError, match="HF_ENDPOINT: is no address; expected one such as https"):
            fetch(place, FetchWishes(out))


@pytest.mark.parametrize("token", ["sec ret", "secr\u00e4t", "sec\nret", "sec\u2028ret"])
def test_logins_that_are_none_are_not_shown(hub, monkeypatch, out, token):
    monkeypatch.setenv("HF_TOKEN", token.replace("\n", "\t"))  # of line feeds the Hub's library takes care
    for place in (ID, f"{ID}/a.safetensors"):
        with pytest.raises(ConfigError, match="HF_TOKEN: is no token; expected") as error:
            fetch(place, FetchWishes(out))
        assert "sec" not in str(error.value)
    with pytest.raises(ConfigError, match="CIVITAI_TOKEN: is no token; expected") as error:
        download.headers_for("https://civitai.com/a", token)
    assert "sec" not in str(error.value) and hub.requests == []


def test_white_space_around_a_token_is_no_part_of_it():
    assert download.headers_for("https://civitai.com/a", " cv\n")["authorization"] == "Bearer cv"
    assert "authorization" not in download.headers_for("https://civitai.com/a", "\n")


def test_errors_never_quote_what_would_have_been_sent(site, adapter, out, monkeypatch):
    url = web(site, adapter)
    monkeypatch.setattr(download, "headers_for", lambda *_: {"authorization": "Bearer secret\n"})
    with pytest.raises(NetworkError, match=r"broke off \(the request cannot be sent\)"):
        fetch(url, FetchWishes(out))


def test_each_login_is_for_its_own_server_alone(hub, site, adapter, out, monkeypatch):
    """The same machine under another name is another server."""
    monkeypatch.setattr(download, "CIVITAI_HOSTS", {"localhost"})
    monkeypatch.setattr(download, "urlsplit", lambda url: address.urlsplit(url.replace("http:", "https:")))
    hub.repositories[ID] = Repository({"a.safetensors": adapter})
    hub.pages[f"/{ID}/resolve/main/a.safetensors"] = Page(b"", {"location": f"{site.address}/one"}, 302)
    site.pages["/one"] = Page(b"", {"location": f"http://localhost:{site.address.rpartition(':')[2]}/two"}, 302)
    site.pages["/two"] = Page(b"", {"location": f"{site.address}/three"}, 302)
    site.pages["/three"] = Page(adapter)
    fetch(f"{ID}/a.safetensors", FetchWishes(out, civitai_token="cv"))
    asked = {path: headers.get("authorization") for _, path, headers in hub.requests + site.requests}
    assert asked == {
        f"/{ID}/resolve/main/a.safetensors": f"Bearer {TOKEN}",
        "/one": None,
        "/two": "Bearer cv",
        "/three": None,
    }


def test_headers_by_host(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    tokens = {
        url: download.headers_for(url, "cv").get("authorization")
        for url in (
            "https://huggingface.co/a",
            "https://huggingface.co.evil.org/a",
            "https://cdn-lfs.huggingface.co/a",
            "https://civitai.com/a",
            "https://civitai.com.evil.org/a",
            "http://civitai.com/a",
            "https://evil.org/civitai.com",
        )
    }
    assert [token for token in tokens.values() if token] == [f"Bearer {TOKEN}", "Bearer cv"]
    assert [url for url, token in tokens.items() if token] == ["https://huggingface.co/a", "https://civitai.com/a"]


def test_a_folder_that_cannot_be_written(site, adapter, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be used as output folder"):
        fetch(web(site, adapter), FetchWishes(tmp_path / "file"))


def test_progress_counts_bytes(site, adapter, out):
    seen = []
    fetch(web(site, adapter), FetchWishes(out), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(adapter), len(adapter))


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_is_refused_or_harmless(site, adapter, out, seed):
    generator = torch.Generator().manual_seed(seed)
    damaged = bytearray(adapter)
    for _ in range(3):
        damaged[int(torch.randint(len(damaged), (1,), generator=generator))] ^= 1 << seed % 8
    try:
        fetch(web(site, bytes(damaged)), FetchWishes(out))
    except SdloraError as error:
        assert list(out.iterdir()) == [] and len(str(error)) < 1000
    else:
        assert there(out) == ["5.safetensors"]


def test_a_zip_of_torch_is_refused_too(site, out):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    with pytest.raises(FormatError, match="is a pickle or zip archive"):
        fetch(web(site, buffer.getvalue(), 'attachment; filename="a.pt"'), FetchWishes(out))

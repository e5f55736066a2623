"""`sdlora adapter card | sidecar | publish | fetch` as commands."""

import json
import re
import shlex
from pathlib import Path

import pytest
from shared_files import save_picture, trained

from sdlora.cli import adapter
from sdlora.cli.adapter_share import parse_sample
from sdlora.cli.main import main
from sdlora.errors import ConfigError, FormatError
from sdlora.generation.pictures.files import read_recipe
from sdlora.generation.pictures.files import save_picture as save_with_recipe


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return trained(tmp_path / "zorb.safetensors", words=("zorb2",))


def test_card_beside_the_adapter_with_the_prompt_of_its_picture(file, tmp_path, recipe, capsys):
    from PIL import Image

    (tmp_path / "made").mkdir()
    save_with_recipe(Image.new("RGB", (8, 8)), recipe, tmp_path / "made" / "a.png")
    save_picture(tmp_path / "b.jpg")
    flags = ["--sample", "made/a.png", "--sample", "b.jpg:a zorblin: blue", "--license", "mit"]
    assert main(["adapter", "card", str(file), *flags]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / name) for name in ("README.md", "samples/00.png", "samples/01.jpg")
    ]
    text = (tmp_path / "README.md").read_text()
    assert "text: 'a zorblin: blue'" in text and recipe.prompt.split('"')[0] in text
    assert b"sdlora" not in (tmp_path / "samples" / "00.png").read_bytes()
    assert main(["adapter", "card", str(file)]) == 1
    assert "README.md: is there already; name another with --out" in capsys.readouterr().err
    assert main(["adapter", "card", str(file), "--out", "c.md", "--repo", "me/zorb", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["card"], found["samples"]) == ("c.md", [])
    assert found["notes"] == ["the card names no licence; name one with --license"]
    assert 'load_lora_weights("me/zorb", weight_name="zorb.safetensors")' in (tmp_path / "c.md").read_text()


def test_samples_are_files_with_or_without_prompts(tmp_path, monkeypatch, recipe):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    save_picture(tmp_path / "a:b.png")
    save_with_recipe(Image.new("RGB", (8, 8)), recipe, tmp_path / "own.png")
    assert [(str(path), prompt) for path, prompt in map(parse_sample, ("a:b.png", "a:b.png: x:y ", "own.png:"))] == [
        ("a:b.png", ""),
        ("a:b.png", "x:y"),
        ("own.png", ""),
    ]
    assert parse_sample("own.png")[1] == read_recipe(tmp_path / "own.png").prompt
    for text in ("none.png", "none.png:a", ":a", ""):
        with pytest.raises(ConfigError, match="there is no such picture; expected PICTURE or PICTURE:PROMPT"):
            parse_sample(text)


def test_sidecar_prints_what_it_wrote(file, tmp_path, capsys):
    save_picture(tmp_path / "p.png")
    assert main(["adapter", "sidecar", str(file), "--preview", "p.png", "--weight", "0.7"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "zorb.json"), str(tmp_path / "zorb.preview.png")]
    assert main(["adapter", "sidecar", str(file), "--preview", "p.png", "--thumbnail", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == [str(tmp_path / "zorb.json"), str(file)]
    assert found["entries"]["preferred weight"] == 0.7 and len(found["sha256"]) == 64
    assert main(["adapter", "inspect", str(file)]) == 0  # its hash in the header is still that of its content


def test_publish_shows_first_and_uploads_then(file, hub, capsys):
    flags = ["adapter", "publish", str(file), "anna/zorb", "--license", "mit"]
    assert main([*flags, "--dry-run", "--private"]) == 0
    text = capsys.readouterr().out
    assert f"would go to {hub.address}/anna/zorb (private), as 'Publish Zorb':" in text
    assert "embeddings/zorb2.safetensors" in text and "license: mit" in text and hub.requests == []
    assert main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["commit"].startswith(f"{hub.address}/anna/zorb/commit/") and found["dry_run"] is False
    arrived = hub.repositories["anna/zorb"].files
    assert [entry["path"] for entry in found["files"]] == list(arrived)
    assert arrived["zorb.safetensors"] == file.read_bytes()
    assert main(flags) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("OutputError: anna/zorb: has zorb.safetensors")
    assert captured.out.startswith(f"goes to {hub.address}/anna/zorb") and "published" not in captured.out


def test_a_card_never_takes_the_place_of_an_adapter(file, tmp_path, capsys):
    plain = file.rename(tmp_path / "zorb")
    other = tmp_path / "other.SAFETENSORS"
    other.write_bytes(b"weights")
    for out, sentence in (
        (plain, "is the adapter itself"),
        (other, "a card is not written there"),
        (tmp_path, "a card"),
    ):
        before = out.read_bytes() if out.is_file() else b""
        assert main(["adapter", "card", str(plain), "--out", str(out), "--overwrite"]) in (1, 2)
        assert sentence in capsys.readouterr().err
        assert not before or out.read_bytes() == before


def test_publish_takes_a_card_or_makes_one(file, capsys):
    assert main(["adapter", "publish", str(file), "a/b", "--card", "README.md", "--base-model", "c/d"]) == 2
    assert "--card and --base-model: the card is used as it is" in capsys.readouterr().err


def test_fetch_brings_back_what_was_published(file, hub, tmp_path, capsys):
    assert main(["adapter", "publish", str(file), "anna/zorb"]) == 0
    capsys.readouterr()
    assert main(["adapter", "fetch", "anna/zorb", "--out", "got"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("got/zorb.safetensors: kohya, Stable Diffusion 1.x, 1 lora layers (unet 1), rank 2")
    assert lines[-1] == "  word      got/embeddings/zorb2.safetensors"
    assert (tmp_path / "got" / "zorb.safetensors").read_bytes() == file.read_bytes()
    assert main(["adapter", "fetch", "anna/zorb", "--out", "got"]) == 1
    assert "is there already; name another, or say --overwrite" in capsys.readouterr().err
    assert main(["adapter", "fetch", "anna/zorb", "--out", "got", "--overwrite", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == "got/zorb.safetensors" and found["words"] == []
    assert found["source"] == f"{hub.address}/anna/zorb/resolve/main/zorb.safetensors"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["zorb"], "zorb: is neither a Hugging Face id"),
        (["http://example.org/x"], "only https addresses are"),
        (["a/b", "--max-gigabytes", "0"], "--max-gigabytes is 0; expected more than 0"),
        (["a/b", "--max-gigabytes", "nan"], "--max-gigabytes is nan"),
        (["a/b", "--token", "x"], "--token is for civitai.com"),
        (["https://[", "--token", "x"], "is no address"),
        (["https://a.org/x", "--file", "y"], "--file and --revision are for the Hugging Face Hub"),
        (["a/b", "--sha256", "12"], "expected 64 hexadecimal digits"),
    ],
)
def test_fetch_refuses_what_makes_no_sense(tmp_path, monkeypatch, capsys, flags, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(["adapter", "fetch", *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flags", "token"), [([], "from-environment"), (["--token", "given"], "given")])
def test_where_civitais_token_comes_from(tmp_path, monkeypatch, flags, token):
    seen = []

    def stop(text, wishes, on_bytes):
        seen.append((text, wishes.civitai_token))
        raise FormatError("enough")

    monkeypatch.setenv("CIVITAI_TOKEN", "from-environment")
    monkeypatch.setattr("sdlora.sharing.fetch.fetch", stop)
    address = "https://civitai.com/api/download/models/5"
    assert main(["adapter", "fetch", address, *flags, "--out", str(tmp_path)]) == 1
    assert seen == [(address, token)]


@pytest.mark.parametrize("command", ["card", "sidecar", "publish", "fetch"])
def test_each_has_its_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main(["adapter", command, "--help"])
    assert end.value.code == 0 and "--json" in capsys.readouterr().out


def test_commands_in_the_documents_are_understood():
    root = Path(__file__).parents[2]
    text = "\n".join((root / name).read_text() for name in ("README.md", "docs/formats.md"))
    lines = re.findall(r"^    sdlora adapter ((?:card|sidecar|publish|fetch) .*?)(?:   .*)?$", text, re.M)
    assert len(lines) == 8
    for line in lines:
        assert adapter._parser().parse_args(shlex.split(line)).run

"""`sdlora dataset check` as a person and as a script meets it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from check_help import photo, save

from sdlora.cli import dataset, dataset_check
from sdlora.errors import ConfigError, DataError


def run(*words: str | Path) -> int:
    """Return the exit status of `sdlora dataset check` with these words."""
    parser = argparse.ArgumentParser()
    dataset_check.add_parser(parser.add_subparsers())
    options = parser.parse_args(["check", *map(str, words)])
    return int(options.run(options))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A folder of three pictures with which nothing is wrong at 64 pixels."""
    for seed in range(3):
        save(tmp_path / "good", f"{seed}.png", seed, f"zorblin, thing {seed}")
    return tmp_path / "good"


def test_the_report_of_good_data(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(good, "--resolution", "64") == 0
    assert capsys.readouterr().out.splitlines() == [
        "folder: 1 concept, 3 pictures, all captioned",
        "  resolution 64",
        "  without --base, captions are not looked at as the text encoder sees them",
        "",
        "concepts:",
        "  good  3 pictures, repeats 1: 3 draws an epoch, 100%",
        "",
        "shapes: 1",
        "      64x64      3    0.0% cropped  ##############################",
        "  0.0% cropped on average, at most 0.0%; batches of 1: 3 an epoch, 0 of them short",
        "",
        "most frequent tags: zorblin (3)",
        "  on every picture: zorblin",
        "",
        "a training run would take this data; nothing was found",
    ]


def test_it_is_a_command_of_sdlora_dataset(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dataset.run(["check", str(good), "--resolution", "64", "--headers-only"]) == 0
    assert capsys.readouterr().out.startswith("folder: 1 concept, 3 pictures, all captioned\n")


def test_warnings_alone_leave_the_status_at_0(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(good, "small.png", photo(9, (32, 32)), "zorblin, small")
    assert run(good, "--resolution", "64") == 0
    said = capsys.readouterr().out
    assert "warning: pictures smaller than their shape (1)\n" in said
    assert f"  {good}/small.png: 32x32 is enlarged 2.0x for 64x64\n  -> enlarging adds blur" in said
    assert said.endswith("\na training run would take this data: 1 warning\n")


def test_what_training_would_refuse_is_status_1(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (good / "1.txt").unlink()
    (good / "2.png").write_bytes(b"")
    assert run(good, "--resolution", "64") == 1
    said = capsys.readouterr().out
    assert f"error: pictures that cannot be read (1)\n  {good}/2.png: is empty;" in said
    assert f"error: files that cannot be used as they are (1)\n  {good}/1.png: has no caption file" in said
    assert said.endswith("a training run would refuse this data: 2 errors\n")


def test_the_json_document(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = save(good, "small.png", photo(9, (32, 16)), "zorblin, small")
    assert run(good, "--resolution=64", "--json", "--data.trigger", "zorblin") == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document) == [
        "ok", "summary", "notes", "base", "resolutions", "resolution_assumed", "headers_only", "concepts", "shapes",
        "cropped", "batches", "tags", "tags_on_every_picture", "findings", "pictures",
    ]  # fmt: skip
    assert document["ok"] is True and document["base"] is None and document["resolutions"] == [64]
    assert document["concepts"] == [
        {
            "name": "good", "folder": str(good), "trigger": "zorblin", "prior": False,
            "pictures": 4, "repeats": 1, "draws": 4, "share": 1.0,
        }
    ]  # fmt: skip
    assert document["batches"] == {"size": 1, "count": 4, "short": 0, "left_out": 0, "drawn_again": 0}
    assert document["tags"][0] == {"tag": "zorblin", "pictures": 4}
    (finding,) = document["findings"]
    assert list(finding) == ["kind", "severity", "title", "advice", "count", "items"]
    assert (finding["kind"], finding["severity"], finding["count"]) == ("enlarged", "warning", 1)
    assert finding["items"][0]["files"] == [str(small)]
    assert document["pictures"][3] == {
        "file": str(small), "part": "training", "concept": "good", "width": 32, "height": 16, "format": "PNG",
        "mode": "RGB", "shape": [88, 40], "cropped": 0.0909, "enlarged": 2.75, "mask": None,
        "caption": "zorblin, small", "texts": 1,
    }  # fmt: skip


def test_findings_are_listed_up_to_a_limit(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(12):
        save(good, f"small-{seed:02d}.png", photo(20 + seed, (32, 32)), f"small {seed}")
    run(good, "--resolution", "64")
    said = capsys.readouterr().out
    assert said.count("is enlarged") == 10 and "  and 2 more; --limit 12 lists them\n" in said
    run(good, "--resolution", "64", "--limit", "3")
    assert capsys.readouterr().out.count("is enlarged") == 3
    run(good, "--resolution", "64", "--json")
    assert len(json.loads(capsys.readouterr().out)["findings"][0]["items"]) == 12
    run(good, "--resolution", "64", "--json", "--limit", "0")
    finding = json.loads(capsys.readouterr().out)["findings"][0]
    assert finding["count"] == 12 and finding["items"] == []


def test_settings_come_from_the_file_and_flags_go_before_it(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f'[data]\nfolder = "{good}"\nresolution = 64\nrepeats = 3\n[training]\nbatch_size = 2\n'
        '[data.buckets]\nshort_batches = "drop"\n[output]\nfolder = "elsewhere"\n'
    )
    assert run("--config", file) == 0
    assert "batches of 2: 4 an epoch, 0 of them short, 1 pictures left out\n" in capsys.readouterr().out
    assert run("--config", file, "--data.buckets.short-batches", "keep", "--data.repeats=2") == 0
    assert "batches of 2: 3 an epoch, 0 of them short\n" in capsys.readouterr().out
    other = tmp_path / "other"
    save(other, "x.png", 5)
    assert run(other, "--config", file, "--training.batch_size", "1") == 0
    assert "folder: 1 concept, 1 picture, all captioned" in capsys.readouterr().out


def test_a_base_tells_its_resolution_and_what_captions_lose(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(good, "long.png", 7, "zorblin " * 20)
    assert run(good, "--base", "tiny", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["base"], document["resolutions"]) == ("Stable Diffusion 1.x", [128])
    assert "caption-cut" in [finding["kind"] for finding in document["findings"]]


def test_validation_pictures_must_be_others(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(good, "--resolution", "64", "--validation", good) == 1
    assert "error: pictures that are trained on and validated on (3)" in capsys.readouterr().out


def test_the_sheets_are_written_and_named(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, sheet = tmp_path / "out" / "page.html", tmp_path / "out" / "sheet.png"
    assert run(good, "--resolution", "64", "--html", page, "--sheet", sheet, "--headers-only") == 0
    said = capsys.readouterr().out
    assert said.endswith(f"\ncontact sheet: {page}\ncontact sheet: {sheet}\n") and "only headers were read" in said
    assert page.read_text().count("<figure") == 3 and sheet.read_bytes().startswith(b"\x89PNG")
    assert run(good, "--resolution", "64", "--html", page, "--json") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


@pytest.mark.parametrize(
    ("words", "kind", "sentence"),
    [
        ([], ConfigError, "data.folder is not set"),
        (["nowhere"], DataError, "nowhere: there is no such folder"),
        (["DIR", "--resolution", "100"], ConfigError, "data.resolution is 100; it must be a multiple of 8"),
        (["DIR", "--resolution", "big"], ConfigError, "data.resolution is 'big'"),
        (["DIR", "--data.repeats", "0"], ConfigError, "data.repeats is '0'"),
        (["DIR", "--data.background", "blu"], ConfigError, 'data.background: "blu" is no colour'),
        (["DIR", "--data.background", "blu", "--headers-only"], ConfigError, 'data.background: "blu" is no colour'),
        (["DIR", "--limit", "-1"], ConfigError, "--limit is -1; expected 0 or more"),
        (["DIR", "--config", "missing.toml"], ConfigError, "missing.toml: there is no such configuration file"),
    ],
)
def test_wrong_use_is_one_sentence(good: Path, words: list[str], kind: Any, sentence: str) -> None:
    with pytest.raises(kind) as caught:
        run(*(str(good) if word == "DIR" else word for word in words))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_flag_is_refused(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(good, "--data.resolutoin", "64")
    assert caught.value.code == 2 and "--data.resolutoin" in capsys.readouterr().err


def test_help_is_quick() -> None:
    """Without torch: its import alone takes seconds."""
    code = (
        "import argparse, sys; from sdlora.cli import dataset_check\n"
        "parser = argparse.ArgumentParser(); dataset_check.add_parser(parser.add_subparsers())\n"
        "try: parser.parse_args(['check', '--help'])\nexcept SystemExit: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", f"{code}sys.exit('torch' in sys.modules)"], capture_output=True)
    assert done.returncode == 0 and b"--headers-only" in done.stdout and b"--data.SETTING" in done.stdout

"""The documents are true: settings as in the code, commands that parse, links that lead somewhere.

`python tests/test_docs.py` writes the table of settings into docs/training.md again, and those of round trips into
docs/formats.md.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import round_trips
from round_trips import KINDS, key_sets_table, round_trips_row, round_trips_table

from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.cli.batch import _parser as batch_parser
from sdlora.cli.generate import _parser as generate_parser
from sdlora.cli.train import parse_arguments
from sdlora.config import TrainConfig, field_descriptions, require_complete, setting_at
from sdlora.generation.batch.grid import parse_axis
from sdlora.generation.batch.jobs import read_jobs

ROOT = Path(__file__).parents[1]
FORMATS = ROOT / "docs" / "formats.md"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "datasets" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]


def settings_table() -> str:
    defaults = TrainConfig()
    lines = ["| setting | default | |", "|---|---|---|"]
    for key, description in field_descriptions().items():
        value = setting_at(defaults, key)
        shown = " ".join(map(str, value)) if isinstance(value, tuple | dict) else str(value)
        lines.append(f"| `{key}` | {shown} | {description} |")
    return "\n".join(lines)


def commands(document: Path) -> list[list[str]]:
    """The sdlora command lines shown in a document, as words."""
    text = re.sub(r"\s*\\\n\s*", " ", document.read_text(encoding="utf-8"))
    lines = re.findall(
        r"^    (?:.*?)((?:sdlora (?:train|generate|batch|app)|accelerate launch train/train_lora\.py) .*)$", text, re.M
    )
    return [shlex.split(re.split(r"\s{4,}", line)[0]) for line in lines]


ALL_COMMANDS = [(document.name, words) for document in DOCUMENTS for words in commands(document)]


def test_the_table_of_settings_is_the_code() -> None:
    assert settings_table() in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_layers_counted_are_those_of_the_true_architectures() -> None:
    assert key_sets_table() in FORMATS.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_round_trips_is_what_happens(kind: str) -> None:
    assert f"\n{round_trips_row(kind)}\n" in FORMATS.read_text(encoding="utf-8")


def test_a_format_that_loses_something_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_half(path: Path) -> AdapterFile:
        adapter = read_adapter(path)
        return replace(adapter, layers=dict(list(adapter.layers.items())[::2]))

    monkeypatch.setattr(round_trips, "read_adapter", read_half)
    with pytest.raises(AssertionError, match="other bytes"):
        round_trips_row("LoRA")


def test_there_are_commands_to_check() -> None:
    assert len(ALL_COMMANDS) >= 6


@pytest.mark.parametrize(("document", "words"), ALL_COMMANDS)
def test_commands_shown_are_understood(document: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if words[:2] == ["sdlora", "generate"]:
        assert generate_parser().parse_args(words[2:]).prompt
    elif words[:2] == ["sdlora", "batch"]:
        options = batch_parser().parse_args(words[2:])
        assert options.jobs or options.prompt
        assert all(parse_axis(text).values for text in options.grid)
    elif words[:2] == ["sdlora", "train"] or words[0] == "accelerate":
        arguments = words[2:] if words[0] == "sdlora" else words[3:]
        if arguments[1:2] != ["run.toml"]:
            config = parse_arguments(arguments)
            require_complete(config)
            assert config.output.folder.startswith("runs/")


@pytest.mark.parametrize(("name", "count"), [("jobs.txt", 3), ("jobs.csv", 2), ("jobs.jsonl", 1), ("jobs.toml", 17)])
def test_jobs_files_shown_are_understood(name: str, count: int, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    shown = re.search(rf"^`{name}`:.*?\n\n((?:    .*\n|\n)+)", text, re.M)
    assert shown
    (tmp_path / name).write_text(textwrap.dedent(shown[1]), encoding="utf-8")
    assert len(read_jobs(tmp_path / name, {}, find_adapter=Path)) == count


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_documents_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:docs|train|benchmarks|datasets|sdlora/assets)/[\w./-]+\.(?:md|py|toml|png)\b", text))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
    assert "@" not in re.sub(r"`[^`]*`|```.*?```", "", text, flags=re.S) or document.name != "README.md"


def test_the_example_configuration_is_complete() -> None:
    config = parse_arguments(["--config", str(ROOT / "train" / "example.toml")])
    require_complete(config)
    assert (ROOT / config.data.folder).is_dir() and (ROOT / config.validation.folder).is_dir()


def between(marker: str, text: str, table: str) -> str:
    """The text with the table between `<!-- marker -->` and `<!-- end -->`."""
    found = re.subn(
        rf"(<!-- {marker} -->\n).*?(?=<!-- end -->)", lambda match: f"{match[1]}{table}\n", text, flags=re.S
    )
    assert found[1] == 1, f"{marker}: expected once"
    return found[0]


if __name__ == "__main__":
    path = ROOT / "docs" / "training.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(
        re.sub(
            r"@SETTINGS@|\| setting \| default.*?\n(?=\n)", lambda _: settings_table() + "\n", text, count=1, flags=re.S
        ).replace("|\n\n\n", "|\n\n"),
        encoding="utf-8",
    )
    text = FORMATS.read_text(encoding="utf-8")
    for marker, table in (("layers", key_sets_table()), ("round trips", round_trips_table())):
        text = between(marker, text, table)
    FORMATS.write_text(text, encoding="utf-8")

"""`sdlora train --config FILE.toml --section.field value`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlora import (
    Engine,
    LoadedBase,
    RunResult,
    TrainConfig,
    load_config,
    make_request,
    parse_config,
    save_picture,
    train,
)
from sdlora.config import PriorSection, SamplesSection, field_descriptions, is_table, put_setting, setting_at
from sdlora.errors import ConfigError

_DESCRIPTION = """Train a LoRA adapter on a folder of pictures.

Settings come from --config FILE.toml; flags of the same names go first. A first run needs only:
  sdlora train --base.path tiny --data.folder pictures --output.folder runs/first
"""


def run(arguments: list[str]) -> int:
    """Train as the command line says; returns the exit status."""
    config = parse_arguments(arguments)
    result = train(config, preview=make_previews, class_pictures=make_class_pictures)
    if result.main_process:
        _report(result)
    return 130 if result.interrupted else 0


def _report(result: RunResult) -> None:
    if result.interrupted:
        print(
            f"stopped after step {result.steps} of {result.planned_steps}; the adapter is saved in "
            f"{result.adapter}; go on with --training.resume True"
        )
        return
    if result.loss_before is not None and result.loss_after is not None:
        print(f"held-out loss {result.loss_before:.4f} -> {result.loss_after:.4f}")
    print(result.effect.sentence())
    for path in result.formats.values():
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        print(f"adapter: {path} ({sum(file.stat().st_size for file in files) / 1024:.0f} KB)")
    for path in result.embeddings:
        needed = "" if result.effect.words_alone else " (share both, or set tokens.save = bundled for one file)"
        print(f"new word: {path}{needed}")


def parse_arguments(arguments: Sequence[str]) -> TrainConfig:
    """Return the configuration of a command line: the TOML file's values, then the flags'. Raises ConfigError."""
    words = _joined_negatives([_with_underscores(word) for word in arguments])
    options, unknown = _parser().parse_known_args(words)
    flags = {key: value for key, value in vars(options).items() if key != "config"}
    values = load_config(Path(options.config)) if options.config else {}
    stray = [word for word in unknown if not word.startswith("--")]
    if stray and len(stray) == len(unknown):
        raise ConfigError(f"{stray[0]!r} belongs to no flag; settings are given as --section.field value")
    for word in unknown:
        if word.startswith("--"):
            key = word.removeprefix("--").partition("=")[0]
            _refuse_table(key)
            flags[key] = ""
    for key, value in flags.items():
        put_setting(values, key, value)
    return parse_config(values, options.config or "command line")


def _refuse_table(key: str) -> None:
    """Raise ConfigError for a flag of a setting that only a file can hold, or of a part of one."""
    for table in filter(is_table, field_descriptions()):
        if key == table or key.startswith(f"{table}."):
            brackets = f"[[{table}]]" if table == "data.concepts" else f"[{table}]"
            raise ConfigError(f"--{key}: {table} has no flag; write the table {brackets} in the file of --config")


def _with_underscores(word: str) -> str:
    """Return "--section.some_field" for "--section.some-field", the value untouched."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def _joined_negatives(words: Sequence[str]) -> list[str]:
    """Return the words with "--flag -1e-4" as "--flag=-1e-4", which argparse would take for two flags."""
    joined: list[str] = []
    for word in words:
        if re.fullmatch(r"-\.?\d.*", word) and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _parser() -> argparse.ArgumentParser:
    """Return a parser with one text flag a setting; what a value must be is the configuration's to say."""
    parser = argparse.ArgumentParser(
        prog="sdlora train",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        usage="sdlora train [--config FILE.toml] [--section.field VALUE ...]",
    )
    parser.add_argument("--config", default="", metavar="FILE.toml", help="settings of the run, a table a section")
    defaults = TrainConfig()
    groups: dict[str, Any] = {"": parser}
    for key, description in field_descriptions().items():
        if is_table(key):
            continue
        section = key.rpartition(".")[0].partition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(f"[{section}]")
        default = setting_at(defaults, key)
        many = isinstance(default, tuple)
        shown = " ".join(map(str, default)) if many else str(default)
        groups[section].add_argument(
            f"--{key}",
            dest=key,
            metavar="VALUE",
            nargs="*" if many else None,
            help=f"{description} (default: {shown or 'none'})".replace("%", "%%"),
        )
    return parser


def make_previews(base: LoadedBase, adapter: str, samples: SamplesSection, folder: Path) -> list[Path]:
    """The sample pictures of a run are in `folder`; returns their paths, in the order of the prompts."""
    engine = Engine(base, live_adapters={adapter: 1.0})
    paths = []
    for number, prompt in enumerate(samples.prompts):
        request = make_request(
            prompt=prompt,
            seed=samples.seed + number,
            steps=samples.steps,
            guidance_scale=samples.guidance_scale,
        )
        for picture, recipe in engine.generate(request):
            path = folder / f"{number:02d}.png"
            save_picture(picture, recipe, path, replace=True)
            paths.append(path)
    return paths


def make_class_pictures(
    base: LoadedBase, prompt: str, prior: PriorSection, side: int, paths: Mapping[int, Path]
) -> None:
    """Square pictures of a class prompt are at `paths`; number n has the seed `prior.seed` + n."""
    base.fetch_unet()
    engine = Engine(base)
    for number, path in paths.items():
        request = make_request(
            prompt=prompt,
            seed=prior.seed + number,
            steps=prior.steps,
            guidance_scale=prior.guidance_scale,
            width=side,
            height=side,
        )
        for picture, recipe in engine.generate(request):
            save_picture(picture, recipe, path, replace=True)

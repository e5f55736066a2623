"""What a run saves: its adapter in every format that was asked for, each read back and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sdlora.adapters.convert import with_metadata
from sdlora.adapters.file import AdapterFile, first_non_finite
from sdlora.adapters.formats import kohya, peft
from sdlora.adapters.verify import verify_written
from sdlora.adapters.write import refuse_foreign_folder, word_files, write_adapter
from sdlora.config import TrainConfig
from sdlora.errors import FormatError, TrainingError
from sdlora.training.trainee import triggers


def places(config: TrainConfig, folder: Path) -> dict[str, Path]:
    """Return {format: where the finished adapter goes}, the one that other programs read best first."""
    name = config.output.name
    named = {
        format: f"{name}-{format}{'' if format == peft.NAME else '.safetensors'}" for format in config.output.formats
    }
    if kohya.NAME in named:
        named = {kohya.NAME: f"{name}.safetensors"} | {key: named[key] for key in named if key != kohya.NAME}
    return {format: folder / file for format, file in named.items()}


def check_places(config: TrainConfig, folder: Path) -> None:
    """Raise OutputError for what lies where the adapter will go and may not be replaced: known before the run, not after."""
    if place := places(config, folder).get(peft.NAME):
        refuse_foreign_folder(place)


def save_on_the_way(adapter: AdapterFile, path: Path, config: TrainConfig) -> None:
    """`path` is kohya's file of the adapter, its words inside: files of their own would be those that later steps write.

    Raises TrainingError, writing nothing, when it holds NaN or cannot be held by the file.
    """
    _refuse_diverged(adapter, path)
    try:
        write_adapter(with_metadata(adapter, config.output.metadata), path, kohya.NAME, bundle=True)
    except FormatError as error:
        raise TrainingError(str(error)) from error


def save_finished(adapter: AdapterFile, config: TrainConfig, folder: Path) -> dict[str, Path]:
    """The adapter is in the folder in every format, and reads back as what was trained; returns where.

    Raises TrainingError, writing nothing, when it holds NaN; also where a format cannot hold it or does not read back,
    whose message names the file: the formats before it are there then.
    """
    found = places(config, folder)
    _refuse_diverged(adapter, next(iter(found.values())))
    adapter = with_metadata(adapter, config.output.metadata)
    try:
        for format, path in found.items():
            write_adapter(adapter, path, format, bundle=config.tokens.save == "bundled")
            verify_written(adapter, path)
    except FormatError as error:
        raise TrainingError(str(error)) from error
    return found


def word_places(config: TrainConfig, saved: Mapping[str, Path]) -> tuple[Path, ...]:
    """Return the files of new words that go with the first of the saved adapters, or lie beside it where words are all."""
    if config.tokens.train == "none" or config.tokens.save == "bundled":
        return ()
    format, adapter = next(iter(saved.items()))
    beside = adapter / peft.CONFIG if format == peft.NAME else adapter
    files = word_files(beside, triggers(config), with_layers=config.tokens.train != "alone")
    return tuple(file for file in files.values() if file != adapter)


def _refuse_diverged(adapter: AdapterFile, path: Path) -> None:
    """Raise TrainingError when the adapter, which would go to `path`, holds NaN or infinity."""
    if name := first_non_finite(adapter):
        raise TrainingError(f"{path}: the adapter diverged and was not saved; {name} holds NaN or infinity")

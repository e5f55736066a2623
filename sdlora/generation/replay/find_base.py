"""Where the base of a recipe lies: found by its hash, whatever it is called now."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from sdlora.config import BaseSection
from sdlora.errors import FormatError, ModelError
from sdlora.families.detect import BaseFacts, detect_base, family_of
from sdlora.families.registry import base_sha256
from sdlora.families.sources import find_base
from sdlora.generation.recipe import Recipe
from sdlora.storage import remembered_sha256, user_path

FindBase = Callable[[Recipe], BaseSection]
"""Return how the base of a recipe is loaded. Raises SdloraError where it is not there."""
_VARIANTS = ("", "fp16")
_LARGE_BYTES = 64 << 20
OnBase = Callable[[Path], None]
"""Called before a base is hashed, which takes half a minute for the largest."""


def base_finder(
    named: BaseSection | None = None, models: Path | None = None, on_base: OnBase | None = None
) -> FindBase:
    """Return what finds a recipe's base: the one named, else the tiny one, then those below a folder.

    Of those below a folder the ones of its family are hashed, first those of its name and those whose hash is known. It raises
    ModelError, with the hash that was wanted and the one that was found, where none has it.
    """

    def find(recipe: Recipe) -> BaseSection:
        first = named or BaseSection(path="tiny")
        found = dict(_hashes(find_base(first), first.variant, on_base))
        below = ((path, BaseSection(path=str(path))) for path in (_below(models, recipe) if models else ()))
        for variant, digest in found.items():
            if digest == recipe.base_sha256:
                return first.model_copy(update={"variant": variant})
        for path, section in below:
            for variant, digest in _hashes(path, "", on_base):
                if digest == recipe.base_sha256:
                    more = {"variant": variant, "config": first.config, "tokenizer": first.tokenizer}
                    return section.model_copy(update=more)
        other = f"{named.path} has {min(found.values())[:16]}..." if named and found else ""
        raise ModelError(_not_found(recipe, other, models))

    return find


def _not_found(recipe: Recipe, other: str, models: Path | None) -> str:
    wanted = (
        f"the picture's base is {recipe.base[:100]} ({recipe.base_family}) with SHA-256 {recipe.base_sha256[:16]}..."
    )
    if other:
        return f"{wanted}, but {other}; name that base with --base, or the folder that it is in with --models"
    place = f"is not below {models}" if models else "was not named"
    return f"{wanted}, which {place}; name it with --base, or the folder that it is in with --models"


def _hashes(path: Path, variant: str, on_base: OnBase | None) -> Iterator[tuple[str, str]]:
    """Yield (variant, hash) of the base at `path`. Raises as `detect_base` where it is none."""
    variants = [variant] if variant or path.is_file() else _VARIANTS
    problems: list[Exception] = []
    for wanted in variants:
        try:
            facts = detect_base(path, wanted)
        except (ModelError, FormatError) as error:
            problems.append(error)
            continue
        if on_base and _takes_long(facts):
            on_base(path)
        yield wanted, base_sha256(facts)
    if len(problems) == len(variants):
        raise problems[0]


def _takes_long(facts: BaseFacts) -> bool:
    files = {file for found in facts.files.values() for file in found}
    return any(file.stat().st_size >= _LARGE_BYTES and not remembered_sha256(file) for file in files)


def _below(models: Path, recipe: Recipe) -> list[Path]:
    """Return the bases below a folder that may be the recipe's, the likeliest first. Raises FormatError for no folder."""
    folder = user_path(models)
    if not folder.is_dir():
        raise FormatError(f"{folder}: there is no such folder; --models names the one that your bases are in")
    family = [path for path in _candidates(folder) if _is_of(path, recipe.base_family)]
    return sorted(
        family, key=lambda path: (recipe.base not in (path.stem, path.name), not _is_remembered(path), str(path))
    )


def _is_remembered(path: Path) -> bool:
    return path.is_file() and bool(remembered_sha256(path))


def _candidates(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        if "model_index.json" in files:
            folders.clear()
            yield Path(place)
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(files) if name.lower().endswith(".safetensors"))


def _is_of(path: Path, family: str) -> bool:
    try:
        return family_of(path).name == family
    except (ModelError, FormatError, OSError):
        return False

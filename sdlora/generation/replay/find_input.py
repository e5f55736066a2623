"""The files that a picture was made from, found again by their hashes: its start, mask, upscaler, ControlNets and maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdlora.errors import DataError
from sdlora.families.controls import control_sha256, find_cached_control
from sdlora.families.sources import is_hub_id
from sdlora.generation.recipe import Recipe
from sdlora.storage import is_there, sha256_of_file

FindInput = Callable[[str, str], Path]
"""Returns the file of that name, or of any other, that has that SHA-256; raises SdloraError where there is none."""


def input_finder(folders: Sequence[Path]) -> FindInput:
    """Return what finds files in these folders, not below them: by name first, then among all files by hash.

    Folders of ControlNets are found so too, and in the cache those that have the name of a Hugging Face id.
    """

    def find(name: str, sha256: str) -> Path:
        for file in _candidates(folders, name):
            with suppress(OSError):  # one that must not be read is not it
                if (control_sha256(file) if file.is_dir() else sha256_of_file(file)) == sha256:
                    return file
        places = " or ".join(str(folder) for folder in folders)
        raise DataError(
            f"the picture was made from {name} (SHA-256 {sha256[:12]}), which is not in {places}; put it there"
        )

    return find


def input_settings(recipe: Recipe, find: FindInput) -> dict[str, Any]:
    """Return the fields of a request that say what a picture starts from, what leads it and how it is enlarged."""
    settings: dict[str, Any] = {"vae_tiling": "on" if recipe.vae_tiling else "off"}
    if start := recipe.start:
        image = find(start.picture.name, start.picture.sha256)
        settings |= {"image": str(image), "strength": start.strength, "resize": start.resize}
        if mask := start.mask:
            settings |= {
                "mask": str(find(mask.picture.name, mask.picture.sha256)),
                "mask_blur": mask.blur,
                "inpaint_area": mask.area,
                "masked_padding": mask.padding,
                "masked_content": mask.content,
            }
    if recipe.controls:
        settings["control"] = [
            {
                "model": str(find(used.model, used.sha256)),
                "image": str(find(used.picture.name, used.picture.sha256)),
                **{name: getattr(used, name) for name in ("strength", "start", "end")},
            }
            for used in recipe.controls
        ]
        settings["resize"] = recipe.controls[0].resize
    if hires := recipe.hires:
        upscaler = hires.upscaler
        if hires.upscaler_sha256:
            upscaler = str(find(hires.upscaler, hires.upscaler_sha256))
        settings |= {
            "hires_scale": hires.scale,
            "hires_steps": hires.steps,
            "hires_strength": hires.strength,
            "hires_upscaler": upscaler,
        }
    return settings


def _candidates(folders: Sequence[Path], name: str) -> Iterator[Path]:
    """Yield files, those of that name first, then those whose names begin so; a name never leads out of a folder.

    Raises DataError for what is no folder.
    """
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise DataError(f"{missing[0]}: there is no such folder of pictures to look in")
    plain = Path(name).name
    yield from (folder / plain for folder in folders if is_there(folder / plain) and _may_be(folder / plain))
    if is_hub_id(name) and (cached := find_cached_control(name)):
        yield cached
    for folder in folders:
        others = [file for file in folder.iterdir() if file.name != plain and _may_be(file)]
        yield from sorted(others, key=lambda file: (not file.name.startswith(plain), file))


def _may_be(path: Path) -> bool:
    return path.is_file() or (path / "config.json").is_file()

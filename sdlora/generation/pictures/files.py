"""Picture files that carry their recipe, as sdlora's JSON and as the line other programs read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdlora.errors import ConfigError, FormatError, first_line
from sdlora.generation.pictures.infotext import infotext
from sdlora.generation.pictures.names import DEFAULT_TEMPLATE, picture_path
from sdlora.generation.pictures.texts import INFOTEXT, RECIPE, SAVED_AS, exif_with, read_texts, xmp_with
from sdlora.generation.recipe import Recipe
from sdlora.storage import atomic_path, user_path, write_new

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
"""Pillow's name of a format -> what it is asked for by."""
DEFAULT_QUALITY = 90
_LONGEST_METADATA = "the prompt is too long for a JPEG, which holds 64 KB of text; save as PNG or WebP"


@dataclass(frozen=True)
class Compression:
    """How a JPEG or WebP is compressed; a PNG always keeps every bit."""

    quality: int = DEFAULT_QUALITY
    lossless: bool = False


class FileFormat(NamedTuple):
    """What files pictures become, as `save_picture` takes it."""

    suffix: str = ".png"
    quality: int | None = None
    lossless: bool = False


PNG = FileFormat()


def png_info(recipe: Recipe) -> PngInfo:
    """Return the text chunks of a picture: key "sdlora" the recipe as JSON, key "parameters" the infotext."""
    info = PngInfo()
    info.add_itxt(INFOTEXT, _sound(infotext(recipe)))
    info.add_itxt(RECIPE, _sound(recipe.to_json()))
    return info


def save_picture(
    picture: Image.Image,
    recipe: Recipe,
    path: Path | str,
    *,
    quality: int | None = None,
    lossless: bool = False,
    replace: bool = False,
) -> Path:
    """Return the file that holds the picture with its recipe inside, in the format of the path's suffix.

    It is `path`, or NAME-2, NAME-3 where that is taken: nothing is overwritten, unless `replace` says so. `quality`, 1 to
    100, is of JPEG and WebP (90), `lossless` of WebP. Raises ConfigError for a suffix or quality that is none, OutputError
    where the file cannot be written.
    """
    path = user_path(path)
    compression = check_compression(path.suffix, quality, lossless)
    save = partial(_save, picture, recipe, SUFFIXES[path.suffix.lower()], compression)
    if not replace:
        return write_new(path, lambda temporary: _explained(save, temporary, path))
    with atomic_path(path) as temporary:
        _explained(save, temporary, path)
    return path


def check_compression(suffix: str, quality: int | None, lossless: bool) -> Compression:
    """Return how a picture of that suffix is compressed. Raises ConfigError for what makes no sense."""
    kind = SUFFIXES.get(suffix.lower())
    if kind is None:
        raise ConfigError(
            f"pictures are saved as .png, .jpg, .jpeg or .webp, not as {suffix[:20] or 'a name without suffix'!r}"
        )
    if quality is not None and not 1 <= quality <= 100:
        raise ConfigError(f"quality is {quality}; expected 1 to 100")
    if quality is not None and kind == "PNG":
        raise ConfigError("quality is for jpg and webp; a png keeps every bit")
    if lossless and kind == "JPEG":
        raise ConfigError("a jpg cannot be lossless; choose png or webp")
    return Compression(DEFAULT_QUALITY if quality is None else quality, lossless or kind == "PNG")


def read_recipe(path: Path | str) -> Recipe:
    """Return the recipe of a picture that sdlora made. Raises FormatError where there is none."""
    text = read_texts(user_path(path)).texts.get(RECIPE)
    if text is None:
        raise FormatError(f"{path}: carries no sdlora recipe")
    try:
        return Recipe.from_json(text)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def picture_name(recipe: Recipe) -> str:
    """Return a file name that tells seed and prompt: "00042-a-red-ball.png"."""
    return picture_path(recipe, DEFAULT_TEMPLATE).name


# --- formats -----------------------------------------------------------------------------------------


def pixel_options(kind: str, compression: Compression) -> dict[str, Any]:
    """Return what Pillow is told so that the pixels are compressed so."""
    if kind == "JPEG":  # colours are kept as fine as brightness, or edges of saturated shapes fray
        return {"quality": compression.quality, "subsampling": "4:4:4"}
    if kind == "WEBP":
        return {"quality": compression.quality, "lossless": compression.lossless}
    return {}


def _save(picture: Image.Image, recipe: Recipe, kind: str, compression: Compression, path: Path) -> None:
    if kind == "PNG":
        picture.save(path, format=kind, pnginfo=png_info(recipe))
        return
    # ASCII, since not every program that carries XMP on understands its encoding.
    texts = {RECIPE: json.dumps(json.loads(recipe.to_json()), sort_keys=True)}
    if not compression.lossless:
        texts[SAVED_AS] = json.dumps(asdict(compression))
    options = pixel_options(kind, compression)
    picture.save(path, format=kind, exif=exif_with(infotext(recipe)), xmp=xmp_with(texts), **options)


def _explained(save: Callable[[Path], None], temporary: Path, path: Path) -> None:
    """`save` is done, and what Pillow says of it is a sentence of ours."""
    try:
        save(temporary)
    except ValueError as error:
        told = _LONGEST_METADATA if "too long" in str(error) else first_line(error)
        raise ConfigError(f"{path}: cannot be written ({told})") from error


def _sound(text: str) -> str:
    """Return the text with ? in place of halves of characters, which a command line may hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()

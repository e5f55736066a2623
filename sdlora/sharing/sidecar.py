"""The files that AUTOMATIC1111 and Forge keep beside an adapter: what to prompt, how strongly, a picture.

`name.json` and `name.preview.png`, by the stem of the adapter's file. Or a picture inside the file, which other programs
read: ModelSpec's `modelspec.thumbnail`, a data URL.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.errors import ConfigError, FormatError, OutputError
from sdlora.headers import read_header
from sdlora.sharing.facts import AdapterFacts, adapter_facts
from sdlora.sharing.samples import preview_png, thumbnail_url
from sdlora.storage import is_there, rewrite_metadata, sha256_of_file, write_bytes

THUMBNAIL = "modelspec.thumbnail"
_VERSIONS = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}
_UNSET = ("", 0, None, "Unknown")
"""What these programs write where the user has entered nothing."""
_TAKEN_FIRST = (".png", ".jpg", ".jpeg", ".webp", ".gif")
"""What these programs look for too: the first of these before NAME.preview.png, the others in no certain order."""
_LARGEST_WEIGHT, _LARGEST_FILE = 10.0, 10_000_000


@dataclass(frozen=True)
class Wishes:
    """What the user said that the sidecar shall say; None leaves it as it is."""

    weight: float | None = None
    notes: str | None = None
    negative: str | None = None


@dataclass(frozen=True)
class Written:
    """What lies beside or in the adapter now."""

    files: tuple[Path, ...]
    entries: dict[str, Any]
    """Of the JSON file."""
    sha256: str = ""
    """Of the adapter, where a thumbnail in its header has changed it."""
    notes: tuple[str, ...] = ()


def write_sidecar(
    path: Path | str,
    wishes: Wishes,
    *,
    preview: Path | None = None,
    thumbnail: bool = False,
    overwrite: bool = False,
) -> Written:
    """The JSON file lies beside the adapter and, if there is one, the preview; with `thumbnail` that is in its header.

    What a JSON file there says stays, but for what is unset and what `wishes` say otherwise. Raises SdloraError,
    and has then written nothing, where a picture is there already and may not be replaced, or a file is not what it
    should be.
    """
    facts = adapter_facts(path)
    adapter = facts.path.resolve() if thumbnail else facts.path  # a link goes on leading to it
    if thumbnail and preview is None:
        raise ConfigError("--thumbnail needs a picture; name it with --preview")
    if wishes.weight is not None and not abs(wishes.weight) <= _LARGEST_WEIGHT:
        raise ConfigError(f"--weight is {wishes.weight:g}; expected a number from -10 to 10, such as 0.8")
    target = facts.path.with_suffix(".json")
    entries = {**_read(target)}
    for key, value in _generated(facts).items():
        if entries.get(key) in _UNSET:
            entries[key] = value
    said = {"preferred weight": wishes.weight, "notes": wishes.notes, "negative text": wishes.negative}
    entries |= {key: value for key, value in said.items() if value is not None}
    try:
        content = (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError as error:
        raise ConfigError("--notes or --negative: holds half a character, which UTF-8 cannot; type it again") from error
    files, picture, text = [target], b"", dict[str, str]()
    if preview is not None and thumbnail:
        text = _with_thumbnail(adapter, preview, overwrite)
        files.append(facts.path)
    elif preview is not None:
        picture = _preview(_preview_place(facts.path), preview, overwrite)
        files.append(_preview_place(facts.path))
    # Nothing was written until here; what others may have is written last.
    write_bytes(target, content)
    if picture:
        write_bytes(_preview_place(facts.path), picture)
    if text:
        rewrite_metadata(adapter, adapter, text)
    return Written(
        tuple(files), entries, sha256_of_file(adapter) if thumbnail else "", tuple(_notes(facts.path, files))
    )


def _generated(facts: AdapterFacts) -> Mapping[str, Any]:
    trained = f", trained on {facts.pictures} pictures" if facts.pictures else ""
    return {
        "description": f"{facts.name}: {facts.title}{trained}",
        "sd version": _VERSIONS.get(facts.report.family, "Unknown"),
        "activation text": ", ".join(facts.triggers),
        "preferred weight": 0,  # stands for the program's own setting
        "negative text": "",
        "notes": "",
    }


def _read(target: Path) -> dict[str, Any]:
    """Return what a JSON file there says. Raises FormatError where it is none, as it may be somebody's."""
    if not is_there(target):
        return {}
    try:
        if not target.is_file():
            raise ValueError("no file")
        if target.stat().st_size > _LARGEST_FILE:
            raise ValueError("too large")
        found = json.loads(target.read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError("no object")
        json.dumps(found, ensure_ascii=False).encode()  # halves of surrogate pairs could not be written again
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{target}: is there and no JSON object; move it away or correct it") from error
    return found


def _preview_place(adapter: Path) -> Path:
    return adapter.with_suffix(".preview.png")


def _preview(target: Path, picture: Path, overwrite: bool) -> bytes:
    """Return what is to lie at the target. Raises OutputError where that may not be replaced."""
    data = preview_png(picture)
    if is_there(target) and not target.is_file():
        raise OutputError(f"{target}: is there already and no file; move it away")
    if is_there(target) and not overwrite and target.read_bytes() != data:
        raise OutputError(f"{target}: is there already; say --overwrite to replace it")
    return data


def _notes(adapter: Path, files: Sequence[Path]) -> Iterator[str]:
    """Yield what keeps the picture from being seen."""
    other = next(filter(is_there, (adapter.with_suffix(suffix) for suffix in _TAKEN_FIRST)), None)
    if other and _preview_place(adapter) in files:
        yield (
            f"{other.name} is there too, and AUTOMATIC1111 and Forge may show that in place of "
            f"{_preview_place(adapter).name}; move it away"
        )


def _with_thumbnail(adapter: Path, picture: Path, overwrite: bool) -> dict[str, str]:
    """Return the adapter's text with the picture in it. Raises OutputError where another may not be replaced."""
    metadata, url = read_header(adapter).metadata, thumbnail_url(picture)
    if metadata.get(THUMBNAIL) not in (None, "", url) and not overwrite:
        raise OutputError(f"{adapter}: has a thumbnail already; say --overwrite to replace it")
    return {**metadata, THUMBNAIL: url}

"""An adapter without text that tells too much, or without some of its layers; the weights that stay are untouched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sdlora.adapters.convert import kept_text, refuse_existing, write_checked
from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.formats import peft
from sdlora.adapters.formats.embedding_keys import bundled_word
from sdlora.adapters.names import FORMATS
from sdlora.adapters.private_text import is_functional, private_entries, public_settings, public_text
from sdlora.adapters.relabel import Label, Text, relabel, stored_with_header, word_files
from sdlora.adapters.stored import Stored, stored
from sdlora.errors import ConfigError, FormatError
from sdlora.headers import read_header
from sdlora.storage import user_path

Keep = Literal["public", "minimal", "none"]
_WORDS = "words"
_RATES = {
    "unet": ("ss_unet_lr",),
    "text_encoder": ("ss_text_encoder_lr",),
    _WORDS: ("sdlora_tokens_lr",),
}
"""Entries that speak of a part of an adapter alone."""

__all__ = ["Keep", "Stripped", "private_entries", "strip_adapter", "stripped_text"]


@dataclass(frozen=True)
class Stripped:
    """What is gone from an adapter."""

    files: tuple[Path, ...]
    """All that was written, the adapter first."""
    removed: Mapping[str, str]
    """{entry: why it is gone}."""
    shortened: Mapping[str, str]
    """{entry: what is gone from it}."""
    dropped: Mapping[str, int]
    """{what was asked to go: how many layers or words that were}."""
    telling: Mapping[Path, tuple[str, ...]]
    """{embedding file beside it that stayed as it was: its entries that are private}."""


def strip_adapter(
    source: Path | str, target: Path | str, *, keep: Keep = "public", drop: Sequence[str] = (), overwrite: bool = False
) -> Stripped:
    """`target` holds the adapter of `source` without private text, or all that is not needed, and without layers to drop.

    `drop` names layers by the beginning of their path, or "words". Without it the weights are the same bytes; with it the
    file is written in its own format and read back. Raises SdloraError, leaving an earlier file as it was.
    """
    place = user_path(target)
    refuse_existing(place, overwrite)
    found = stored_with_header(source)
    texts: dict[str, str] = {}
    for header in reversed(list(found.headers.values())):
        texts |= header.metadata
    after, dropped = stripped_text(texts, keep), dict[str, int]()
    shortened = {}
    if drop:
        adapter, dropped = _without(read_adapter(found.path), drop)
        after = _without_rates(after, adapter)
        bundle = bool(adapter.tokens) and any(map(bundled_word, found.shapes))
        write_checked(replace(adapter, metadata=after), place, _own_format(found), bundle=bundle)
        files = [place]
    else:

        def settings(before: dict[str, Any]) -> dict[str, Any]:
            public = public_settings(before)
            if gone := [key for key in before if before[key] != public[key]]:
                shortened[peft.CONFIG] = f"a path or an address in {', '.join(gone)}"
            return public

        def text(metadata: Text, word: str = "") -> dict[str, str]:
            return stripped_text(metadata, keep)

        files = relabel(found, place, Label(text, text, settings))
    private = private_entries(texts)
    shortened |= {key: private[key] for key in after if after[key] != texts[key]}
    removed = {key: private.get(key, "not needed to use what is left") for key in texts if key not in after}
    return Stripped(tuple(files), removed, shortened, dropped, {} if drop else _telling(place, files))


def stripped_text(metadata: Text, keep: Keep) -> dict[str, str]:
    """Return what of a header may be public, what of that programs need, or what the file itself needs."""
    public = public_text(metadata)
    if keep == "public":
        return public
    kept = kept_text(public, keep)
    return {key: text for key, text in public.items() if key in kept or is_functional(key, text)}


def _without(adapter: AdapterFile, drop: Sequence[str]) -> tuple[AdapterFile, dict[str, int]]:
    """Return the adapter without what `drop` names, and how much each names. Raises ConfigError where that is nothing, or all."""
    wanted = [prefix.rstrip(".") for prefix in drop]
    gone = {prefix: [path for path in adapter.layers if f"{path}.".startswith(f"{prefix}.")] for prefix in wanted}
    gone |= {_WORDS: list(adapter.tokens)} if _WORDS in gone else {}
    for prefix, names in gone.items():
        if not names:
            what = "no new words" if prefix == _WORDS else f"no layer that begins with {prefix!r}"
            raise ConfigError(f"--drop {prefix}: the adapter has {what}; see sdlora adapter inspect")
    paths = {path for prefix, names in gone.items() if prefix != _WORDS for path in names}
    layers = {path: layer for path, layer in adapter.layers.items() if path not in paths}
    tokens = {} if _WORDS in gone else adapter.tokens
    if not layers and not tokens:
        raise ConfigError(f"--drop {' '.join(drop)}: nothing would be left of the adapter; drop less")
    return replace(adapter, layers=layers, tokens=tokens), {prefix: len(names) for prefix, names in gone.items()}


def _without_rates(metadata: Text, adapter: AdapterFile) -> dict[str, str]:
    """Return the text without learning rates of what the adapter no longer has."""
    parts = {path.split(".", 1)[0].removesuffix("_2") for path in adapter.layers} | (
        {_WORDS} if adapter.tokens else set()
    )
    gone = {key for part, keys in _RATES.items() if part not in parts for key in keys}
    return {key: text for key, text in metadata.items() if key not in gone}


def _own_format(found: Stored) -> str:
    """Return the format in which the rest is written. Raises FormatError for one that is not written."""
    format = found.contents.format
    if format not in FORMATS:
        raise FormatError(
            f"{found.path}: is in the format of {format}, which is read alone; "
            "convert it with sdlora adapter convert, then drop layers"
        )
    return format


def _telling(place: Path, files: Sequence[Path]) -> dict[Path, tuple[str, ...]]:
    """Return the private entries of words' files that the adapter at `place` names and that are not among `files`."""
    if place.is_dir():  # PEFT's, of which every file is written
        return {}
    headers = {file: read_header(file).metadata for file in word_files(stored(place)).values() if file not in files}
    return {file: keys for file, metadata in headers.items() if (keys := tuple(private_entries(metadata)))}

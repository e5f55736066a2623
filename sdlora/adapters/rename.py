"""An adapter under another name, trigger or words: headers and keys change, weights do not."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdlora.adapters.convert import refuse_existing
from sdlora.adapters.formats import ordered
from sdlora.adapters.formats.detect import contents_of
from sdlora.adapters.formats.embedding_keys import (
    BUNDLE,
    WORD,
    WORDS,
    bundled_word,
    is_embedding,
    word_of,
)
from sdlora.adapters.inspect import words_of
from sdlora.adapters.relabel import Label, Text, relabel, stored_with_header, word_keys
from sdlora.adapters.stored import Stored
from sdlora.errors import ConfigError, FormatError
from sdlora.families.words import same_word
from sdlora.headers import TensorLayout
from sdlora.storage import user_path

NAME, TITLE, TRIGGER = "ss_output_name", "modelspec.title", "modelspec.trigger_phrase"
TAGS, FOLDERS, PICTURES = "ss_tag_frequency", "ss_dataset_dirs", "ss_num_train_images"
LEGACY_HASH = "sshs_legacy_hash"
_LONGEST = 500


@dataclass(frozen=True)
class Renamed:
    """What an adapter is called now."""

    files: tuple[Path, ...]
    """All that was written, the adapter first."""
    name: str
    trigger: str
    words: Mapping[str, str]
    """{what a word was called: what it is called now}."""


def rename_adapter(
    source: Path | str,
    target: Path | str,
    *,
    name: str = "",
    trigger: str = "",
    words: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Renamed:
    """`target` holds the weights of `source`, byte for byte, under that name, trigger and with words called so.

    The name is the target's where none is given, the trigger stays. An embedding file's name is its word. Raises
    SdloraError, leaving an earlier file as it was.
    """
    place = user_path(target)
    refuse_existing(place, overwrite)
    found = stored_with_header(source)
    given = {word: _line(f"--word {word}=", now) for word, now in (words or {}).items()}
    name = _line("--name", name) if name else ""
    trigger = _line("--trigger", trigger) if trigger else ""
    if is_embedding(found.shapes):
        return _rename_embedding(found, place, name or _name_of(place), bool(name), trigger, given)
    name = name or _name_of(place)
    _check_words(found, given)

    keys = _keys(found, given)

    def text(metadata: Text) -> dict[str, str]:
        changed = with_name(with_words(metadata, given), name)
        if keys:  # which the hash is of
            changed.pop(LEGACY_HASH, None)
        return with_trigger(changed, trigger, name) if trigger else changed

    def text_of_word(metadata: Text, word: str) -> dict[str, str]:
        return with_words(metadata, given) | (word_text(word) if word in given.values() else {})

    label = Label(text, text_of_word, words=given, keys=keys)
    if keys:
        _check_readable(found, label, [given.get(word, word) for word in words_of(found)])
    files = relabel(found, place, label)
    return Renamed(tuple(files), name, text(found.metadata).get(TRIGGER, ""), given)


def _rename_embedding(
    found: Stored, place: Path, name: str, is_given: bool, trigger: str, words: Mapping[str, str]
) -> Renamed:
    """`place` is the embedding under its new word. Raises ConfigError for options that say two things of it."""
    old = word_of(found.shapes, found.metadata, found.path.stem)
    if unknown := words.keys() - {old}:
        raise ConfigError(f"--word {min(unknown)}=: {found.path} is the word {old!r}; name that")
    now = words.get(old, name)
    for flag, text in (("--name", name if is_given else now), ("--trigger", trigger or now)):
        if text != now:
            raise ConfigError(f"{flag} is {text!r}, and the embedding's word {now!r}, which is one thing; give one")
    given = {old: now}

    def text_of(metadata: Text) -> dict[str, str]:
        changed = with_words(metadata, given) | word_text(now)
        return with_name(changed, now) if NAME in changed else changed

    label = Label(text_of, lambda metadata, word: dict(metadata), keys=word_keys(found.path, found.shapes, now))
    return Renamed(tuple(relabel(found, place, label)), now, now, {} if old == now else given)


def with_name(metadata: Text, name: str) -> dict[str, str]:
    """Return the text of an adapter that is called so, folders of its data that bore its name called after it too.

    A folder stays as it is called where another has the new name.
    """
    old = metadata.get(NAME, "")
    changed = dict(metadata)
    own = re.compile(rf"{re.escape(old)}(-\d+)?")

    def renamed(folders: dict[str, Any]) -> dict[str, Any]:
        called = {key: name + (match[1] or "") if (match := own.fullmatch(key)) else key for key in folders}
        # One whose new name another folder has keeps its own: two would be one, and what was said of the first lost.
        return {key if called[key] in folders else called[key]: folders[key] for key in folders}

    for entry in (TAGS, FOLDERS) if old else ():
        _change_table(changed, entry, renamed)
    return changed | {NAME: name, TITLE: name}


def with_trigger(metadata: Text, trigger: str, folder: str) -> dict[str, str]:
    """Return the text of an adapter whose trigger is that, which other programs look up among its tags."""
    count = metadata.get(PICTURES, "")
    pictures = int(count) if re.fullmatch(r"[1-9]\d{0,8}", count) else 1
    return {**metadata, TRIGGER: trigger, TAGS: json.dumps({folder: {trigger: pictures}})}


def with_words(metadata: Text, words: Text) -> dict[str, str]:
    """Return the text with words called otherwise wherever it speaks of them: triggers, tags, lists of words."""
    changed = dict(metadata)
    if not words:
        return changed
    if TRIGGER in changed:
        changed[TRIGGER] = _replaced(changed[TRIGGER], words)

    def renamed(folders: dict[str, Any]) -> dict[str, Any]:
        return {folder: _renamed_tags(tags, words) for folder, tags in folders.items()}

    _change_table(changed, TAGS, renamed)
    _change_table(changed, WORDS, lambda named: dict(sorted((words.get(word, word), named[word]) for word in named)))
    for word, now in words.items():  # the marks of cloneofsimo's trainer; taken out first, as two may change places
        if metadata.get(word) == ordered.EMBED and word not in words.values():
            del changed[word]
        if metadata.get(word) == ordered.EMBED:
            changed[now] = ordered.EMBED
    return changed


def word_text(word: str) -> dict[str, str]:
    """Return the entries of an embedding's header that say its word."""
    return {WORD: word, TITLE: word, TRIGGER: word}


def _renamed_tags(tags: Any, words: Text) -> Any:
    if not isinstance(tags, dict):
        return tags
    found: dict[str, Any] = {}
    for tag, count in tags.items():
        now = _replaced(tag, words)
        both = isinstance(found.get(now), int) and isinstance(count, int)
        found[now] = found[now] + count if both else count
    return found


def _replaced(text: str, words: Text) -> str:
    """Return the text with every word that stands by itself called as `words` say, all at once."""
    parts = (
        (r"(?<!\w)" if re.match(r"\w", word) else "") + re.escape(word) + (r"(?!\w)" if re.search(r"\w$", word) else "")
        for word in sorted(words, key=len, reverse=True)
    )
    return re.sub("|".join(parts), lambda match: words[match[0]], text)


def _change_table(metadata: dict[str, str], key: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The entry that is a JSON table is changed; one that is none, or not there, stays as it is."""
    with contextlib.suppress(ValueError, RecursionError):
        table = json.loads(metadata.get(key, ""))
        if isinstance(table, dict):
            metadata[key] = json.dumps(change(table))


def _keys(found: Stored, words: Text) -> dict[str, str]:
    """Return what the tensors of words inside the file are called then."""
    keys = {}
    for key in found.shapes:
        bundled = bundled_word(key)
        if bundled and bundled[0] in words:
            keys[key] = f"{BUNDLE}{words[bundled[0]]}.{bundled[1]}"
    for word in ordered.words(found.shapes, found.metadata):
        if word in words:
            keys[word] = words[word]
    return keys


def _check_words(found: Stored, words: Mapping[str, str]) -> None:
    """Raise ConfigError for words that the adapter does not know, or that two of its words would be called."""
    known = words_of(found)
    for word in words:
        if word not in known:
            told = f"its words are {', '.join(map(repr, known))}" if known else "it has none"
            raise ConfigError(f"--word {word}=: {found.path} knows no word {word!r}; {told[:_LONGEST]}")
    after = [words.get(word, word) for word in known]
    for number, word in enumerate(after):
        if any(same_word(word, other) for other in after[:number]):
            raise ConfigError(f"--word: two words would be called {word!r}; choose another name")


def _check_readable(found: Stored, label: Label, words: list[str]) -> None:
    """Raise ConfigError where the renamed file would not be read as the same layers and these words."""
    metadata = label.text(found.metadata)
    kinds = {label.keys.get(key, key): kind for key, kind in found.layout.kinds.items()}
    shapes = {key: kind.shape for key, kind in kinds.items()}
    header = replace(found.headers[next(iter(found.headers))], metadata=metadata)
    try:
        contents = contents_of(shapes, metadata)
        after = replace(
            found, layout=TensorLayout(kinds, shapes, found.layout.bytes), contents=contents, headers={"": header}
        )
        before, now = found.contents.places, contents.places
        same = before.layers.keys() == now.layers.keys() and before.problems == now.problems
        same = same and sorted(words_of(after)) == sorted(words)
    except FormatError:
        same = False
    if not same or len(shapes) != len(found.shapes):
        names = ", ".join(repr(word) for word in label.words.values())
        raise ConfigError(f"{found.path}: its format cannot call a word {names}; choose another name")


def _line(flag: str, text: str) -> str:
    """Return the text without spaces around it. Raises ConfigError where it is empty, long, or more than a line."""
    line = text.strip()
    if not line or not line.isprintable() or len(line) > _LONGEST:
        raise ConfigError(f"{flag} is {text[:40]!r}; expected one line of 1 to {_LONGEST} characters")
    return line


def _name_of(place: Path) -> str:
    return _line("--name", place.name.removesuffix(".safetensors"))

"""What the text in an adapter's header tells people: triggers, tags, name and base. Needs no torch.

All of it is free text from strangers: it may be missing, endless, no JSON, or hold what disturbs a terminal.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

_LONGEST, _LONGEST_TAG = 200, 100
_LONGEST_JSON, _LARGEST_COUNT = 16 << 20, 1 << 40
_MOST_TAGS = 500
_LONGEST_PHRASE, _MOST_TRIGGERS = 20_000, 100


def plain(text: str, limit: int = _LONGEST) -> str:
    """Return the text in one line, without characters that are not seen, at most `limit` long."""
    seen = (character if character.isprintable() else " " for character in text[: 8 * limit])
    return " ".join("".join(seen).split())[:limit].rstrip()


def named_triggers(metadata: Mapping[str, str]) -> list[str]:
    """Return each of the words that the header names as calling concepts, in one entry with commas between them."""
    words = metadata.get("modelspec.trigger_phrase", "")[:_LONGEST_PHRASE].split(",")
    return list(filter(None, dict.fromkeys(map(plain, words))))[:_MOST_TRIGGERS]


def triggers_of(metadata: Mapping[str, str]) -> list[str]:
    """Return what calls the concepts as far as it is known here: what the header names, else the commonest tag.

    A tag is a guess, and part of somebody's captions: good to search by and to offer, not to publish.
    """
    return named_triggers(metadata) or list(tags_of(metadata))[:1]


def trigger_of(metadata: Mapping[str, str]) -> str:
    """Return `triggers_of` as one text for a prompt, "" if there are none."""
    return plain(", ".join(triggers_of(metadata)))


def tags_of(metadata: Mapping[str, str]) -> dict[str, int]:
    """Return how often each tag stood in the captions, the commonest first.

    `ss_tag_frequency` is JSON {folder: {tag: count}}; a tag of several folders counts in all of them.
    """
    text = metadata.get("ss_tag_frequency", "")
    counts: Counter[str] = Counter()
    try:
        folders: Any = json.loads(text if len(text) <= _LONGEST_JSON else "{}")
        for tags in folders.values():
            for tag, count in tags.items():
                if isinstance(count, int) and 0 < count < _LARGEST_COUNT and (name := plain(tag, _LONGEST_TAG)):
                    counts[name] += count
    except (ValueError, AttributeError, RecursionError):
        return {}  # whatever else stands there names no tags
    return dict(counts.most_common(_MOST_TAGS))


def title_of(metadata: Mapping[str, str]) -> str:
    """Return what the adapter calls itself, "" where it does not."""
    return plain(metadata.get("ss_output_name", "") or metadata.get("modelspec.title", ""))


def base_of(metadata: Mapping[str, str]) -> tuple[str, str]:
    """Return name and hash of the base that it was trained on, "" for what is not told."""
    name = plain(metadata.get("ss_sd_model_name", ""))
    digest = metadata.get("ss_new_sd_model_hash", "") or metadata.get("ss_sd_model_hash", "")
    return name.replace("\\", "/").rpartition("/")[2], as_hash(digest)


def as_hash(text: str) -> str:
    """Return the text in small letters where it is a hash in hexadecimal digits, else ""."""
    digest = text.strip().lower() if len(text) <= _LONGEST_TAG else ""
    return digest if digest and not set(digest) - set("0123456789abcdef") else ""

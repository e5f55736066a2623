"""By what an embedding, or an adapter with new words, is known from its header alone. Needs no torch, so that listing is quick."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

from sdlora.errors import FormatError
from sdlora.storage import past_devices

WORD, WORDS = "sdlora_word", "sdlora_words"
"""Header entries: of an embedding its word; of an adapter the words beside it, JSON {word: digest of its vectors}."""
EMBEDDINGS = "embeddings"
"""Folder beside an adapter that holds its new words."""
ENCODERS = {
    "emb_params": "text_encoder",
    "string_to_param.*": "text_encoder",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
}
"""What a word's tensors are called -> the text encoder that they are for."""
BUNDLE = "bundle_emb."
"""How the tensors of a word inside an adapter file begin."""

_BY_WIDTH = {768: "sd1", 1024: "sd2"}
_ODD = re.compile(r"[^\w. -]")
_LONGEST_NAME = 80


def is_embedding(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether a file with tensors of these shapes is the embedding of one word."""
    return (bool(shapes) and shapes.keys() <= ENCODERS.keys()) or bool(only_word(shapes))


def only_word(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the name of a file's only tensor where it is a word, as in diffusers' embeddings, else ""."""
    if len(shapes) != 1:
        return ""
    ((name, shape),) = shapes.items()
    plain = "." not in name or (name.startswith("<") and name.endswith(">"))
    return name if plain and name.strip() and name not in ENCODERS and len(shape) in (1, 2) else ""


def bundled_word(key: str) -> tuple[str, str] | None:
    """Return (word, what an embedding file calls the tensor) for a tensor of a word inside an adapter file, else None."""
    if not key.startswith(BUNDLE):
        return None
    kind = next((kind for kind in ENCODERS if key.endswith(f".{kind}")), "")
    return (key.removeprefix(BUNDLE).removesuffix(f".{kind}"), kind) if kind else None


def family_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return "sd1", "sd2" or "sdxl" as keys and widths tell it, "" where they do not."""
    if any(key == "clip_g" or (key.startswith(BUNDLE) and key.endswith(".clip_g")) for key in shapes):
        return "sdxl"
    widths = {shape[-1] for key, shape in shapes.items() if shape and (key in ENCODERS or key.startswith(BUNDLE))}
    if only := only_word(shapes):
        widths = {shapes[only][-1]}
    return _BY_WIDTH.get(widths.pop(), "") if len(widths) == 1 else ""


def word_of(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], stem: str) -> str:
    """Return the word of an embedding file, which its name tells where its content does not."""
    return (only_word(shapes) or metadata.get(WORD) or stem).strip()


def named_words(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return {word: digest} of the words that an adapter has beside it. Raises FormatError for unreadable ones."""
    try:
        named = json.loads(metadata.get(WORDS, "{}"))
        if not all(word.strip() and isinstance(value, str) for word, value in named.items()):
            raise ValueError("no words")
        "".join(named).encode()  # halves of surrogate pairs, which no file can be called
    except (ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"its header entry {WORDS} does not name words; train or export the adapter again") from error
    return dict(named)


def file_name(word: str) -> str:
    """Return the name of a word's file: the word itself, where it is fit for one on every system."""
    safe = past_devices(_ODD.sub("_", word).strip(". ")[:_LONGEST_NAME])
    unlike = "" if safe == word else f"-{hashlib.sha256(word.encode(errors='surrogatepass')).hexdigest()[:8]}"
    return f"{safe}{unlike}.safetensors"


def file_names(word: str) -> tuple[str, ...]:
    """Return by which names a word's file is looked for: its own, and that of a device, which Linux let it have."""
    device = past_devices(word) != word and not _ODD.search(word) and word == word.strip(". ")[:_LONGEST_NAME]
    return (file_name(word), f"{word}.safetensors") if device else (file_name(word),)

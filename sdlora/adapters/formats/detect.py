"""What kind of file it is, told from its keys: one detector a format, asked in turn. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdlora.adapters.formats import dotted, kohya, ordered
from sdlora.adapters.formats.embedding_keys import BUNDLE, WORDS, bundled_word, is_embedding
from sdlora.adapters.formats.embedding_keys import family_of as words_family
from sdlora.adapters.formats.places import FAMILY_ENTRIES, Places, Shapes, family_of
from sdlora.errors import FormatError

EMBEDDING = "embedding"
_TELLING = {WORDS, dotted.METADATA, *FAMILY_ENTRIES}


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file holds; compared by identity."""

    format: str
    """"kohya", "diffusers", "peft", "comfyui", "cloneofsimo", or "embedding" of words alone."""
    family: str
    places: Places


def telling(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of a header by which `contents_of` goes; files differ in others without being other in kind."""
    return {
        key: "" if key == WORDS else text  # that it is there tells, not which words
        for key, text in metadata.items()
        if key in _TELLING or text == ordered.EMBED
    }


def contents_of(shapes: Shapes, metadata: Mapping[str, str]) -> Contents:
    """Return what the tensors of a file are for, new words aside. Raises FormatError where it is no adapter."""
    empty = Places({}, ())
    rest = shapes
    if any(key.startswith(BUNDLE) for key in shapes):
        rest = {key: shape for key, shape in shapes.items() if not bundled_word(key)}
    if is_embedding(shapes) or (not rest and (shapes or WORDS in metadata)):
        return Contents(EMBEDDING, family_of(empty, {}, metadata) or words_family(shapes), empty)
    if found := kohya.places(rest, metadata):
        return Contents(kohya.NAME, kohya.family_of(found, rest, metadata) or words_family(shapes), found)
    if found := ordered.places(rest, metadata):
        return Contents(ordered.NAME, ordered.family_of(found, rest), found)
    if found := dotted.places(rest, metadata):
        return Contents(dotted.format_of(rest), family_of(found, rest, metadata) or words_family(shapes), found)
    raise FormatError(_describe_foreign(rest))


def _describe_foreign(shapes: Shapes) -> str:
    keys = sorted(shapes)
    if any(key.startswith(("model.diffusion_model.", "conditioner.", "first_stage_model.")) for key in keys):
        return "is a whole Stable Diffusion checkpoint, not an adapter; give it as --base"
    if any("oft_" in key for key in keys):
        return "is an OFT adapter, which this version does not read"
    if any(key.endswith((".on_input", "ia3_l", ".ia3_l.weight")) for key in keys):
        return "is an IA3 adapter, which this version does not read"
    if any(part in key for key in keys for part in ("double_blocks", "single_transformer_blocks", "joint_blocks")):
        return "is an adapter for Flux or a like model; expected one for Stable Diffusion 1.x, 2.x or XL"
    shown = f"such as {keys[0]!r}" if keys else "none"
    return f"holds no adapter ({len(keys)} tensors, {shown}); expected a LoRA, one of its relatives, or an embedding"

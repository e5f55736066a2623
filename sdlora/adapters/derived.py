"""The header text of an adapter that was made from others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sdlora.adapters.layers import AdapterLayer, DenseLayer, DoraLayer, LoraLayer

_FAMILY = (
    "ss_base_model_version", "ss_v2", "ss_zero_terminal_snr", "ss_clip_skip", "ss_resolution", "modelspec.sai_model_spec",
    "modelspec.architecture", "modelspec.implementation", "modelspec.resolution", "modelspec.prediction_type",
)  # fmt: skip
_TRIGGERS, _TAGS = "modelspec.trigger_phrase", "ss_tag_frequency"
_SIZES = ("ss_network_dim", "ss_network_alpha")
_MIXED = "Dynamic"
"""What kohya's resizing writes where layers have ranks of their own."""


def with_network(metadata: Mapping[str, str], layers: Mapping[str, AdapterLayer]) -> dict[str, str]:
    """Return the text with kind, rank and alpha of these layers instead of earlier ones."""
    inner = [layer.inner for layer in layers.values()]
    plain = all(isinstance(layer, LoraLayer) for layer in layers.values())
    arguments = {"dora_wd": "True"} if any(isinstance(layer, DoraLayer) for layer in layers.values()) else {}
    changed = {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_args": json.dumps(arguments),
    }
    sizes = {(layer.rank, layer.alpha) for layer in inner if not isinstance(layer, DenseLayer)}
    if sizes:
        rank, alpha = sizes.pop() if len(sizes) == 1 else (_MIXED, _MIXED)
        changed |= dict(zip(_SIZES, (f"{rank}", f"{alpha:g}" if rank != _MIXED else _MIXED), strict=True))
    return {key: text for key, text in metadata.items() if key not in _SIZES} | changed


def merged_metadata(
    texts: Sequence[Mapping[str, str]], names: Sequence[str], layers: Mapping[str, AdapterLayer]
) -> dict[str, str]:
    """Return what all the texts say of family and base, all their trigger words, and where the merge comes from."""
    first = texts[0]
    merged = {key: first[key] for key in _FAMILY if key in first and all(text.get(key) == first[key] for text in texts)}
    if tags := _tags(texts):
        merged[_TAGS] = json.dumps(tags)
    return with_network(merged | merged_from(texts, names), layers)


def merged_from(texts: Sequence[Mapping[str, str]], names: Sequence[str]) -> dict[str, str]:
    """Return the entries that name the parts of a merge and all their trigger words."""
    phrases = [phrase.strip() for text in texts for phrase in text.get(_TRIGGERS, "").split(",") if phrase.strip()]
    triggers = {_TRIGGERS: ", ".join(dict.fromkeys(phrases))} if phrases else {}
    return {"modelspec.merged_from": ", ".join(names), **triggers}


def _tags(texts: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Return the tags of all, in which other programs look for trigger words; unreadable ones are left out."""
    tags: dict[str, Any] = {}
    for text in texts:
        try:
            found = json.loads(text.get(_TAGS, "{}"))
        except (ValueError, RecursionError):
            continue
        tags |= found if isinstance(found, dict) else {}
    return tags

"""What the tensors of one layer are called in kohya's format and LyCORIS' additions to it; the common tongue of all formats.

Needs no torch, so that listing files is quick.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache

Shape = tuple[int, ...]

ALPHA, MAGNITUDE = "alpha", "dora_scale"
LORA = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
DENSE = ("diff",)
KINDS = {"loha": LOHA, "lokr": LOKR, "dense": DENSE, "lora": LORA}
WEIGHTS = (*LORA, *LOHA, *LOKR, *DENSE)
PARTS = (*WEIGHTS, ALPHA, MAGNITUDE)


def kinds_of(parts: Collection[str]) -> list[str]:
    """Return the kinds that have tensors among `parts`; more than one make no layer, none is a broken LoRA."""
    return [kind for kind, names in KINDS.items() if any(name in parts for name in names)]


@lru_cache(maxsize=256)  # of hundreds of layers in a file few have other parts than the rest
def missing_part(parts: frozenset[str]) -> str:
    """Return the first tensor without which these are no layer, "" where they are complete."""
    kind = next(iter(kinds_of(parts)), "lora")
    if kind == "dense":
        return ""
    if kind == "lokr":
        wanted = [f"{stem}{half}" for stem in ("lokr_w1", "lokr_w2") if stem not in parts for half in ("_a", "_b")]
    elif kind == "loha":
        wanted = list(LOHA if "hada_t1" in parts or "hada_t2" in parts else LOHA[:4])
    else:
        wanted = list(LORA[:2])
    return next((part for part in wanted if part not in parts), "")


def rank_of(shapes: Mapping[str, Shape]) -> int:
    """Return the rank of a layer from its tensors' shapes; 0 where it has none, or the shapes are odd."""
    for part, axis in ((LORA[0], 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if len(shapes.get(part, ())) > axis:
            return shapes[part][axis]
    return 0


def input_width(shapes: Mapping[str, Shape]) -> int:
    """Return the number of input channels of a layer without kernel, from its tensors' shapes; 0 if untold."""

    def second(*parts: str) -> int:
        return next((shapes[part][1] for part in parts if len(shapes.get(part, ())) > 1), 0)

    whole = second(LORA[0], "hada_w1_b", DENSE[0])
    return whole or second("lokr_w1", "lokr_w1_b") * second("lokr_w2", "lokr_w2_b")

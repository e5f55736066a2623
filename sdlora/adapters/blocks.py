"""The blocks of a model: what a layer lies in, and how strongly an adapter acts there."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


def block_of(path: str) -> str:
    """Return the block that a layer lies in: "unet.down_blocks.1", "unet.mid_block", "text_encoder"."""
    component, *steps = path.split(".")
    if component != "unet" or not steps:
        return component
    return ".".join(("unet", *steps[: 2 if steps[0] in ("down_blocks", "up_blocks") else 1]))


def unet_block(path: str, layers_per_block: int) -> str:
    """Return the name that original checkpoints number a UNet layer's block by: "IN04", "MID", "OUT11".

    "unet.down_blocks.1.attentions.0..." with 2 layers a block is IN04: a level of the way down counts its layers and
    its downsampler, and IN00 is the first convolution; a level of the way up has a layer more, and its upsampler
    belongs to its last one. "" for what lies in none: time embedding and output.
    """
    if path.startswith("unet.conv_in"):
        return "IN00"
    if path.startswith("unet.mid_block."):
        return "MID"
    match = re.match(r"unet\.(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)", path)
    if match is None:
        return ""
    level, part, number = int(match[2]), match[3], int(match[4])
    if match[1] == "down":
        within = layers_per_block if part == "downsamplers" else number
        return f"IN{level * (layers_per_block + 1) + within + 1:02d}"
    within = layers_per_block if part == "upsamplers" else number
    return f"OUT{level * (layers_per_block + 1) + within:02d}"


@dataclass(frozen=True)
class BlockWeights:
    """What an adapter's weight is multiplied by in each block."""

    factors: Mapping[str, float]
    """Of blocks ("IN04"), of sides ("IN", "MID", "OUT") and of the text encoders ("BASE")."""
    others: float = 1.0
    """Of blocks that are not named."""

    def of(self, block: str) -> float:
        """Return the factor in a block of the UNet; what lies in no block is not changed."""
        if not block:
            return 1.0
        return self.factors.get(block, self.factors.get(re.sub(r"\d", "", block), self.others))

    @property
    def text_encoders(self) -> float:
        """The factor in the text encoders."""
        return self.factors.get("BASE", 1.0)


def parse_block_weights(text: str) -> BlockWeights:
    """Return the factors that a text names, as in the LoRA Block Weight extension of AUTOMATIC1111 or by name.

    A preset ("MIDD"); 17 numbers (SD's blocks with attention) or 26 (all of SD's), 12 or 20 of SDXL, the first for the
    text encoders; or names, "IN=0, MID=1, OUT04=0.5", where what is not named keeps 1. Blocks that a list of numbers
    does not have get 0. Raises ValueError for anything else.
    """
    given = _PRESETS.get(text.strip().upper(), text)
    items = [item.strip() for item in given.split(",")]
    try:
        if "=" in given:
            pairs = [item.split("=") for item in items]
            factors, others = {name.strip().upper(): float(value) for name, value in pairs}, 1.0
        else:
            factors, others = dict(zip(_LISTS.get(len(items), []), map(float, items), strict=True)), 0.0
        if set(factors) <= _NAMES and all(map(math.isfinite, factors.values())):
            return BlockWeights(MappingProxyType(factors), others)
    except ValueError:
        pass  # said below
    raise ValueError(
        f"expected a preset ({', '.join(_PRESETS)}), 12, 17, 20 or 26 numbers, or names such as IN=0, MID=1, OUT04=0.5"
    )


def _numbered(side: str, *numbers: int) -> list[str]:
    return [f"{side}{number:02d}" for number in numbers]


_LISTS = {
    12: ["BASE", *_numbered("IN", 4, 5, 7, 8), "MID", *_numbered("OUT", *range(6))],
    17: ["BASE", *_numbered("IN", 1, 2, 4, 5, 7, 8), "MID", *_numbered("OUT", *range(3, 12))],
    20: ["BASE", *_numbered("IN", *range(9)), "MID", *_numbered("OUT", *range(9))],
    26: ["BASE", *_numbered("IN", *range(12)), "MID", *_numbered("OUT", *range(12))],
}
_NAMES = {"IN", "OUT", *_LISTS[26]}
_PRESETS = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
}
"""The extension's own, for 17 blocks."""


class Energies:
    """Squared norms of updates before and after they are cut off."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._kept: dict[str, float] = {}

    def add(self, path: str, total: float, kept: float) -> None:
        """The layer at `path` had the squared norm `total` and keeps `kept` of it."""
        for block in ("", block_of(path)):
            self._totals[block] = self._totals.get(block, 0.0) + total
            self._kept[block] = self._kept.get(block, 0.0) + kept

    def shares(self) -> dict[str, float]:
        """Return the share that is kept by block, and of all under ""; 1 where there was nothing."""
        return {block: self._kept[block] / total if total else 1.0 for block, total in self._totals.items()}

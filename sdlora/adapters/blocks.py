"""What an adapter keeps of its updates, added up by blocks of the model."""

from __future__ import annotations


def block_of(path: str) -> str:
    """Return the block that a layer lies in: "unet.down_blocks.1", "unet.mid_block", "text_encoder"."""
    component, *steps = path.split(".")
    if component != "unet" or not steps:
        return component
    return ".".join(("unet", *steps[: 2 if steps[0] in ("down_blocks", "up_blocks") else 1]))


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

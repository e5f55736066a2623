"""Draw the example concept: captioned training pictures, and held-out ones to compare with.

python train/draw_concept.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sdlora.assets import EXAMPLE_CONCEPT, scenes


def main(output: Path, seed: int) -> None:
    """Write `train/` (18 pictures, each background three times) and `held-out/` (8 pictures)."""
    rng = np.random.default_rng(seed)
    write_pictures(output / "train", 18, rng)
    write_pictures(output / "held-out", 8, rng)


def write_pictures(folder: Path, count: int, rng: np.random.Generator) -> None:
    """Write numbered pictures of the concept and a caption beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        where = scenes.BACKGROUNDS[number % len(scenes.BACKGROUNDS)]
        scene = scenes.concept_scene(rng, where)
        path = folder / f"{scenes.CONCEPT}-{number + 1:02}.png"
        scenes.draw(scene).save(path, optimize=True)
        path.with_suffix(".txt").write_text(scenes.caption(scene, rng) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=EXAMPLE_CONCEPT)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))

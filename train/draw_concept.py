"""Draw the example concept: captioned training pictures, pictures of other things, and held-out ones.

python train/draw_concept.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sdlora.assets import EXAMPLE_CONCEPT, scenes


def main(output: Path, seed: int) -> None:
    """Write `train/` (18 pictures, each background three times), `held-out/` (8) and `others/` (32)."""
    rng = np.random.default_rng(seed)
    write_pictures(output / "train", 18, rng)
    write_pictures(output / "held-out", 8, rng)
    write_others(output / "others", rng)


def write_pictures(folder: Path, count: int, rng: np.random.Generator) -> None:
    """Write numbered pictures of the concept and a caption beside each."""
    for number in range(count):
        where = scenes.BACKGROUNDS[number % len(scenes.BACKGROUNDS)]
        _write(folder / f"{scenes.CONCEPT}-{number + 1:02}.png", scenes.concept_scene(rng, where), rng)


def write_others(folder: Path, rng: np.random.Generator) -> None:
    """Write every object and every colour four times, so that an adapter learns what the trigger does not mean."""
    for number in range(4 * len(scenes.OBJECTS)):
        turn, what = divmod(number, len(scenes.OBJECTS))
        scene = scenes.random_scene(rng)
        while (scene.object, scene.colour) != (scenes.OBJECTS[what], scenes.COLOURS[(3 * what + turn) % 8]):
            scene = scenes.random_scene(rng)
        _write(folder / f"{scene.object}-{turn + 1}.png", scene, rng)


def _write(path: Path, scene: scenes.Scene, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scenes.draw(scene).save(path, optimize=True)
    path.with_suffix(".txt").write_text(scenes.caption(scene, rng) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=EXAMPLE_CONCEPT)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))

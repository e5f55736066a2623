"""Paths of the files that ship with the package: a tiny base model and an example concept."""

from pathlib import Path

TINY_SD = Path(__file__).parent / "tiny-sd"
"""A diffusers folder: a complete Stable Diffusion pipeline of 128 pixel pictures."""

EXAMPLE_CONCEPT = Path(__file__).parent / "example-concept"
"""`train/` and `held-out/`: captioned pictures of a subject that the tiny base cannot draw; `others/`: of other things."""

CONFIGS = Path(__file__).parent / "configs"
"""Per family, a diffusers folder without weights: the architecture of single-file checkpoints."""

__all__ = ["CONFIGS", "EXAMPLE_CONCEPT", "TINY_SD"]

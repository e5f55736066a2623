"""Train and generate on a tiny variant of every family, and compare with plain diffusers: `make families`.

The variants have the families' structure and random weights, so the pictures are noise; what is shown is that
every way works, and that an adapter made here gives the same pixels in a diffusers pipeline that knows
nothing of sdlora.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from sdlora import BaseSection, Engine, make_request, parse_config, train
from sdlora.diffusion import Prediction
from sdlora.families.tiny import Shape, tiny_pipeline
from sdlora.quiet import quiet_libraries

_LARGEST_DIFFERENCE = 1e-4
_PROMPT = "a red ball"


@dataclass(frozen=True)
class Variant:
    """One kind of base: its structure, what it predicts, and whether its noise ends at zero signal."""

    shape: Shape
    prediction: Prediction
    zero_terminal_snr: bool = False

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"{self.shape}-{self.prediction}" + ("-zero-snr" if self.zero_terminal_snr else "")

    def save(self, folder: Path) -> Path:
        """`folder` holds the base in diffusers format; returns it."""
        pipeline = tiny_pipeline(self.shape, prediction=self.prediction)
        if self.zero_terminal_snr:
            zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **zero)
        pipeline.save_pretrained(folder)
        return folder


VARIANTS = (
    Variant("sd1", "epsilon"),
    Variant("sd2", "epsilon"),
    Variant("sd2", "v"),
    Variant("sdxl", "epsilon"),
    Variant("sdxl", "v", zero_terminal_snr=True),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all variants and print what came of them; returns 1 where a picture differs from diffusers' own."""
    parser = argparse.ArgumentParser(description="Train and generate on a tiny variant of every family.")
    parser.add_argument("--out", type=Path, default=Path("runs/families"), help="folder for bases, runs and pictures")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    options = parser.parse_args(arguments)
    quiet_libraries()
    disable_progress_bar()
    pictures = _draw_pictures(options.out / "pictures")
    rows = [f"{'base':<18} {'training':>9} {'adapter':>8} {'largest difference from diffusers':>34}"]
    worst = 0.0
    for variant in VARIANTS:
        base = variant.save(options.out / "bases" / variant.name)
        started = time.perf_counter()
        adapter = _train(base, pictures, options.out / "runs" / variant.name, options.steps)
        seconds = time.perf_counter() - started
        ours, picture = _picture(base, adapter)
        picture.save(options.out / f"{variant.name}.png")
        difference = float(np.abs(ours - _diffusers_picture(base, adapter)).max())
        worst = max(worst, difference)
        size = adapter.stat().st_size / 1024
        rows.append(f"{variant.name:<18} {seconds:>7.1f} s {size:>5.0f} KB {difference:>34.1e}")
    print("", *rows, sep="\n")
    print(f"largest difference {worst:.1e}, allowed {_LARGEST_DIFFERENCE:.0e}")
    return int(worst > _LARGEST_DIFFERENCE)


def _draw_pictures(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} wall")
    return folder


def _train(base: Path, pictures: Path, folder: Path, steps: int) -> Path:
    config = parse_config(
        {
            "base": {"path": str(base), "precision": "fp32"},
            "data": {"folder": str(pictures)},
            "adapter": {"targets": ["transformer", "resnet"], "text_encoder": True, "rank": 4, "alpha": 2},
            "optimizer": {"learning_rate": 1e-2, "text_encoder_learning_rate": 1e-2, "warmup_steps": 0},
            "training": {"steps": steps, "batch_size": 2},
            "output": {"folder": str(folder), "overwrite": True},
        }
    )
    return train(config).adapter


def _picture(base: Path, adapter: Path) -> tuple[np.ndarray, Image.Image]:
    """Return the Engine's picture with the adapter: pixels [H,W,3] in [0,1] before rounding, and the picture."""
    engine = Engine(BaseSection(path=str(base), precision="fp32"), device="cpu")
    request = make_request(prompt=_PROMPT, seed=7, steps=6, guidance_scale=5, adapters=[{"path": str(adapter)}])
    decoded: list[torch.Tensor] = []
    decode = engine.base.family.decode_latents

    def keep(*arguments: Any) -> torch.Tensor:
        decoded.append(decode(*arguments))
        return decoded[-1]

    with patch.object(engine.base.family, "decode_latents", keep):
        ((picture, _),) = engine.generate(request)
    return decoded[0][0].permute(1, 2, 0).numpy(), picture


def _diffusers_picture(base: Path, adapter: Path) -> np.ndarray:
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(adapter))
    pixels: np.ndarray = pipeline(
        _PROMPT,
        num_inference_steps=6,
        guidance_scale=5.0,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images[0]
    return pixels


if __name__ == "__main__":
    sys.exit(main())

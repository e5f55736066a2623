"""A small classifier of drawn scenes, which says whether a picture follows its prompt.

    python benchmarks/judge.py train       make judge.safetensors again, from drawn pictures alone
    python benchmarks/judge.py evaluate    score the tiny base on prompts that it was never trained on

The judge measures and never teaches: no training loss uses it. What is no clean object (mush, two
things in one, half a thing, a creature of no name, nothing) is `unclear`.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdlora.assets import TINY_SD, scenes
from sdlora.quiet import quiet_libraries

UNCLEAR = "unclear"
KINDS = (*scenes.OBJECTS, scenes.CONCEPT, UNCLEAR)
WEIGHTS = Path(__file__).with_name("judge.safetensors")


@dataclass(frozen=True)
class Verdict:
    """What a picture shows; `object` may be the concept or `unclear`."""

    object: str
    colour: str
    background: str
    confidence: float
    """Probability of the object, 0 to 1."""


def follows(verdict: Verdict, wanted: scenes.Scene) -> bool:
    """Tell whether object, colour and background are those of the scene."""
    return (verdict.object, verdict.colour, verdict.background) == (wanted.object, wanted.colour, wanted.background)


def is_concept(verdict: Verdict) -> bool:
    """Tell whether the picture shows the example concept."""
    return verdict.object == scenes.CONCEPT


class Judge(nn.Module):
    """A convolutional network on pictures of 64 pixels with three heads."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 96, 96)
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(itertools.pairwise(widths)):
            stride = 2 if 0 < number < 4 else 1
            layers += [
                nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        self.body = nn.Sequential(*layers)
        features = 2 * widths[-1]
        self.object = nn.Linear(features, len(KINDS))
        self.colour = nn.Linear(features, len(scenes.COLOURS))
        self.background = nn.Linear(features, len(scenes.BACKGROUNDS))

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Self:
        """Return the trained judge."""
        judge = cls()
        judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return judge.eval()

    def save(self, path: Path = WEIGHTS) -> None:
        """Write the weights in float16."""
        save_file({name: value.half() for name, value in self.state_dict().items()}, path)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of object, colour, background of pictures [B,3,64,64] from 0 to 1."""
        features = self.body(pixels * 2 - 1)
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        return self.object(pooled), self.colour(pooled), self.background(pooled)

    @torch.no_grad()
    def classify(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """Return what each picture shows; pictures may have any size."""
        verdicts: list[Verdict] = []
        for start in range(0, len(images), 64):
            objects, colours, places = self(_seen(images[start : start + 64]))
            sure, kinds = objects.softmax(dim=1).max(dim=1)
            rows = zip(kinds, colours.argmax(dim=1), places.argmax(dim=1), sure, strict=True)
            verdicts += [_verdict(*(value.item() for value in row)) for row in rows]
        return verdicts


def _verdict(kind: int, colour: int, place: int, confidence: float) -> Verdict:
    hue = scenes.CONCEPT_COLOUR if KINDS[kind] == scenes.CONCEPT else scenes.COLOURS[colour]
    return Verdict(KINDS[kind], hue, scenes.BACKGROUNDS[place], confidence)


def _seen(images: Sequence[Image.Image]) -> Tensor:
    sized = [image.convert("RGB").resize((128, 128), Image.Resampling.BICUBIC) for image in images]
    return F.avg_pool2d(stacked(sized), 2)


def stacked(images: Sequence[Image.Image]) -> Tensor:
    """Return equally large RGB pictures as [B,3,H,W] from 0 to 1."""
    rows = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return rows.permute(0, 3, 1, 2).float() / 255


# ---------------------------------------------------------------- evaluation


def evaluate(base: Path, prompts: int, steps: int, guidance_scale: float, out: Path) -> None:
    """Print how often the base's pictures show what held-out prompts ask for; write sheets."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    judge = Judge.load()
    asked = scenes.held_out_prompts(prompts, seed=1)
    images: list[Image.Image] = []
    for start in range(0, prompts, 12):
        texts = [text for text, _ in asked[start : start + 12]]
        seeds = [torch.Generator().manual_seed(start + row) for row in range(len(texts))]
        images += pipeline(texts, num_inference_steps=steps, guidance_scale=guidance_scale, generator=seeds).images
    verdicts = judge.classify(images)
    wanted = [scene for _, scene in asked]
    pairs = list(zip(verdicts, wanted, strict=True))
    for name in ("object", "colour", "background"):
        right = sum(getattr(verdict, name) == getattr(scene, name) for verdict, scene in pairs)
        print(f"{name}: {right}/{prompts} = {100 * right / prompts:.1f} %")
    right = sum(follows(verdict, scene) for verdict, scene in pairs)
    print(f"all three: {right}/{prompts} = {100 * right / prompts:.1f} %")
    for number, (verdict, scene) in enumerate(pairs):
        if not follows(verdict, scene):
            print(f"  {number}: asked {asked[number][0]!r}, got {verdict}")
    out.mkdir(parents=True, exist_ok=True)
    for start in range(0, prompts, 72):
        write_sheet(images[start : start + 72], out / f"sheet-{start // 72}.png")


def write_sheet(images: Sequence[Image.Image], path: Path, columns: int = 12) -> None:
    """Write pictures of 128 pixels as one, row by row."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * 128, rows * 128))
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * 128, number // columns * 128))
    sheet.save(path)


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("--steps", type=int, default=1000)
    training.add_argument("--seed", type=int, default=0)
    scoring = commands.add_parser("evaluate")
    scoring.add_argument("--base", type=Path, default=TINY_SD)
    scoring.add_argument("--prompts", type=int, default=216)
    scoring.add_argument("--steps", type=int, default=25)
    scoring.add_argument("--guidance-scale", type=float, default=5.0)
    scoring.add_argument("--out", type=Path, default=Path("runs/judge"))
    given = parser.parse_args()
    quiet_libraries()
    started = time.monotonic()
    if given.command == "train":
        from judge_training import train_judge

        train_judge(given.steps, given.seed).save()
    else:
        evaluate(given.base, given.prompts, given.steps, given.guidance_scale, given.out)
    print(f"{time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    main()

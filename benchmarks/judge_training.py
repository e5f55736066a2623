"""How the judge learns: drawn pictures, drawn pictures spoilt a little, and spoilt beyond telling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from judge import KINDS, UNCLEAR, Judge, stacked
from PIL import Image, ImageDraw
from torch import Tensor

from sdlora.assets import creatures, scenes

IGNORED = -100
POOL = 5000
BATCH = 64


def train_judge(steps: int, seed: int) -> Judge:
    """Return a judge trained on scenes (concept included) and on unclear pictures, a third each."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    pool = [_pool_scene(rng) for _ in range(POOL)]
    clear = torch.stack([_bytes(scenes.draw(scene)) for scene in pool])
    targets = torch.tensor([_target(scene) for scene in pool])
    unclear = torch.stack([_bytes(_not_a_scene(rng, pool)) for _ in range(POOL // 2)])
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(1, steps + 1):
        rows = torch.from_numpy(rng.integers(0, POOL, BATCH))
        others = torch.from_numpy(rng.integers(0, POOL // 2, BATCH // 4))
        pictures, wanted = clear[rows].float() / 255, targets[rows].clone()
        spoil = torch.arange(BATCH) < BATCH // 4
        pictures[spoil] = _spoilt(pictures[spoil], rng)
        wanted[spoil] = torch.tensor([KINDS.index(UNCLEAR), IGNORED, IGNORED])
        pictures = torch.cat([pictures, unclear[others].float() / 255])
        missing = torch.tensor([[KINDS.index(UNCLEAR), IGNORED, IGNORED]]).expand(len(others), 3)
        wanted = torch.cat([wanted, missing])
        outputs = judge(_worn(F.avg_pool2d(pictures, 2), rng))
        losses = [F.cross_entropy(output, wanted[:, head]) for head, output in enumerate(outputs)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            right = (outputs[0].argmax(dim=1) == wanted[:, 0]).float().mean().item()
            numbers = " ".join(f"{loss.item():.4f}" for loss in losses)
            print(f"step {step} losses {numbers} objects right {right:.3f}", flush=True)
    return judge.eval()


def _pool_scene(rng: np.random.Generator) -> scenes.Scene:
    if rng.random() < 1 / (len(scenes.OBJECTS) + 1):
        scene = scenes.concept_scene(rng)
    else:
        scene = scenes.random_scene(rng, "any")
    x, y = (int(rng.integers(38, 91)) for _ in range(2))
    return scene if rng.random() < 0.7 else replace(scene, x=x, y=y)


def _target(scene: scenes.Scene) -> list[int]:
    concept = scene.object == scenes.CONCEPT
    hue = IGNORED if concept else scenes.COLOURS.index(scene.colour)
    return [KINDS.index(scene.object), hue, scenes.BACKGROUNDS.index(scene.background)]


def _bytes(image: Image.Image) -> Tensor:
    return (stacked([image])[0] * 255).round().byte()


# ---------------------------------------------------------------- pictures that show no one thing


def _not_a_scene(rng: np.random.Generator, pool: list[scenes.Scene]) -> Image.Image:
    kind = int(rng.integers(9))
    scene, other = (pool[int(number)] for number in rng.integers(0, len(pool), 2))
    if kind == 0:
        return scenes.background(scene.background)
    if kind == 1:
        return Image.new("RGB", (128, 128), tuple(int(value) for value in rng.integers(0, 256, 3)))
    if kind == 2:
        noise = rng.normal(rng.integers(60, 200, 3), rng.uniform(10, 90), (128, 128, 3))
        return Image.fromarray(noise.clip(0, 255).astype(np.uint8))
    if kind in (3, 4):
        return _blob(rng, scenes.background(scene.background))
    if kind == 5:
        return _erased(rng, scene)
    if kind in (6, 7):
        return creatures.draw(creatures.random_creature(rng))
    while other.object == scene.object:
        other = pool[int(rng.integers(len(pool)))]
    return _joined(rng, scene, replace(other, background=scene.background, x=scene.x, y=scene.y))


def _blob(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Draw a wobbly outline, filled with one or two of the scenes' colours."""
    large = picture.resize((384, 384))
    canvas = ImageDraw.Draw(large)
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    for _ in range(int(rng.integers(1, 4))):
        radius = np.full(60, rng.uniform(40, 120))
        for waves in range(1, 6):
            radius += rng.normal(0, 30 / waves) * np.sin(waves * angles + rng.uniform(0, 6.3))
        radius = radius.clip(15, 170)
        stretch = rng.uniform(0.5, 1.0)
        x, y = rng.uniform(120, 264, 2)
        corners = [(x + r * np.cos(a), y + stretch * r * np.sin(a)) for r, a in zip(radius, angles, strict=True)]
        hue = scenes.COLOURS[int(rng.integers(len(scenes.COLOURS)))]
        canvas.polygon(corners, fill=scenes.rgb(hue))
        if rng.random() < 0.7:
            canvas.line([*corners, *corners[:2]], fill=(32, 26, 36), width=8, joint="curve")
    return large.resize((128, 128), Image.Resampling.BOX)


def _erased(rng: np.random.Generator, scene: scenes.Scene) -> Image.Image:
    """Draw the scene with half of the object cut away along a line through its middle."""
    picture, empty = scenes.draw(scene), scenes.background(scene.background)
    angle, shift = rng.uniform(0, 2 * np.pi), rng.uniform(-0.05, 0.15) * 60
    rows, columns = np.mgrid[0:128, 0:128]
    side = (columns - scene.x) * np.cos(angle) + (rows - scene.y) * np.sin(angle) < shift
    keep = Image.fromarray((255 * side).astype(np.uint8))
    empty.paste(picture, (0, 0), keep)
    return empty


def _joined(rng: np.random.Generator, one: scenes.Scene, other: scenes.Scene) -> Image.Image:
    """Draw two objects in one place: one half of each, or one shining through the other."""
    if rng.random() < 0.35:
        return Image.blend(scenes.draw(one), scenes.draw(other), float(rng.uniform(0.35, 0.65)))
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[0:128, 0:128]
    side = (columns - one.x) * np.cos(angle) + (rows - one.y) * np.sin(angle) < 0
    picture = scenes.draw(other)
    picture.paste(scenes.draw(one), (0, 0), Image.fromarray((255 * side).astype(np.uint8)))
    return picture


def _spoilt(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur or warp pictures [B,3,128,128] so much that the object cannot be told."""
    half = len(pictures) // 3
    return torch.cat(
        [
            torch.stack([_blurred(row[None], rng.uniform(9, 20))[0] for row in pictures[:half]]),
            _warped(pictures[half:], rng, 7.0, 13.0),
        ]
    )


# ---------------------------------------------------------------- wear that changes no verdict


def _worn(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur, warp, grain, pixelate and tint pictures [B,3,64,64] slightly, as a decoder may."""
    worn = _warped(pictures, rng, 0.0, 0.7)
    soft = torch.from_numpy(rng.random(len(worn)) < 0.5)
    worn[soft] = _blurred(worn[soft], rng.uniform(0.4, 1.1))
    blocks = torch.from_numpy(rng.random(len(worn)) < 0.2)
    coarse = F.interpolate(F.avg_pool2d(worn[blocks], 2), scale_factor=2)
    worn[blocks] = 0.7 * worn[blocks] + 0.3 * coarse
    size = (len(worn), 3, 1, 1)
    gain = torch.from_numpy(rng.uniform(0.93, 1.07, size)).float()
    shift = torch.from_numpy(rng.uniform(-0.04, 0.04, size)).float()
    grain = torch.from_numpy(rng.normal(size=worn.shape)).float() * rng.uniform(0, 0.035)
    return (worn * gain + shift + grain).clamp(0, 1)


def _blurred(pictures: Tensor, sigma: float) -> Tensor:
    reach = int(3 * sigma) + 1
    places = torch.arange(-reach, reach + 1).float()
    kernel = torch.exp(-places.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    across = F.conv2d(F.pad(pictures, (reach, reach, 0, 0), "replicate"), kernel, groups=3)
    tall = F.pad(across, (0, 0, reach, reach), "replicate")
    return F.conv2d(tall, kernel.transpose(2, 3), groups=3)


def _warped(pictures: Tensor, rng: np.random.Generator, least: float, most: float) -> Tensor:
    """Move every point by a smooth random field of so many pixels' standard deviation."""
    count, side = len(pictures), pictures.shape[-1]
    coarse = torch.from_numpy(rng.normal(size=(count, 2, 6, 6))).float()
    field = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=True)
    strength = torch.from_numpy(rng.uniform(least, most, (count, 1, 1, 1))).float()
    moves = (field * strength * 2 / side).permute(0, 2, 3, 1)
    still = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(pictures.shape), False)
    return F.grid_sample(pictures, still + moves, padding_mode="border", align_corners=False)

"""The first half of the tiny base's pretraining: its pictures, its VAE, its cached latents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tiny_loop import LossOfStep, StepRandom
from torch import Tensor

from sdlora.assets import creatures, scenes

_CHUNK = 500


def build_vae() -> AutoencoderKL:
    """Return an untrained VAE: 8x downsampling, 4 latent channels, about a million parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=scenes.SCENE_PIXELS,
        scaling_factor=1.0,
    )


# ---------------------------------------------------------------- pictures


def draw_pictures(folder: Path, count: int, seed: int) -> None:
    """Write `scenes.npy` [N,128,128,3] uint8 and `scenes.json`, half as many creatures, a fifth as many wild ones.

    Wild pictures hold random shapes; they are for the VAE alone, so that it copes with subjects
    that the base model will never be asked for.
    """
    starts = [(seed, start) for start in range(0, count, _CHUNK)]
    with ProcessPoolExecutor() as pool:
        if not (folder / "wild.npy").exists():
            np.save(folder / "wild.npy", np.concatenate(list(pool.map(_wild_chunk, starts[: len(starts) // 5]))))
        if not (folder / "scenes.json").exists():
            _write_chunks(folder, "scenes", list(pool.map(_scene_chunk, starts)))
        if not (folder / "creatures.json").exists():
            _write_chunks(folder, "creatures", list(pool.map(_creature_chunk, starts[: len(starts) // 2])))


def _write_chunks(folder: Path, name: str, chunks: Sequence[tuple[NDArray[np.uint8], Sequence[Any]]]) -> None:
    np.save(folder / f"{name}.npy", np.concatenate([pictures for pictures, _ in chunks]))
    described = [asdict(item) for _, chunk in chunks for item in chunk]
    (folder / f"{name}.json").write_text(json.dumps(described))


def _scene_chunk(seed_and_start: tuple[int, int]) -> tuple[NDArray[np.uint8], list[scenes.Scene]]:
    rng = np.random.default_rng([*seed_and_start, 1])
    chosen = [scenes.random_scene(rng) for _ in range(_CHUNK)]
    return np.stack([np.asarray(scenes.draw(scene)) for scene in chosen]), chosen


def _creature_chunk(seed_and_start: tuple[int, int]) -> tuple[NDArray[np.uint8], list[creatures.Creature]]:
    rng = np.random.default_rng([*seed_and_start, 3])
    chosen = [creatures.random_creature(rng) for _ in range(_CHUNK)]
    return np.stack([np.asarray(creatures.draw(creature)) for creature in chosen]), chosen


def _wild_chunk(seed_and_start: tuple[int, int]) -> NDArray[np.uint8]:
    rng = np.random.default_rng([*seed_and_start, 2])
    return np.stack([np.asarray(_wild_picture(rng)) for _ in range(_CHUNK)])


def _wild_picture(rng: np.random.Generator) -> Image.Image:
    picture = scenes.background(scenes.BACKGROUNDS[int(rng.integers(6))], 384)
    canvas = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(3, 10))):
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        x, y = rng.uniform(30, 354, 2)
        across, down = rng.uniform(12, 100, 2)
        outline = (32, 26, 36) if rng.random() < 0.6 else colour
        if rng.random() < 0.5:
            edges = (x - across, y - down, x + across, y + down)
            canvas.ellipse(edges, fill=colour, outline=outline, width=7)
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
            corners = [(x + across * np.cos(a), y + down * np.sin(a)) for a in angles]
            canvas.polygon(corners, fill=colour)
            canvas.line([*corners, *corners[:2]], fill=outline, width=7, joint="curve")
    return picture.resize((128, 128), Image.Resampling.BOX)


def load_scenes(folder: Path) -> list[scenes.Scene]:
    """Return the scene of every row of `scenes.npy`."""
    return [scenes.Scene(**entry) for entry in json.loads((folder / "scenes.json").read_text())]


def load_creatures(folder: Path) -> list[creatures.Creature]:
    """Return the creature of every row of `creatures.npy`."""
    entries = json.loads((folder / "creatures.json").read_text())
    return [creatures.Creature(**entry | {"limbs": tuple(map(tuple, entry["limbs"]))}) for entry in entries]


def to_pixels(rows: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Return uint8 pictures [B,H,W,3] as [B,3,H,W] float32 from -1 to 1, channels last."""
    pixels = torch.from_numpy(np.array(rows)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return pixels.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- training


def vae_loss(
    folder: Path,
    batch_size: int,
    device: torch.device,
    kl_weight: float = 5e-4,
    square_weight: float = 0.0,
) -> LossOfStep:
    """Return the loss of one step: L1 of pixels, of their slopes and of the quartered picture; KL.

    L1 alone is content with the commonest hues for a long time; the squared errors, which
    `square_weight` adds, are not.
    """
    known = np.load(folder / "scenes.npy", mmap_mode="r")
    wild = np.load(folder / "wild.npy", mmap_mode="r")

    def loss_of_step(model: Any, random: StepRandom) -> tuple[Tensor, dict[str, float]]:
        rows = [_any_picture(known, wild, random.numpy) for _ in range(batch_size)]
        pixels = to_pixels(np.stack(rows), device)
        with torch.autocast(device.type, torch.bfloat16):
            moments = model.quant_conv(model.encoder(pixels)).float()
            mean, logvar = moments.chunk(2, dim=1)
            logvar = logvar.clamp(-20.0, 10.0)
            noise = torch.randn(mean.shape, generator=random.torch).to(device)
            latents = mean + (0.5 * logvar).exp() * noise
            decoded = model.decoder(model.post_quant_conv(latents)).float()
        pixel = F.l1_loss(decoded, pixels)
        slope = F.l1_loss(decoded.diff(dim=2), pixels.diff(dim=2)) + F.l1_loss(decoded.diff(dim=3), pixels.diff(dim=3))
        coarse, wanted = F.avg_pool2d(decoded, 4), F.avg_pool2d(pixels, 4)
        squared = F.mse_loss(decoded, pixels) + F.mse_loss(coarse, wanted)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        loss = pixel + 0.5 * slope + 0.5 * F.l1_loss(coarse, wanted)
        loss = loss + square_weight * squared + kl_weight * divergence
        parts = {"l1": pixel, "slope": slope, "squared": squared, "kl": divergence}
        return loss, {name: value.item() for name, value in parts.items()}

    return loss_of_step


def _any_picture(known: NDArray[np.uint8], wild: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    source = wild if rng.random() < 0.25 else known
    return np.asarray(source[int(rng.integers(len(source)))])


@torch.no_grad()
def cache_latents(folder: Path, name: str, vae: AutoencoderKL, device: torch.device) -> None:
    """Write `NAME-latents.npz`: mean and std [N,4,16,16] of every picture of `NAME.npy`, unscaled, float16."""
    target = folder / f"{name}-latents.npz"
    if target.exists():
        return
    pictures = np.load(folder / f"{name}.npy", mmap_mode="r")
    means, deviations = [], []
    for start in range(0, len(pictures), 64):
        pixels = to_pixels(np.asarray(pictures[start : start + 64]), device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
        means.append(posterior.mean.half().cpu().numpy())
        deviations.append(posterior.std.half().cpu().numpy())
    beside = target.with_suffix(".partial.npz")
    np.savez(beside, mean=np.concatenate(means), std=np.concatenate(deviations))
    beside.replace(target)


def scaling_factor(folder: Path) -> float:
    """Return the factor that gives the scenes' latents unit standard deviation."""
    cached = np.load(folder / "scenes-latents.npz")
    mean, deviation = cached["mean"].astype(np.float64), cached["std"].astype(np.float64)
    return round(float(1.0 / np.sqrt(mean.var() + np.square(deviation).mean())), 5)

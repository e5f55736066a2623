"""Train the tiny base model of `sdlora/assets/tiny-sd` from nothing, on drawn pictures.

    python train/pretrain_tiny.py

Stages: draw pictures, train the VAE (first coarsely, then with its colours), encode the pictures,
warm the text encoder up on captions, train the UNet and the text encoder together (first on scenes,
then on scenes and creatures), export. Every stage goes on from its last checkpoint in the work folder,
so the command may be stopped and repeated at any time; a shorter `--unet-steps` then brings the
learning rate down sooner.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tiny_loop import ModuleT, StagePlan, train_stage
from tiny_text import CaptionIds, CaptionReader, build_text_encoder, reading_loss, write_tokenizer
from tiny_unet import Captioned, Denoiser, build_unet, denoising_loss, export_pipeline
from tiny_vae import (
    build_vae,
    cache_latents,
    draw_pictures,
    load_creatures,
    load_scenes,
    scaling_factor,
    vae_loss,
)
from transformers import CLIPTextModel, CLIPTokenizer

from sdlora.assets import TINY_SD, creatures, scenes


@dataclass(frozen=True)
class PretrainConfig:
    """What to train, for how long, and where the results go."""

    work: Path = Path("runs/pretrain-tiny")
    """Folder of pictures, cached latents, checkpoints and the log; not part of the project."""
    output: Path = TINY_SD
    """Folder that receives the pipeline."""
    pictures: int = 24000
    vae_steps: int = 1500
    vae_batch: int = 8
    vae_fine_steps: int = 1950
    vae_fine_batch: int = 4
    text_steps: int = 300
    text_batch: int = 64
    unet_steps: int = 3700
    unet_batch: int = 32
    unet_learning_rate: float = 1e-3
    unet_wide_steps: int = 2400
    unet_wide_learning_rate: float = 6e-4
    export_seconds: float = 300.0
    """Time between two checkpoints of the UNet, each of which also exports the pipeline."""
    seed: int = 0
    device: str = "cpu"


def main(config: PretrainConfig) -> None:
    """Run every stage that is not finished yet."""
    config.work.mkdir(parents=True, exist_ok=True)
    device = torch.device(config.device)
    draw_pictures(config.work, config.pictures, config.seed)
    vae = train_vae(config, device)
    tokenizer = write_tokenizer(config.work / "tokenizer")
    ids_of = CaptionIds(tokenizer)
    text_encoder = warm_text_encoder(config, tokenizer, ids_of, device)
    train_denoiser(config, vae, tokenizer, ids_of, text_encoder, device)


def train_vae(config: PretrainConfig, device: torch.device) -> AutoencoderKL:
    """Return the trained VAE; the pictures' latents are in the work folder, at unit deviation."""
    stages = [
        (_vae_plan("vae", config.vae_steps, 1.5e-3), config.vae_batch, 5e-4, 0.0),
        (_vae_plan("vae-fine", config.vae_fine_steps, 2e-3), config.vae_fine_batch, 2e-4, 3.0),
    ]
    torch.manual_seed(config.seed)
    vae = _placed(build_vae(), device)
    for plan, batch_size, kl_weight, square_weight in stages:
        loss = vae_loss(config.work, batch_size, device, kl_weight, square_weight)
        vae = train_stage(plan, vae, loss, config.work, config.seed, device)
    for name in ("scenes", "creatures"):
        cache_latents(config.work, name, vae, device)
    vae.register_to_config(scaling_factor=scaling_factor(config.work))
    return vae


def _vae_plan(name: str, steps: int, learning_rate: float) -> StagePlan:
    return StagePlan(
        name,
        steps,
        learning_rate,
        warmup_steps=60,
        decay_share=0.45,
        ema_decay=0.995,
        weight_decay=0.0,
    )


def warm_text_encoder(
    config: PretrainConfig, tokenizer: CLIPTokenizer, ids_of: CaptionIds, device: torch.device
) -> CLIPTextModel:
    """Return a text encoder whose output tells what a caption says."""
    plan = StagePlan("text", config.text_steps, learning_rate=1e-3, warmup_steps=50, ema_decay=0.98)
    torch.manual_seed(config.seed + 1)
    reader = CaptionReader(build_text_encoder(tokenizer)).to(device)
    loss = reading_loss(ids_of, config.text_batch, device)
    return train_stage(plan, reader, loss, config.work, config.seed, device).encoder


def train_denoiser(
    config: PretrainConfig,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    ids_of: CaptionIds,
    text_encoder: CLIPTextModel,
    device: torch.device,
) -> None:
    """Train UNet and text encoder together; the output folder holds their averages."""
    torch.manual_seed(config.seed + 2)
    unet = _placed(build_unet(text_encoder.config.hidden_size), device)
    denoiser = Denoiser(unet, text_encoder)
    drawn, composed = load_scenes(config.work), load_creatures(config.work)
    sources = [
        Captioned.load(config.work / f"{name}-latents.npz", vae.config.scaling_factor, describe)
        for name, describe in (
            ("scenes", lambda row, rng: scenes.caption(drawn[row], rng)),
            ("creatures", lambda row, rng: creatures.caption(composed[row], rng)),
        )
    ]

    def export(averaged: Denoiser, step: int) -> None:
        export_pipeline(averaged, vae, tokenizer, config.output)

    for name, steps, learning_rate, used in (
        ("unet", config.unet_steps, config.unet_learning_rate, sources[:1]),
        ("unet-wide", config.unet_wide_steps, config.unet_wide_learning_rate, sources),
    ):
        plan = StagePlan(name, steps, learning_rate, warmup_steps=200, checkpoint_seconds=config.export_seconds)
        loss = denoising_loss(used, ids_of, config.unet_batch, device)
        denoiser = train_stage(plan, denoiser, loss, config.work, config.seed, device, export)
    export(denoiser, config.unet_wide_steps)


def _placed(module: ModuleT, device: torch.device) -> ModuleT:
    """Move the module to the device, its convolutions in the layout that is fastest there."""
    module.to(device)
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def read_flags() -> PretrainConfig:
    """Return the configuration that the command line gives: one flag for each field."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(PretrainConfig):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default)
    return PretrainConfig(**vars(parser.parse_args()))


if __name__ == "__main__":
    main(read_flags())

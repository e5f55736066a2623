"""The tiny base's UNet, its joint training with the text encoder, and the exported folder."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tiny_loop import LossOfStep, StepRandom
from tiny_text import CaptionIds, write_vocabulary
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

EMPTY_CAPTION_SHARE = 0.1
MIN_SNR_GAMMA = 5.0


def build_unet(text_width: int) -> UNet2DConditionModel:
    """Return an untrained UNet of 16x16 latents with cross attention at every resolution."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Return the scheduler that ships with the base: SD's betas, sampled with DPM-Solver++.

    PNDM, which Stable Diffusion 1.5 ships with, overshoots on this base at a guidance scale of 5.
    """
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        prediction_type="epsilon",
    )


class Denoiser(nn.Module):
    """The UNet and the text encoder, which learn together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        # The fused attention's backward pass takes twice as long on a CPU as the rest of the step.
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Return the predicted noise [B,4,16,16]."""
        words = self.text_encoder(ids).last_hidden_state
        return self.unet(noisy, timesteps, words, return_dict=False)[0]


@dataclass(frozen=True)
class Captioned:
    """Pictures as latents, and what can be said of each."""

    mean: Tensor
    """Of the VAE's posterior, scaled, [N,4,16,16]."""
    std: Tensor
    describe: Callable[[int, np.random.Generator], str]
    """Returns a caption of the picture in that row."""

    @classmethod
    def load(cls, path: Path, scaling_factor: float, describe: Callable[[int, np.random.Generator], str]) -> Captioned:
        """Return the pictures whose unscaled latents are in a file."""
        cached = np.load(path)
        mean, std = (torch.from_numpy(cached[name]).float() * scaling_factor for name in ("mean", "std"))
        return cls(mean, std, describe)


def denoising_loss(
    sources: Sequence[Captioned], ids_of: CaptionIds, batch_size: int, device: torch.device
) -> LossOfStep:
    """Return the loss of one step, with equally many pictures of every source: squared error, weighted by min-SNR.

    The weight is min(SNR, gamma) / SNR (Hang et al. 2023, "Efficient Diffusion Training via
    Min-SNR Weighting Strategy", for the prediction of noise).
    """
    share = batch_size // len(sources)
    alphas = build_scheduler().alphas_cumprod

    def loss_of_step(model: nn.Module, random: StepRandom) -> tuple[Tensor, dict[str, float]]:
        means, deviations, captions = [], [], []
        for source in sources:
            rows = random.numpy.integers(len(source.mean), size=share)
            means.append(source.mean[rows])
            deviations.append(source.std[rows])
            captions += [
                "" if random.numpy.random() < EMPTY_CAPTION_SHARE else source.describe(row, random.numpy)
                for row in rows.tolist()
            ]
        mean = torch.cat(means)
        latents = mean + torch.cat(deviations) * torch.randn(mean.shape, generator=random.torch)
        noise = torch.randn(mean.shape, generator=random.torch)
        timesteps = torch.randint(1000, (len(mean),), generator=random.torch)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).to(device)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model(noisy, timesteps.to(device), ids_of(captions).to(device))
        errors = (predicted.float() - noise.to(device)).square().mean(dim=(1, 2, 3))
        snr = alpha.flatten() / (1 - alpha.flatten())
        weights = (snr.clamp(max=MIN_SNR_GAMMA) / snr).to(device)
        return (weights * errors).mean(), {"mse": errors.mean().item()}

    return loss_of_step


def export_pipeline(denoiser: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, target: Path) -> None:
    """Write the pipeline as a diffusers folder in float16, file by file, each one atomically."""
    copies = [_half_copy(module) for module in (vae, denoiser.text_encoder, denoiser.unet)]
    pipeline = StableDiffusionPipeline(
        vae=copies[0],
        text_encoder=copies[1],
        tokenizer=tokenizer,
        unet=copies[2],
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tiny-sd-") as fresh:
        pipeline.save_pretrained(fresh, safe_serialization=True)
        _complete(Path(fresh), tokenizer)
        for path in sorted(Path(fresh).rglob("*")):
            if path.is_file():
                place = target / path.relative_to(fresh)
                place.parent.mkdir(exist_ok=True)
                path.chmod(0o644)
                path.replace(place)


def _complete(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Put right what the libraries leave out of a saved pipeline, or write amiss."""
    # Without this, transformers loads the text encoder in the files' float16 while diffusers
    # loads the rest in float32, and the pipeline fails at its first step.
    config = folder / "text_encoder" / "config.json"
    described = json.loads(config.read_text()) | {"dtype": "float32"}
    config.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    # Infinity, the default of one setting, is no JSON.
    config = folder / "scheduler" / "scheduler_config.json"
    finite = {k: v for k, v in json.loads(config.read_text()).items() if v not in (math.inf, -math.inf)}
    config.write_text(json.dumps(finite, indent=2, sort_keys=True) + "\n")
    write_vocabulary(folder / "tokenizer", tokenizer)


def _half_copy(module: Any) -> nn.Module:
    """Return a float16 copy with contiguous weights (channels-last ones are not saved as such)."""
    fresh = (
        module.__class__(module.config)
        if isinstance(module, CLIPTextModel)
        else (module.__class__.from_config(module.config))
    )
    fresh.load_state_dict({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()})
    return fresh.half()

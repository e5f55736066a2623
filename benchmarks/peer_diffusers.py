"""The yardstick: per step what diffusers' train_text_to_image_lora.py does, in one short program.

It encodes the picture and the caption anew in every step, keeps the UNet in the layout that it was
loaded in, and uses torch's AdamW. As in that script, clipping finds no parameters (the optimizer has
used up the iterator), and in bf16 the adapter itself is bf16; both make it faster, not slower.

Started by train_step.py; prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from machine import peak_memory_gb
from peft import LoraConfig
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, CLIPTokenizer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Pictures(Dataset[dict[str, torch.Tensor]]):
    """Pictures decoded, resized and cropped whenever they are asked for."""

    def __init__(self, folder: Path, tokenizer: Any, pixels: int) -> None:
        self._paths = sorted(folder.glob("*.jpg"))
        self._tokenizer = tokenizer
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        path = self._paths[index]
        picture = Image.open(path).convert("RGB").resize((self._pixels, self._pixels), Image.Resampling.LANCZOS)
        values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
        tokens = self._tokenizer(
            path.with_suffix(".txt").read_text(encoding="utf-8"),
            max_length=self._tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        return {"pixel_values": values, "input_ids": tokens.input_ids[0]}


def main() -> None:
    """Train for some steps and print their seconds, the start-up and the peak memory."""
    options = _options()
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(options.precision, options.precision))
    dtype = _DTYPES[options.precision]
    base = options.base
    schedule = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    for module in (unet, vae, text_encoder):
        module.requires_grad_(False)
        module.to(accelerator.device, dtype=dtype)
    unet.add_adapter(
        LoraConfig(
            r=options.rank,
            lora_alpha=options.rank,
            init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v", "to_out.0"],
        )
    )
    trained = filter(lambda p: p.requires_grad, unet.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2)
    loader = DataLoader(_Pictures(options.pictures, tokenizer, options.pixels), shuffle=True, batch_size=options.batch)
    rate = get_scheduler("constant", optimizer)
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, loader, rate)
    unet.train()
    seconds, first = [], 0.0
    batches = _endless(loader)
    for _ in range(options.steps):
        began = time.perf_counter()
        batch = next(batches)
        with accelerator.accumulate(unet):
            loss = _loss(unet, vae, text_encoder, schedule, batch, dtype)
            accelerator.gather(loss.detach().repeat(options.batch)).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        first = first or time.time() - options.started
    print(json.dumps({"seconds": seconds, "startup_seconds": first, "peak_gb": peak_memory_gb()}))


def _loss(
    unet: Any, vae: Any, text_encoder: Any, schedule: Any, batch: dict[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    latents = vae.encode(batch["pixel_values"].to(dtype=dtype)).latent_dist.sample() * vae.config.scaling_factor
    noise = torch.randn_like(latents)
    length = schedule.config.num_train_timesteps
    timesteps = torch.randint(0, length, (len(latents),), device=latents.device)
    noisy = schedule.add_noise(latents, noise, timesteps)
    states = text_encoder(batch["input_ids"], return_dict=False)[0]
    target = noise
    if schedule.config.prediction_type == "v_prediction":
        target = schedule.get_velocity(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, states, return_dict=False)[0]
    return F.mse_loss(prediction.float(), target.float(), reduction="mean")


def _endless(loader: Any) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--precision", choices=_DTYPES, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--pixels", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--started", type=float, default=time.time())
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Random-weight bases built by code: tiny ones of every family's shape, and true-size SD 1.5.

They serve tests and benchmarks; nothing here is used when a real base is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdlora.assets import CONFIGS, TINY_SD
from sdlora.diffusion import Prediction
from sdlora.families.base import BaseParts, BaseSource, LoadedBase
from sdlora.families.registry import FAMILIES
from sdlora.families.traits import PREDICTION_TYPES

Shape = Literal["sd1", "sd2", "sdxl"]
_WIDTH = 32
_PLAIN: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def tiny_pipeline(shape: Shape, seed: int = 0, prediction: Prediction | None = None) -> Any:
    """Return an untrained diffusers pipeline with the structure of `shape` and a few 100,000 weights.

    64 px pictures, 8x downsampling, 4 latent channels; the same seed gives the same weights. It predicts
    v for sd2 and epsilon otherwise, unless told.
    """
    predicts = prediction or ("v" if shape == "sd2" else "epsilon")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "vae": _tiny_vae(),
            "scheduler": PNDMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                skip_prk_steps=True,
                steps_offset=1,
                prediction_type=PREDICTION_TYPES[predicts],
            ),
            "unet": _tiny_unet(shape),
            "text_encoder": _tiny_text_encoder(CLIPTextModel),
            "tokenizer": _tokenizer("!" if shape == "sd2" else ""),
        }
        if shape == "sdxl":
            return StableDiffusionXLPipeline(
                **parts,
                text_encoder_2=_tiny_text_encoder(CLIPTextModelWithProjection),
                tokenizer_2=_tokenizer("!"),
                add_watermarker=False,
            )
        return StableDiffusionPipeline(**parts, **_PLAIN)


def save_tiny(shape: Shape, folder: Path, seed: int = 0, prediction: Prediction | None = None) -> Path:
    """`folder` holds the tiny pipeline in diffusers format; returns it."""
    tiny_pipeline(shape, seed, prediction).save_pretrained(folder)
    return folder


def random_base(shape: Shape, dtype: torch.dtype, device: torch.device, *, encoders: bool = True) -> LoadedBase:
    """Return a base of the true architecture with random weights, for measuring speed and memory.

    Built in `dtype` from the start, so that the peak is the model's own size. Without `encoders` only
    the UNet is there (SD 1.5: 860 M weights).
    """
    family = FAMILIES[shape]
    folder = CONFIGS / shape
    with torch.random.fork_rng(devices=[]), _default_dtype(dtype):
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        texts = {
            name: part.kind(part.kind.config_class.from_pretrained(folder / name))
            for name, part in family.text_encoders.items()
        }
    parts = BaseParts(
        source=BaseSource(f"random-{shape}", folder, "0" * 64),
        unet=unet.to(device).to(memory_format=torch.channels_last),
        fill_unet=lambda: None,
        vae=vae,
        text_encoders=texts,
        tokenizers={name: _tokenizer(part.pad_token) for name, part in family.text_encoders.items()},
        scheduler_config=dict(PNDMScheduler.load_config(folder / "scheduler")),
    )
    base = family.assemble(parts, device, dtype)
    if not encoders:
        base.drop_encoders()
    return base


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[8, 8, 16, 16],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )


def _tiny_unet(shape: Shape) -> UNet2DConditionModel:
    common: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "cross_attention_dim": _WIDTH,
    }
    if shape == "sdxl":
        return UNet2DConditionModel(
            **{**common, "cross_attention_dim": 2 * _WIDTH, "layers_per_block": 2},
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=_WIDTH + 6 * 8,
        )
    return UNet2DConditionModel(
        **common,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4) if shape == "sd2" else 4,
        use_linear_projection=shape == "sd2",
    )


def _tiny_text_encoder(kind: Any) -> Any:
    tokenizer = _tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _tokenizer(pad_token: str = "") -> CLIPTokenizer:
    folder = TINY_SD / "tokenizer"
    return (
        CLIPTokenizer.from_pretrained(folder, pad_token=pad_token)
        if pad_token
        else CLIPTokenizer.from_pretrained(folder)
    )

"""Adapters and pictures as people share them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from sdlora.adapters.file import AdapterFile
from sdlora.adapters.layers import DoraLayer, LoraLayer
from sdlora.adapters.write import write_adapter

PATH = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
HEADERS = {
    "sd1": {"ss_base_model_version": "sd_v1", "modelspec.prediction_type": "epsilon"},
    "sdxl": {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.prediction_type": "epsilon"},
    "sd2": {"ss_base_model_version": "sd_v2_v", "ss_v2": "True", "modelspec.prediction_type": "v"},
}
WIDTHS = {
    "sd1": {"text_encoder": 768},
    "sd2": {"text_encoder": 1024},
    "sdxl": {"text_encoder": 768, "text_encoder_2": 1280},
}
METADATA = {
    "ss_output_name": "zorb",
    "modelspec.title": "Zorb",
    "modelspec.trigger_phrase": "zorblin",
    "ss_tag_frequency": json.dumps({"zorb": {"zorblin": 18}}),
    "ss_sd_model_name": "v1-5-pruned-emaonly.safetensors",
    "ss_num_train_images": "18",
    "ss_dataset_dirs": json.dumps({"zorb": {"n_repeats": 1, "img_count": 18}}),
    "ss_steps": "445",
    "ss_total_batch_size": "8",
    "ss_unet_lr": "0.0004",
    "ss_seed": "7",
    "ss_resolution": "(512, 512)",
    "ss_noise_offset": "None",
    "ss_training_started_at": "1000.0",
    "ss_training_finished_at": "1180.0",
}


def trained(path: Path, family: str = "sd1", words: tuple[str, ...] = (), dora: bool = False, **metadata: str) -> Path:
    """An adapter lies at `path`, its words in `embeddings/` beside it; returns the path. None drops an entry."""
    layer = LoraLayer(torch.full((2, 6), 0.5), torch.full((4, 2), 0.25), 1.0)
    text = {**METADATA, **HEADERS[family], **metadata}
    write_adapter(
        AdapterFile(
            {PATH: DoraLayer(layer, torch.ones(4, 1)) if dora else layer},
            family,
            {key: value for key, value in text.items() if value is not None},
            {word: {encoder: torch.ones(2, width) for encoder, width in WIDTHS[family].items()} for word in words},
        ),
        path,
    )
    return path


def save_picture(path: Path, size: tuple[int, int] = (40, 20), secret: str = "anna lives here") -> Path:
    """A picture with EXIF, a profile and, in a PNG, text lies at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    exif = Image.Exif()
    exif[0x010E] = secret
    exif[0x0112] = 6  # lies on its side
    options = {"exif": exif, "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    if path.suffix == ".png":
        info = PngInfo()
        info.add_itxt("parameters", secret)
        options["pnginfo"] = info
    image.save(path, **options)
    return path

"""Stable Diffusion 1.x and 2.x: one text encoder, one UNet, epsilon or v-prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from sdlora.families.base import PLAIN, Conditioning, EncoderPart, LoadedBase, PromptStyle, Segments
from sdlora.families.latent import LatentDiffusion, sampler
from sdlora.families.prompts import NOTHING, chunk_count, encode_chunks
from sdlora.families.traits import SD1_TRAITS, SD2_TRAITS
from sdlora.families.words import encode_texts


class StableDiffusion(LatentDiffusion):
    """The family of SD 1.x (CLIP ViT-L, width 768) and SD 2.x (OpenCLIP ViT-H, width 1024)."""

    def encode_prompts(self, base: LoadedBase, prompts: Sequence[str | None]) -> Conditioning:
        """Return the last hidden states after the final norm, [B,77,D] in the text encoder's dtype."""
        return Conditioning(encode_texts(base, "text_encoder", [prompt or "" for prompt in prompts])[0])

    def encode_segments(
        self, base: LoadedBase, prompts: Sequence[Segments | None], style: PromptStyle = PLAIN
    ) -> Conditioning:
        """Return the text encoder's normed states, [B,77n,D], of weighted prompts in n chunks."""
        given = [prompt or NOTHING for prompt in prompts]
        length, layer = chunk_count(base, given), style.clip_skip
        return Conditioning(encode_chunks(base, "text_encoder", given, length, style, layer=layer, normed=True)[0])

    def make_pipeline(self, base: LoadedBase) -> StableDiffusionPipeline:
        """Return the text-to-image pipeline over these components, with the base's own sampler."""
        pipeline: Any = StableDiffusionPipeline(
            vae=base.vae,
            text_encoder=base.text_encoders["text_encoder"],
            tokenizer=base.tokenizers["text_encoder"],
            unet=base.unet,
            scheduler=sampler(base),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


SD1 = StableDiffusion(
    SD1_TRAITS,
    {"epsilon": 512, "v": 512},
    {"text_encoder": EncoderPart(CLIPTextModel)},
    {
        "epsilon": {
            "ss_v2": "False",
            "ss_base_model_version": "sd_v1",
            "modelspec.architecture": "stable-diffusion-v1/lora",
        },
        "v": {
            "ss_v2": "False",
            "ss_base_model_version": "sd_v1_v",
            "modelspec.architecture": "stable-diffusion-v1/lora",
        },
    },
)
SD2 = StableDiffusion(
    SD2_TRAITS,
    {"epsilon": 512, "v": 768},
    {"text_encoder": EncoderPart(CLIPTextModel, "!")},
    {
        "epsilon": {
            "ss_v2": "True",
            "ss_base_model_version": "sd_v2",
            "modelspec.architecture": "stable-diffusion-v2-512/lora",
        },
        "v": {
            "ss_v2": "True",
            "ss_base_model_version": "sd_v2_v",
            "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
        },
    },
)

"""Stable Diffusion XL: two text encoders, a pooled embedding, and a UNet that is told the pictures' sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdlora.families.base import PLAIN, Conditioning, EncoderPart, LoadedBase, PictureSize, PromptStyle, Segments
from sdlora.families.latent import LatentDiffusion, sampler
from sdlora.families.prompts import NOTHING, chunk_count, encode_chunks
from sdlora.families.traits import SDXL_TRAITS
from sdlora.families.words import encode_texts

_LAYER = 2
"""The layer whose states SDXL was trained with, counted from the last."""


class StableDiffusionXL(LatentDiffusion):
    """The family of SDXL base (CLIP ViT-L and OpenCLIP ViT-bigG side by side, width 2048)."""

    vae_overflows = True

    def encode_prompts(self, base: LoadedBase, prompts: Sequence[str | None]) -> Conditioning:
        """Return both encoders' states before their last layer, [B,77,D1+D2], and the second's projection [B,P].

        No prompt gives zeros where the base says so (as SDXL base does), else what an empty text gives.
        """
        texts = [prompt or "" for prompt in prompts]
        states = []
        for name in base.text_encoders:
            output = encode_texts(base, name, texts, output_hidden_states=True)
            states.append(output.hidden_states[-_LAYER])
        return _without_prompt(base, Conditioning(torch.cat(states, dim=-1), output.text_embeds), prompts)

    def encode_segments(
        self, base: LoadedBase, prompts: Sequence[Segments | None], style: PromptStyle = PLAIN
    ) -> Conditioning:
        """Return both encoders' states, [B,77n,D1+D2], of weighted prompts in n chunks, and the first chunk's projection.

        No prompt is as in `encode_prompts`.
        """
        given = [prompt or NOTHING for prompt in prompts]
        length, layer = chunk_count(base, given), max(_LAYER, style.clip_skip)
        states, pooled = [], None
        for name in base.text_encoders:
            found, pooled = encode_chunks(base, name, given, length, style, layer=layer, normed=False)
            states.append(found)
        return _without_prompt(base, Conditioning(torch.cat(states, dim=-1), pooled), prompts)

    def conditions(self, conditioning: Conditioning, sizes: Sequence[PictureSize]) -> dict[str, Any]:
        """Return states, pooled embedding and each picture's sizes, (height, width) in pixels."""
        numbers = [[*size.original, *size.crop_top_left, *size.target] for size in sizes]
        time_ids = torch.tensor(numbers, device=conditioning.states.device, dtype=torch.float32)
        return {
            "encoder_hidden_states": conditioning.states,
            "added_cond_kwargs": {"text_embeds": conditioning.pooled, "time_ids": time_ids},
        }

    def make_pipeline(self, base: LoadedBase) -> StableDiffusionXLPipeline:
        """Return the text-to-image pipeline over these components, with the base's own sampler."""
        pipeline: Any = StableDiffusionXLPipeline(
            vae=base.vae,
            text_encoder=base.text_encoders["text_encoder"],
            text_encoder_2=base.text_encoders["text_encoder_2"],
            tokenizer=base.tokenizers["text_encoder"],
            tokenizer_2=base.tokenizers["text_encoder_2"],
            unet=base.unet,
            scheduler=sampler(base),
            force_zeros_for_empty_prompt=base.zero_without_prompt,
            add_watermarker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _without_prompt(base: LoadedBase, encoded: Conditioning, prompts: Sequence[object]) -> Conditioning:
    """Return the conditioning with zeros where there is no prompt, of a base that was trained so."""
    if not base.zero_without_prompt or None not in prompts or encoded.pooled is None:
        return encoded
    given = torch.tensor([prompt is not None for prompt in prompts], device=base.device)
    return Conditioning(encoded.states * given[:, None, None], encoded.pooled * given[:, None])


_METADATA = {
    "ss_v2": "False",
    "ss_base_model_version": "sdxl_base_v1-0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
}
SDXL = StableDiffusionXL(
    SDXL_TRAITS,
    {"epsilon": 1024, "v": 1024},
    {
        "text_encoder": EncoderPart(CLIPTextModel),
        "text_encoder_2": EncoderPart(CLIPTextModelWithProjection, "!"),
    },
    {"epsilon": _METADATA, "v": _METADATA},
)

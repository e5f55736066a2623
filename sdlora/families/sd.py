"""Stable Diffusion 1.x and 2.x: one text encoder, one UNet, epsilon or v-prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from sdlora.diffusion import Prediction
from sdlora.errors import ModelError
from sdlora.families.base import BaseSource, Conditioning, LoadedBase, PictureSize
from sdlora.families.weights import load_part, load_unet

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CROSS_ATTENTION = tuple(f"attn2.{name}" for name in _ATTENTION)
_ALL_ATTENTION = tuple(f"attn{number}.{name}" for number in (1, 2) for name in _ATTENTION)
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_TEXT_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")


class StableDiffusion:
    """The family of SD 1.x (CLIP ViT-L, width 768) and SD 2.x (OpenCLIP ViT-H, width 1024)."""

    def __init__(
        self, name: str, title: str, default_resolution: int, metadata: dict[Prediction, dict[str, str]]
    ) -> None:
        self.name = name
        self.title = title
        self.default_resolution = default_resolution
        self.metadata = metadata
        self.text_encoder_prefixes = {"text_encoder": "lora_te"}
        self.target_presets: dict[str, tuple[str, ...]] = {
            "cross-attention": _CROSS_ATTENTION,
            "attention": _ALL_ATTENTION,
            "transformer": (*_ALL_ATTENTION, *_FEED_FORWARD, "attentions.*.proj_in", "attentions.*.proj_out"),
        }
        self.text_encoder_targets: tuple[str, ...] = _TEXT_ATTENTION

    def load(
        self, source: BaseSource, device: torch.device, dtype: torch.dtype, variant: str | None = None
    ) -> LoadedBase:
        """Return the base of a diffusers folder, frozen, in evaluation mode. Raises ModelError."""
        folder = source.path
        try:
            return self._assemble(
                source,
                device,
                dtype,
                unet=load_unet(folder, variant, device, dtype),
                vae=load_part(AutoencoderKL, folder, "vae", variant, torch_dtype=dtype),
                text_encoder=load_part(CLIPTextModel, folder, "text_encoder", variant, dtype=dtype),
                tokenizer=CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
                scheduler_config=DDPMScheduler.load_config(folder, subfolder="scheduler"),
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"{folder}: cannot be loaded as {self.title} ({_first_line(error)}); "
                "the folder must hold unet, vae, text_encoder, tokenizer and scheduler in diffusers format"
            ) from error

    def from_pipeline(self, pipeline: Any, source: BaseSource, device: torch.device) -> LoadedBase:
        """Return the base made of a pipeline's components, such as one read from a single file."""
        return self._assemble(
            source,
            device,
            pipeline.unet.dtype,
            unet=pipeline.unet,
            vae=pipeline.vae,
            text_encoder=pipeline.text_encoder,
            tokenizer=pipeline.tokenizer,
            scheduler_config=dict(pipeline.scheduler.config) | {"_class_name": type(pipeline.scheduler).__name__},
        )

    def _assemble(
        self,
        source: BaseSource,
        device: torch.device,
        dtype: torch.dtype,
        *,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler_config: dict[str, Any],
    ) -> LoadedBase:
        if unet.config.in_channels != 4:
            raise ModelError(
                f"{source.name}: its UNet takes {unet.config.in_channels} channels (an inpainting or "
                "edit model); use the plain text-to-image base that it was made from"
            )
        for module in (unet, vae, text_encoder):
            module.requires_grad_(False)
            module.eval()
            module.to(device)
        unet.to(memory_format=torch.channels_last)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        sample_size = unet.config.sample_size
        return LoadedBase(
            family=self,
            source=source,
            unet=unet,
            vae=vae,
            text_encoders={"text_encoder": text_encoder},
            tokenizers={"text_encoder": tokenizer},
            scheduler=DDPMScheduler.from_config(scheduler_config),
            device=device,
            dtype=dtype,
            resolution=sample_size * factor if isinstance(sample_size, int) else self.default_resolution,
            sampler_config=dict(scheduler_config),
        )

    def encode_images(self, base: LoadedBase, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and std of the scaled latents, each [B,4,H/8,W/8] float32."""
        with torch.no_grad():
            posterior = base.vae.encode(pixels.to(base.device, base.vae.dtype)).latent_dist
        shift = base.vae.config.shift_factor or 0.0
        scale = base.vae.config.scaling_factor
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def decode_latents(self, base: LoadedBase, latents: torch.Tensor) -> torch.Tensor:
        """Return pixels [B,3,H,W] float32 in [0,1]."""
        shift = base.vae.config.shift_factor or 0.0
        unscaled = latents.to(base.vae.dtype) / base.vae.config.scaling_factor + shift
        with torch.no_grad():
            pixels: torch.Tensor = base.vae.decode(unscaled).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def encode_prompts(self, base: LoadedBase, prompts: Sequence[str]) -> Conditioning:
        """Return the last hidden states after the final norm, [B,77,D] in the text encoder's dtype."""
        tokenizer = base.tokenizers["text_encoder"]
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return Conditioning(base.text_encoders["text_encoder"](tokens.input_ids.to(base.device))[0])

    def predict(
        self,
        base: LoadedBase,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        sizes: Sequence[PictureSize],
    ) -> torch.Tensor:
        """Return the UNet's output [B,4,h,w]; SD 1.x and 2.x take no picture sizes."""
        output: torch.Tensor = base.unet(
            noisy_latents, timesteps, encoder_hidden_states=conditioning.states, return_dict=False
        )[0]
        return output

    def pipeline_conditioning(self, encoded: Conditioning, count: int) -> dict[str, Any]:
        """Return prompt_embeds and negative_prompt_embeds, each [count,77,D]."""
        positive, negative = encoded.rows([0] * count), encoded.rows([1] * count)
        return {"prompt_embeds": positive.states, "negative_prompt_embeds": negative.states}

    def make_pipeline(self, base: LoadedBase) -> StableDiffusionPipeline:
        """Return the text-to-image pipeline over these components, with the base's own sampler."""
        import diffusers

        name = base.sampler_config.get("_class_name", "")
        scheduler_class = getattr(diffusers, name, diffusers.PNDMScheduler)
        pipeline: Any = StableDiffusionPipeline(
            vae=base.vae,
            text_encoder=base.text_encoders["text_encoder"],
            tokenizer=base.tokenizers["text_encoder"],
            unet=base.unet,
            scheduler=scheduler_class.from_config(base.sampler_config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


SD1 = StableDiffusion(
    "sd1",
    "Stable Diffusion 1.x",
    512,
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
    "sd2",
    "Stable Diffusion 2.x",
    768,
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

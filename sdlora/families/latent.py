"""What all Stable Diffusion families share: a UNet in the latents of a VAE, and prompts from CLIP text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler

from sdlora.diffusion import Prediction
from sdlora.errors import ModelError
from sdlora.families.base import BaseParts, Conditioning, EncoderPart, LoadedBase, PictureSize, Residuals
from sdlora.families.traits import (
    INPAINTING_CHANNELS,
    LATENT_CHANNELS,
    PREDICTION_NAMES,
    FamilyTraits,
    describe_channels,
)
from sdlora.families.words import token_counts, token_limit

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CROSS_ATTENTION = tuple(f"attn2.{name}" for name in _ATTENTION)
_ALL_ATTENTION = tuple(f"attn{number}.{name}" for number in (1, 2) for name in _ATTENTION)
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_RESNET = ("resnets.*.conv1", "resnets.*.conv2", "resnets.*.conv_shortcut", "resnets.*.time_emb_proj")
_TEXT_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")

_PROMPTS_AT_ONCE = 256
"""A tokenizer's results take kilobytes each."""


class LatentDiffusion:
    """The common half of every family; a subclass adds how prompts become conditioning and what the UNet is told."""

    target_presets: Mapping[str, tuple[str, ...]] = {
        "cross-attention": _CROSS_ATTENTION,
        "attention": _ALL_ATTENTION,
        "transformer": (*_ALL_ATTENTION, *_FEED_FORWARD, "attentions.*.proj_in", "attentions.*.proj_out"),
        "resnet": (*_RESNET, "downsamplers.0.conv", "upsamplers.0.conv"),
    }
    text_encoder_presets: Mapping[str, tuple[str, ...]] = {
        "attention": _TEXT_ATTENTION,
        "transformer": (*_TEXT_ATTENTION, "mlp.fc1", "mlp.fc2"),
    }

    vae_overflows = False

    def __init__(
        self,
        traits: FamilyTraits,
        resolutions: Mapping[Prediction, int],
        text_encoders: Mapping[str, EncoderPart],
        metadata: Mapping[Prediction, Mapping[str, str]],
    ) -> None:
        self.traits = traits
        self.name = traits.name
        self.title = traits.title
        self.resolutions = resolutions
        self.text_encoders = text_encoders
        self.metadata = metadata

    def assemble(self, parts: BaseParts, device: torch.device, dtype: torch.dtype) -> LoadedBase:
        """Return the base made of `parts`, frozen, in evaluation mode. Raises ModelError for a UNet that cannot serve."""
        channels = parts.unet.config.in_channels
        if channels not in (LATENT_CHANNELS, INPAINTING_CHANNELS):
            raise ModelError(f"{parts.source.name}: {describe_channels(channels)}")
        for module in (parts.vae, *parts.text_encoders.values(), parts.unet):
            module.requires_grad_(False)
            module.eval()
        for module in (parts.vae, *parts.text_encoders.values()):
            module.to(device)
        scheduler = DDPMScheduler.from_config(parts.scheduler_config)
        prediction = PREDICTION_NAMES[scheduler.config.prediction_type]
        factor = 2 ** (len(parts.vae.config.block_out_channels) - 1)
        sample_size = parts.unet.config.sample_size
        return LoadedBase(
            family=self,  # type: ignore[arg-type]  # the subclass has the rest
            source=parts.source,
            unet=parts.unet,
            vae=parts.vae,
            text_encoders=dict(parts.text_encoders),
            tokenizers=dict(parts.tokenizers),
            scheduler=scheduler,
            device=device,
            dtype=dtype,
            resolution=sample_size * factor if isinstance(sample_size, int) else self.resolutions[prediction],
            sampler_config=dict(parts.scheduler_config),
            zero_without_prompt=bool(parts.index.get("force_zeros_for_empty_prompt")),
            unet_loader=parts.fill_unet,
        )

    def conditions(self, conditioning: Conditioning, sizes: Sequence[PictureSize]) -> dict[str, Any]:
        """Return what UNets and ControlNets of this family are told besides latents and timesteps."""
        return {"encoder_hidden_states": conditioning.states}

    def predict(
        self,
        base: LoadedBase,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        sizes: Sequence[PictureSize],
        residuals: Residuals | None = None,
    ) -> torch.Tensor:
        """Return the UNet's output [B,4,h,w]."""
        told = self.conditions(conditioning, sizes)
        if residuals is not None:
            told["down_block_additional_residuals"] = residuals.down
            told["mid_block_additional_residual"] = residuals.mid
        output: torch.Tensor = base.unet(noisy_latents, timesteps, **told, return_dict=False)[0]
        return output

    def control(
        self,
        net: Any,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        sizes: Sequence[PictureSize],
        maps: torch.Tensor,
    ) -> Residuals:
        """Return what a ControlNet adds for maps [B,3,H,W]."""
        told = self.conditions(conditioning, sizes)
        down, mid = net(noisy_latents, timesteps, controlnet_cond=maps, **told, return_dict=False)
        return Residuals(tuple(down), mid)

    def encode_images(self, base: LoadedBase, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and std of the scaled latents, each [B,4,H/8,W/8] float32."""
        with torch.no_grad():
            posterior = base.vae.encode(pixels.to(base.device, base.vae.dtype)).latent_dist
        shift = base.vae.config.shift_factor or 0.0
        scale = base.vae.config.scaling_factor
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def excess_tokens(self, base: LoadedBase, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens of each prompt the encoders do not see, 0 where it fits."""
        most = [0] * len(prompts)
        for name in base.tokenizers:
            limit = token_limit(base, name)
            for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
                part = prompts[start : start + _PROMPTS_AT_ONCE]
                for index, count in enumerate(token_counts(base, name, part), start):
                    most[index] = max(most[index], count - limit)
        return most

    def decode_latents(self, base: LoadedBase, latents: torch.Tensor) -> torch.Tensor:
        """Return pixels [B,3,H,W] float32 in [0,1]; where the VAE overflowed, NaN."""
        shift = base.vae.config.shift_factor or 0.0
        unscaled = latents.to(base.vae.dtype) / base.vae.config.scaling_factor + shift
        # Under autocast a VAE that is kept in float32 because it overflows would overflow again.
        with torch.no_grad(), torch.autocast(base.device.type, enabled=False):
            pixels: torch.Tensor = base.vae.decode(unscaled).sample
        pixels = pixels.float()
        return (pixels / 2 + 0.5).clamp(0, 1).masked_fill(~pixels.isfinite(), torch.nan)


def sampler_class(config: Mapping[str, Any]) -> str:
    """Return the name of the scheduler that a base's scheduler_config.json is of."""
    return str(config.get("_class_name") or "PNDMScheduler")


def sampler(base: LoadedBase) -> Any:
    """Return the scheduler that the base ships with, for making pictures. Raises ModelError where there is none."""
    name = sampler_class(base.sampler_config)
    kind = getattr(diffusers, name, None)
    where = f"{base.source.name}: its scheduler_config.json names the sampler {name}"
    if not (isinstance(kind, type) and hasattr(kind, "from_config") and name.endswith("Scheduler")):
        raise ModelError(f"{where}, which diffusers does not have; write DDIMScheduler there")
    try:
        return kind.from_config(base.sampler_config)
    except ImportError as error:
        raise ModelError(f"{where}, which needs a library that is not installed; pip install scipy") from error

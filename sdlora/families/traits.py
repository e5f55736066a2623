"""The families as data: what tells them apart on disk. Needs no model library, so that looking at a base is quick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdlora.diffusion import Prediction

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
"""How the keys of UNet and VAE begin in a checkpoint in the original layout, whatever its family."""
LATENT_CHANNELS = 4
INPAINTING_CHANNELS = 9
"""Of an inpainting UNet: latents, a mask, and the latents of the picture with grey under that mask."""
PREDICTION_TYPES: dict[Prediction, str] = {"epsilon": "epsilon", "v": "v_prediction"}
"""Our names of what a UNet predicts -> the library's."""
PREDICTION_NAMES: dict[str, Prediction] = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
"""The library's names -> ours."""


BREAK_SEGMENT = ("BREAK", -1.0)
"""Text and weight of the segment of a prompt that ends a chunk of tokens."""
TEXT_MODEL = "text_model."
"""A step in the paths of text encoders' layers that files have and newer versions of the library have dropped."""
_INSIDE_TEXT_MODEL = ("embeddings.", "encoder.", "final_layer_norm")
_SD_RGB = ((0.3512, 0.2297, 0.3227), (0.3250, 0.4974, 0.2350), (-0.2829, 0.1762, 0.2721), (-0.2120, -0.2616, -0.7177))
"""As measured by others on SD 1.5's VAE, which SD 2.x shares, and below on SDXL's; ComfyUI uses the same."""
_SDXL_RGB = (
    (0.3651, 0.4232, 0.4341),
    (-0.2533, -0.0042, 0.1068),
    (0.1076, 0.1111, -0.0362),
    (-0.3165, -0.2492, -0.2188),
)


@dataclass(frozen=True)
class FamilyTraits:
    """What a family's bases look like on disk."""

    name: str
    title: str
    encoder_prefixes: Mapping[str, str]
    """Text encoder -> how its keys begin in a checkpoint in the original layout."""
    takes_sizes: bool
    """Whether the UNet is told the pictures' sizes and a pooled text embedding."""
    linear_projection: bool
    """Whether the projections around the UNet's attention are linear layers, and not convolutions."""
    latent_rgb: tuple[tuple[float, float, float], ...] = _SD_RGB
    """Red, green and blue, -1 to 1, of each channel of the latents: about what its VAE makes of them."""
    latent_rgb_bias: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def recognises_unet(self, config: Mapping[str, Any]) -> bool:
        """Return whether a UNet of this configuration (a diffusers config.json) is one of this family's."""
        embedding = "text_time" if self.takes_sizes else None
        return (
            config.get("addition_embed_type") == embedding
            and bool(config.get("use_linear_projection")) == self.linear_projection
        )


SD1_TRAITS = FamilyTraits(
    "sd1", "Stable Diffusion 1.x", {"text_encoder": "cond_stage_model.transformer."}, False, False
)
SD2_TRAITS = FamilyTraits("sd2", "Stable Diffusion 2.x", {"text_encoder": "cond_stage_model.model."}, False, True)
SDXL_TRAITS = FamilyTraits(
    "sdxl",
    "Stable Diffusion XL",
    {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
    True,
    True,
    _SDXL_RGB,
    (0.1084, -0.0175, -0.0011),
)
ALL_TRAITS = (SDXL_TRAITS, SD2_TRAITS, SD1_TRAITS)
"""The most demanding first: a merge may have kept stray keys of another family."""


def canonical(component: str, path: str) -> str:
    """Return what files call a layer of a component: that, and its path with the step that newer libraries dropped."""
    if component.startswith("text_encoder") and path.startswith(_INSIDE_TEXT_MODEL):
        return f"{component}.{TEXT_MODEL}{path}"
    return f"{component}.{path}"


def tokenizer_folder(encoder: str) -> str:
    """Return the name of a text encoder's tokenizer folder beside it: "tokenizer_2" for "text_encoder_2"."""
    return encoder.replace("text_encoder", "tokenizer")


def family_title(name: str) -> str:
    """Return what people call the family `name`; an unknown name is its own title."""
    return next((traits.title for traits in ALL_TRAITS if traits.name == name), name)


def describe_channels(channels: int) -> str:
    """Return the sentence for a UNet that takes neither plain latents nor those of inpainting."""
    kind = {8: "an image-editing"}.get(channels, "another kind of")
    return (
        f"is {kind} model (its UNet takes {channels} channels instead of {LATENT_CHANNELS}, or {INPAINTING_CHANNELS} for "
        "inpainting); use the plain text-to-image base that it was made from"
    )

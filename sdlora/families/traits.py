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
PREDICTION_TYPES: dict[Prediction, str] = {"epsilon": "epsilon", "v": "v_prediction"}
"""Our names of what a UNet predicts -> the library's."""
PREDICTION_NAMES: dict[str, Prediction] = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
"""The library's names -> ours."""


BREAK_SEGMENT = ("BREAK", -1.0)
"""Text and weight of the segment of a prompt that ends a chunk of tokens."""
TEXT_MODEL = "text_model."
"""A step in the paths of text encoders' layers that files have and newer versions of the library have dropped."""
_INSIDE_TEXT_MODEL = ("embeddings.", "encoder.", "final_layer_norm")


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
    """Return the sentence for a UNet that does not take plain latents."""
    kind = {8: "an image-editing", 9: "an inpainting"}.get(channels, "another kind of")
    return (
        f"is {kind} model (its UNet takes {channels} channels instead of {LATENT_CHANNELS}); "
        "use the plain text-to-image base that it was made from"
    )

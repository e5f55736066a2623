"""What infotext says of a picture's start, its second pass and its ControlNets, by AUTOMATIC1111's keys."""

from __future__ import annotations

import re
from pathlib import Path

from sdlora.generation.recipe import Recipe, UsedControl, UsedMask

UPSCALERS = {
    "latent": "Latent",
    "latent (nearest-exact)": "Latent (nearest-exact)",
    "latent (bicubic)": "Latent (bicubic)",
    "lanczos": "Lanczos",
    "nearest": "Nearest",
}
"""As AUTOMATIC1111 calls them."""
_RESIZE_MODES = {
    "just resize": "Just Resize",
    "crop and resize": "Crop and Resize",
    "resize and fill": "Resize and Fill",
}
"""As its ControlNet extension calls them."""


def start_fields(recipe: Recipe) -> dict[str, str]:
    """Return the fields of a recipe that starts at a picture, has a second pass or ControlNets, none for others."""
    fields: dict[str, str] = {}
    if recipe.start:
        fields["Denoising strength"] = f"{recipe.start.strength:g}"
        if recipe.start.mask:
            fields |= _mask_fields(recipe.start.mask)
    if recipe.hires:
        fields["Denoising strength"] = f"{recipe.hires.strength:g}"
        fields["Hires upscale"] = f"{recipe.hires.scale:g}"
        fields["Hires steps"] = str(recipe.hires.steps)
        fields["Hires upscaler"] = UPSCALERS.get(recipe.hires.upscaler, recipe.hires.upscaler)
    fields |= {f"ControlNet {number}": _control_field(control) for number, control in enumerate(recipe.controls)}
    return fields


def _control_field(control: UsedControl) -> str:
    """Return what the ControlNet extension of AUTOMATIC1111 says of one, which has no preprocessor here."""
    said = {
        "Module": "none",
        "Model": re.sub(r"[:,]", "", Path(control.model).name.removesuffix(".safetensors")),
        "Weight": f"{control.strength:g}",
        "Resize Mode": _RESIZE_MODES.get(control.resize, control.resize),
        "Guidance Start": f"{control.start:g}",
        "Guidance End": f"{control.end:g}",
        "Pixel Perfect": "False",
        "Control Mode": "Balanced",
    }
    return ", ".join(f"{key}: {value}" for key, value in said.items())


def _mask_fields(mask: UsedMask) -> dict[str, str]:
    fields = {"Mask blur": f"{mask.blur:g}"}
    if mask.area == "only masked":
        fields |= {"Inpaint area": "Only masked", "Masked area padding": str(mask.padding)}
    if mask.content != "original":
        fields["Masked content"] = mask.content
    return fields

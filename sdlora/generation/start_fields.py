"""What infotext says of a picture's start and its second pass, by AUTOMATIC1111's keys."""

from __future__ import annotations

from sdlora.generation.request import Recipe, UsedMask

UPSCALERS = {
    "latent": "Latent",
    "latent (nearest-exact)": "Latent (nearest-exact)",
    "latent (bicubic)": "Latent (bicubic)",
    "lanczos": "Lanczos",
    "nearest": "Nearest",
}
"""As AUTOMATIC1111 calls them."""


def start_fields(recipe: Recipe) -> dict[str, str]:
    """Return the fields of a recipe that starts at a picture or has a second pass, none for others."""
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
    return fields


def _mask_fields(mask: UsedMask) -> dict[str, str]:
    fields = {"Mask blur": f"{mask.blur:g}"}
    if mask.area == "only masked":
        fields |= {"Inpaint area": "Only masked", "Masked area padding": str(mask.padding)}
    if mask.content != "original":
        fields["Masked content"] = mask.content
    return fields

"""PNG files that carry their recipe, as sdlora's JSON and as the line other programs read."""

from __future__ import annotations

import json
import re
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdlora.errors import FormatError
from sdlora.generation.request import Recipe, UsedAdapter
from sdlora.storage import atomic_path

RECIPE_KEY = "sdlora"
INFOTEXT_KEY = "parameters"
_EMPHASES = {"no norm": "No norm", "ignore": "Ignore", "none": "None"}
"""As AUTOMATIC1111 calls them."""
_NOISE_SOURCES = {"cpu": "CPU", "cuda": "NV"}
"""As AUTOMATIC1111 calls them: NV is an NVIDIA device's noise, drawn on the CPU."""


def png_info(recipe: Recipe) -> PngInfo:
    """Return the text chunks of a picture: key "sdlora" the recipe as JSON, key "parameters" the infotext."""
    info = PngInfo()
    info.add_itxt(INFOTEXT_KEY, infotext(recipe))
    info.add_itxt(RECIPE_KEY, recipe.to_json())
    return info


def save_picture(picture: Image.Image, recipe: Recipe, path: Path) -> None:
    """`path` is a PNG of the picture with its recipe inside. Raises OutputError."""
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=png_info(recipe))


def read_recipe(path: Path) -> Recipe:
    """Return the recipe of a picture that sdlora made. Raises FormatError where there is none."""
    try:
        with Image.open(path) as picture:
            text = picture.info.get(RECIPE_KEY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FormatError(f"{path}: cannot be read as a picture ({error})") from error
    if not isinstance(text, str):
        raise FormatError(f"{path}: carries no sdlora recipe")
    return Recipe.from_json(text)


def picture_name(recipe: Recipe) -> str:
    """Return a file name that tells seed and prompt: "00042-a-red-ball.png"."""
    words = re.sub(r"[^\w]+", "-", recipe.prompt.lower()).strip("-")[:60].rstrip("-")
    return f"{recipe.seed:05d}-{words or 'picture'}.png"


def infotext(recipe: Recipe) -> str:
    """Return the text that AUTOMATIC1111 and its relatives write and read under "parameters"."""
    fields: dict[str, str] = {
        "Steps": str(recipe.steps),
        "Sampler": recipe.sampler or recipe.scheduler,
        "CFG scale": f"{recipe.guidance_scale:g}",
        "Seed": str(recipe.seed),
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": recipe.base_sha256[:10],
        "Model": recipe.base,
        "RNG": _NOISE_SOURCES.get(recipe.noise_device, recipe.noise_device.upper()),
    }
    if recipe.schedule:
        fields["Schedule type"] = recipe.schedule
    if recipe.guidance_rescale:
        fields["CFG Rescale phi"] = f"{recipe.guidance_rescale:g}"
    if recipe.scheduler_config.get("rescale_betas_zero_snr"):
        fields["Noise Schedule"] = "Zero Terminal SNR"
    if recipe.clip_skip > 1:
        fields["Clip skip"] = str(recipe.clip_skip)
    if recipe.emphasis != "original":
        fields["Emphasis"] = _EMPHASES.get(recipe.emphasis, recipe.emphasis)
    loras = [item for item in recipe.adapters if not item.embedding]  # an embedding acts by its word in the prompt
    if loras:
        hashes = [f"{re.sub('[:,]', '', item.name)}: {item.tensor_sha256[:12]}" for item in loras]
        fields["Lora hashes"] = ", ".join(hashes)
    fields["Version"] = f"sdlora {recipe.versions.get('sdlora', '')}".strip()
    tags = "".join(f" <lora:{item.name}:{_weights(item)}>" for item in loras)
    lines = [recipe.prompt + tags]
    if recipe.negative_prompt:
        lines.append(f"Negative prompt: {recipe.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in fields.items()))
    return "\n".join(lines)


def _weights(item: UsedAdapter) -> str:
    """Return an adapter's weights as in its tag: one for all, or those of text encoders and UNet."""
    if item.text_encoder_weight in (None, item.weight):
        return f"{item.weight:g}"
    return f"{item.text_encoder_weight:g}:{item.weight:g}"


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value

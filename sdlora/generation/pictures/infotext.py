"""Infotext: the line in pictures by which AUTOMATIC1111 and its relatives tell each other what made them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdlora.families.samplers.names import OF_SCHEDULERS, SAMPLERS
from sdlora.generation.pictures.start_fields import start_fields
from sdlora.generation.recipe import Recipe, UsedAdapter

_SCHEDULE_SETTINGS = {
    "use_karras_sigmas": "Karras",
    "use_exponential_sigmas": "Exponential",
    "use_beta_sigmas": "Beta",
}
"""Settings of diffusers' schedulers -> the schedule that they stand for."""
_EMPHASES = {"no norm": "No norm", "ignore": "Ignore", "none": "None"}
"""As AUTOMATIC1111 calls them."""
_NOISE_SOURCES = {"cpu": "CPU", "cuda": "NV"}
"""As AUTOMATIC1111 calls them: NV is an NVIDIA device's noise, drawn on the CPU."""
_NEGATIVE = "Negative prompt:"
_FEWEST_FIELDS = 3
"""With fewer, the last line is part of the prompt."""
# A key is bounded, or a long line without colons would take time that grows with the square of its length.
_FIELD = re.compile(r'(\w[\w \-/]{1,100}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d{1,9})x(\d{1,9})")
_HASHES = re.compile(r"(?:^|, )Hashes: (\{[^{}]*\})")
_PAIR = re.compile(r"\s*([^:,]+?)\s*:\s*([^,]*?)\s*(?:,|$)")


@dataclass(frozen=True)
class Infotext:
    """What an infotext says."""

    prompt: str
    negative_prompt: str
    fields: Mapping[str, str]
    """The last line by its keys; a size is two, "Size-1" and "Size-2". Quotes are taken away."""
    hashes: Mapping[str, str]
    """What files hash to, as Civitai's extension notes it: "model", "lora:NAME", "embed:NAME"."""

    @property
    def lora_hashes(self) -> dict[str, str]:
        """Hashes by the names that adapters have in tags."""
        return _pairs(self.fields.get("Lora hashes", ""))

    @property
    def embedding_hashes(self) -> dict[str, str]:
        """Hashes by the names of embeddings that the prompts use."""
        return _pairs(self.fields.get("TI hashes", ""))


# --- writing -----------------------------------------------------------------------------------------


def infotext(recipe: Recipe) -> str:
    """Return the text that AUTOMATIC1111 and its relatives write and read under "parameters".

    Adapters stand as tags behind the prompt. Their hashes are there twice: of the weights alone (AutoV3), by which those
    programs find a file of another name, and of whole files (AutoV2), by which Civitai links them.
    """
    fields = _fields(recipe)
    loras, embeddings = _loras(recipe), [item for item in recipe.adapters if item.embedding]
    if loras:
        fields["Lora hashes"] = ", ".join(f"{_name(item)}: {item.tensor_sha256[:12]}" for item in loras)
    if embeddings:  # which act by their words in the prompt
        fields["TI hashes"] = ", ".join(f"{_name(item)}: {item.sha256[:12]}" for item in embeddings)
    fields["Version"] = f"sdlora {recipe.versions.get('sdlora', '')}".strip()
    tags = "".join(f" <lora:{item.name}:{_weights(item)}>" for item in loras)
    lines = [recipe.prompt + tags]
    if recipe.negative_prompt:
        lines.append(f"{_NEGATIVE} {recipe.negative_prompt}")
    last = ", ".join(f"{key}: {_quoted(value)}" for key, value in fields.items())
    return "\n".join([*lines, f"{last}, Hashes: {json.dumps(_file_hashes(recipe), ensure_ascii=False)}"])


def _fields(recipe: Recipe) -> dict[str, str]:
    fields = {"Steps": str(recipe.steps), "Sampler": recipe.sampler or _usual_name(recipe)}
    if recipe.schedule:
        fields["Schedule type"] = recipe.schedule
    fields |= {
        "CFG scale": f"{recipe.guidance_scale:g}",
        "Seed": str(recipe.seed),
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": recipe.base_sha256[:10],
        "Model": recipe.base,
        "RNG": _NOISE_SOURCES.get(recipe.noise_device, recipe.noise_device.upper()),
    }
    if recipe.guidance_rescale:
        fields["CFG Rescale phi"] = f"{recipe.guidance_rescale:g}"
    if recipe.scheduler_config.get("rescale_betas_zero_snr"):
        fields["Noise Schedule"] = "Zero Terminal SNR"
    fields |= start_fields(recipe)
    if recipe.clip_skip > 1:
        fields["Clip skip"] = str(recipe.clip_skip)
    if recipe.emphasis != "original":
        fields["Emphasis"] = _EMPHASES.get(recipe.emphasis, recipe.emphasis)
    return fields


def _usual_name(recipe: Recipe) -> str:
    """Return what people call the base's own sampler where that name means, by itself, what ran; else the scheduler's."""
    name, settings = OF_SCHEDULERS.get(recipe.scheduler), recipe.scheduler_config
    if name is None or settings.get("algorithm_type", "dpmsolver++") != "dpmsolver++":
        return recipe.scheduler
    ran = next((schedule for setting, schedule in _SCHEDULE_SETTINGS.items() if settings.get(setting)), "")
    usual = SAMPLERS[name].automatic
    meant = usual if usual in _SCHEDULE_SETTINGS.values() else ""
    return name if ran == meant else recipe.scheduler


def _file_hashes(recipe: Recipe) -> dict[str, str]:
    kinds = {True: "embed", False: "lora"}
    found = {f"{kinds[item.embedding]}:{_name(item)}": item.sha256[:10] for item in recipe.adapters}
    return {"model": recipe.base_sha256[:10]} | found


def _loras(recipe: Recipe) -> Sequence[UsedAdapter]:
    return [item for item in recipe.adapters if not item.embedding]


def _name(item: UsedAdapter) -> str:
    """Return an adapter's name without what ends one in a list of them."""
    return re.sub(r"[:,{}]", "", item.name)


def _weights(item: UsedAdapter) -> str:
    """Return an adapter's weights as in its tag: one for all, or those of text encoders and UNet; blocks and steps."""
    alike = item.text_encoder_weight in (None, item.weight)
    weights = f"{item.weight:g}" if alike else f"{item.text_encoder_weight:g}:{item.weight:g}"
    return weights + (f":lbw={item.blocks}" if item.blocks else "") + (f":step={item.steps}" if item.steps else "")


def _quoted(value: str) -> str:
    """Return a field's value as it is written: in quotes where it would not be read back without."""
    bare = not re.search(r'[,:\n]|^"', value) and value == value.strip()
    return value if bare else json.dumps(value, ensure_ascii=False)


# --- reading -----------------------------------------------------------------------------------------


def parse_infotext(text: str) -> Infotext:
    """Return what an infotext says; of any text at all, for one without fields is a prompt.

    The last line is one of fields where it has three or more. A line that begins with "Negative prompt:" and all after it
    are the negative prompt. Space around lines does not count.
    """
    *lines, last = text.strip().split("\n")
    hashes = _HASHES.search(last)
    described = last[: hashes.start()] + last[hashes.end() :] if hashes else last
    found = _FIELD.findall(described)
    if len(found) < _FEWEST_FIELDS:
        return Infotext(*_prompts([*lines, last]), {}, {})
    fields: dict[str, str] = {}
    for key, value in found:
        bare = _unquoted(value.strip())
        size = _SIZE.fullmatch(bare)
        fields |= {f"{key}-1": size[1], f"{key}-2": size[2]} if size else {key: bare}
    return Infotext(*_prompts(lines), fields, _json_hashes(hashes[1]) if hashes else {})


def _prompts(lines: Sequence[str]) -> tuple[str, str]:
    stripped = [line.strip() for line in lines]
    start = next((place for place, line in enumerate(stripped) if line.startswith(_NEGATIVE)), len(stripped))
    negative = [line.removeprefix(_NEGATIVE).strip() for line in stripped[start:]]
    return "\n".join(stripped[:start]).strip("\n"), "\n".join(negative).strip("\n")


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value, strict=False))
        except (ValueError, RecursionError):
            pass
    return value


def _pairs(text: str) -> dict[str, str]:
    """Return "name: hash, name: hash" as a mapping."""
    return {match[1]: match[2] for match in _PAIR.finditer(text)}


def _json_hashes(text: str) -> dict[str, str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return {key: digest for key, digest in value.items() if isinstance(digest, str)}

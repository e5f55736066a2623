"""Tags by which a prompt asks for adapters: <lora:name:0.8>."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from sdlora.generation.prompts.attention import finite_number

_TAG = re.compile(r"<(\w+):([^<>]+)>")


@dataclass(frozen=True)
class Tag:
    """An adapter that a prompt asks for, <lora:name:te:unet>, by the name it has there."""

    name: str
    text_encoder: float = 1.0
    unet: float = 1.0
    options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """What else it says as key=value, such as lbw=; a fourth value without a key is "dyn"."""

    @property
    def blocks(self) -> str:
        """What it says of blocks, as the LoRA Block Weight extension writes it: lbw=."""
        return self.options.get("lbw", "")

    @property
    def steps(self) -> str:
        """What it says of steps: step=, else start= and stop= as one."""
        if "step" not in self.options and ("start" in self.options or "stop" in self.options):
            return f"{self.options.get('start', '')}-{self.options.get('stop', '')}"
        return self.options.get("step", "")


@dataclass(frozen=True)
class Tagged:
    """A prompt without its tags."""

    text: str
    tags: tuple[Tag, ...]
    others: tuple[str, ...]
    """Tags of other kinds, such as <hypernet:name:1>, which were taken out as well."""


def parse_tags(text: str) -> Tagged:
    """Return the prompt without <word:...>, and the adapters that it asks for.

    <lora:name>, <lora:name:0.8> for both, <lora:name:0.5:1> for text encoders and UNet, te= and unet= by name;
    "lyco" means the same. A tag whose weights are no numbers is text.
    """
    tags: list[Tag] = []
    others: list[str] = []

    def take(match: re.Match[str]) -> str:
        if match[1].lower() not in ("lora", "lyco"):
            others.append(match[0])
            return ""
        tag = _tag(match[2])
        if tag is None:
            return match[0]
        tags.append(tag)
        return ""

    return Tagged(_TAG.sub(take, text), tuple(tags), tuple(others))


def _tag(arguments: str) -> Tag | None:
    plain: list[str] = []
    named: dict[str, str] = {}
    for argument in arguments.split(":"):
        key, equals, value = argument.partition("=")
        if equals and plain:  # the name itself may hold one
            named[key.strip().lower()] = value
        else:
            plain.append(argument)
    name = plain[0].strip()
    encoder = finite_number(named.pop("te", plain[1] if len(plain) > 1 else "1"))
    if not name or encoder is None:
        return None
    unet = finite_number(named.pop("unet", plain[2] if len(plain) > 2 else f"{encoder:f}"))
    named |= {"dyn": plain[3]} if len(plain) > 3 else {}
    return None if unet is None else Tag(name, encoder, unet, MappingProxyType(named))

"""How adapters are written where there is only text: FILE, FILE:0.8, "a:0.8;b:0.5"."""

from __future__ import annotations

from pathlib import Path

from sdlora.errors import ConfigError


def parse_adapter(text: str) -> dict[str, object]:
    """Return the path of "FILE", path and weight of "FILE:WEIGHT". A colon that is followed by no number is the path's."""
    path, colon, weight = text.rpartition(":")
    if colon:
        try:
            return {"path": path, "weight": float(weight)}
        except ValueError:
            if Path(text).suffix != ".safetensors" and Path(path).suffix == ".safetensors":
                raise ConfigError(f"adapter {text}: {weight!r} is no weight; expected FILE or FILE:0.8") from None
    return {"path": text}


def parse_adapters(text: str) -> list[dict[str, object]]:
    """Return the adapters of "a:0.8;b:0.5"; none of "none" and of nothing."""
    parts = [part.strip() for part in text.split(";")]
    if parts == ["none"]:
        return []
    return [parse_adapter(part) for part in parts if part]

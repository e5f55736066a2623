"""What `sdlora base inspect` tells of a base, as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.config import BaseSection
from sdlora.families.detect import BaseFacts, detect_base
from sdlora.families.sources import find_base
from sdlora.storage import cached_sha256, remembered_sha256


@dataclass(frozen=True)
class BaseReport:
    """The facts of a base, with the size and the hashes of its files."""

    facts: BaseFacts
    size_bytes: int
    sha256: dict[str, str]
    """File name, within a folder its path there -> SHA-256; "" where it was never computed."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON can hold it; what is not known is null."""
        facts = self.facts
        return {
            "path": str(facts.path),
            "layout": "checkpoint" if facts.path.is_file() else "folder",
            "family": facts.family.name,
            "inpainting": facts.inpaints,
            "prediction": facts.prediction,
            "prediction_declared_by": facts.declared_by or None,
            "zero_terminal_snr": facts.zero_terminal_snr,
            "components": {
                name: {"parameters": count, "precision": precision}
                for name, (count, precision) in facts.components.items()
            },
            "size_bytes": self.size_bytes,
            "files": [
                {"name": name, "sha256": digest or None, "autov2": digest[:10] or None}
                for name, digest in self.sha256.items()
            ],
            "odd": list(facts.odd),
        }

    def to_text(self) -> str:
        """Return the report for people, a line each."""
        facts = self.facts
        declared = f"{facts.prediction} (says {facts.declared_by})" if facts.prediction else "not declared"
        kinds = [
            "checkpoint" if facts.path.is_file() else "diffusers folder",
            *(["inpainting"] if facts.inpaints else []),
        ]
        lines = [
            str(facts.path),
            f"  family      {facts.family.title} ({', '.join(kinds)})",
            f"  predicts    {declared}{', zero terminal SNR' if facts.zero_terminal_snr else ''}",
            f"  size        {self.size_bytes / 1e9:.2f} GB",
        ]
        for name, (count, precision) in facts.components.items():
            lines.append(f"  {name:<15} {count / 1e6:10.1f} M parameters in {precision}")
        for name, digest in self.sha256.items():
            shown = f"SHA-256 {digest}, AutoV2 {digest[:10]}" if digest else "not hashed yet; --hash does"
            lines.append(f"  {name}: {shown}")
        return "\n".join([*lines, *(f"  odd: {sentence}" for sentence in facts.odd)])


def inspect_base(section: BaseSection, *, compute_hashes: bool = False) -> BaseReport:
    """Return what is known of a base from its headers alone; hashes are those of earlier, unless they are asked for.

    Raises ModelError or FormatError where it is no usable base.
    """
    path = find_base(section)
    facts = detect_base(path, section.variant)
    files = sorted({file for found in facts.files.values() for file in found})
    digest = cached_sha256 if compute_hashes else remembered_sha256
    return BaseReport(
        facts=facts,
        size_bytes=sum(file.stat().st_size for file in files),
        sha256={_name(file, path): digest(file) for file in files},
    )


def _name(file: Path, base: Path) -> str:
    return file.name if base.is_file() else file.relative_to(base).as_posix()

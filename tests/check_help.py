"""Photo-like pictures on disk, and a check of a folder of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sdlora.config import parse_config
from sdlora.data.check import Report, check_data


def photo(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """Return a picture of soft colours and some shapes that no other seed gives."""
    random = np.random.default_rng(seed)
    soft = Image.fromarray(random.integers(40, 216, (4, 4, 3), dtype=np.uint8))
    picture = soft.resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for _ in range(6):
        left, top = random.uniform(0, 0.8, 2) * size
        width, height = random.uniform(0.1, 0.4, 2) * size
        pen.ellipse((left, top, left + width, top + height), fill=tuple(random.integers(0, 256, 3).tolist()))
    return picture


def save(folder: Path, name: str, picture: Image.Image | int, caption: str | None = "a thing", **options: Any) -> Path:
    """The picture, or the photo of that seed, and its caption are in `folder`; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    (photo(picture) if isinstance(picture, int) else picture).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def check(folder: Path | str, base: Any = None, headers_only: bool = False, **settings: Any) -> Report:
    """Return the report on a folder at 64 pixels; settings are those of [data], and whole other tables."""
    tables = {name: settings.pop(name) for name in ("training", "validation") if name in settings}
    values = {"data": {"folder": str(folder), "resolution": 64, **settings}, **tables}
    return check_data(parse_config(values), base, headers_only=headers_only)


def found(report: Report, kind: str) -> list[str]:
    """Return what is said of one kind, folders left out."""
    return [_plain(finding.text) for finding in report.findings if finding.kind.name == kind]


def kinds(report: Report) -> set[str]:
    """Return the names of all kinds found."""
    return {finding.kind.name for finding in report.findings}


def _plain(text: str) -> str:
    return " ".join(word.rpartition("/")[2] for word in text.split(" "))

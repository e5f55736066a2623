"""The flags by which every command that makes pictures is told what their files are."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from sdlora.generation.pictures import check_compression


class FileFormat(NamedTuple):
    """What files pictures become."""

    suffix: str
    quality: int | None
    lossless: bool


def add_format_flags(parser: argparse.ArgumentParser) -> None:
    """The parser knows the flags."""
    parser.add_argument("--format", choices=("png", "jpg", "webp"), default="png", help="png keeps every bit")
    parser.add_argument("--quality", type=int, default=None, help="of jpg and webp, 1 to 100 (default: 90)")
    parser.add_argument("--lossless", action="store_true", help="a webp that keeps every bit")


def file_format(options: argparse.Namespace) -> FileFormat:
    """Return what the flags say. Raises ConfigError for what makes no sense."""
    found = FileFormat(f".{options.format}", options.quality, options.lossless)
    check_compression(*found)
    return found

"""The flags by which the commands that make what is asked for are told what files pictures become."""

from __future__ import annotations

import argparse

from sdlora.generation.pictures.files import FORMATS, FileFormat, check_compression


def add_format_flags(parser: argparse.ArgumentParser) -> None:
    """The parser knows the flags."""
    parser.add_argument("--format", choices=tuple(FORMATS.values()), default="png", help="png keeps every bit")
    parser.add_argument("--quality", type=int, default=None, help="of jpg and webp, 1 to 100 (default: 90)")
    parser.add_argument("--lossless", action="store_true", help="a webp that keeps every bit")


def file_format(options: argparse.Namespace) -> FileFormat:
    """Return what the flags say. Raises ConfigError for what makes no sense."""
    found = FileFormat(f".{options.format}", options.quality, options.lossless)
    check_compression(*found)
    return found

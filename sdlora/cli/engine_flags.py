"""The flags by which the commands that make what is asked for are told where and how the base works."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdlora import Engine
    from sdlora.generation.asked import FindAdapter


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """The parser knows the flags."""
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps; default: the GPU where there is one")
    add_offload_flag(parser)
    parser.add_argument(
        "--channels-last", action="store_true", help="lay the weights of convolutions as GPUs read them best"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the UNet for each size; for many pictures without adapters"
    )


def add_offload_flag(parser: argparse.ArgumentParser) -> None:
    """The parser knows the flag."""
    parser.add_argument(
        "--offload",
        choices=("none", "model"),
        default="none",
        help="model: text encoders, UNet and VAE are on the GPU only while they work",
    )


def load_engine(options: argparse.Namespace, find_adapter: FindAdapter, *, speak: bool = True) -> Engine:
    """Return the engine of the base that the flags name; notes on the base are told, unless another process does."""
    from sdlora import Engine
    from sdlora.cli.base_flags import base_section

    engine = Engine(
        base_section(options),
        device=options.device,
        find_adapter=find_adapter,
        offload=options.offload,
        channels_last=options.channels_last,
        compile=options.compile,
    )
    tell(engine.base.notes if speak else ())
    return engine


def tell(notes: Iterable[str]) -> None:
    """The notes are printed beside what the command says."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)

"""The flags that say how the noise is drawn and taken away again."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, get_args

from sdlora.families.samplers.names import SAMPLERS, SCHEDULES
from sdlora.generation.request import GenerationRequest, NoiseSource, ZeroSnr

_FIELDS = ("sampler", "schedule", "guidance_rescale", "zero_snr", "noise")


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    """The parser knows the flags, and --list-samplers, which prints the names and ends."""
    fields = {name: info.description for name, info in GenerationRequest.model_fields.items()}
    parser.add_argument("--sampler", default="", metavar="NAME", help=fields["sampler"])
    parser.add_argument("--schedule", default="", metavar="NAME", help=fields["schedule"])
    parser.add_argument("--list-samplers", action=_ListSamplers, help="print the samplers and schedules, and end")
    parser.add_argument("--guidance-rescale", type=float, default=0.0, help=fields["guidance_rescale"])
    parser.add_argument("--zero-snr", choices=get_args(ZeroSnr), default="auto", help=fields["zero_snr"])
    parser.add_argument("--noise", choices=get_args(NoiseSource), default="cpu", help=fields["noise"])


def sampler_values(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags say, as fields of a request."""
    return {name: getattr(options, name) for name in _FIELDS}


def sampler_list() -> str:
    """Return all samplers and schedules with a line each."""
    samplers = {
        name: f"{traits.about}; usual schedule: {traits.automatic if traits.schedules else 'its own'}"
        for name, traits in SAMPLERS.items()
    }
    return f"samplers:\n{_lines(samplers)}\n\nschedules:\n{_lines(SCHEDULES)}"


def _lines(abouts: Mapping[str, str]) -> str:
    width = max(map(len, abouts))
    return "\n".join(f"  {name:<{width}}  {about}" for name, about in abouts.items())


class _ListSamplers(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(sampler_list())
        parser.exit()

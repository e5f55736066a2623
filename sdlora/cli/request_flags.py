"""The flags by which every command that makes pictures is told which."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from sdlora.cli.picture_flags import add_picture_flags, picture_settings
from sdlora.cli.sampler_flags import add_sampler_flags, sampler_values
from sdlora.generation.adapter_text import parse_adapter
from sdlora.generation.control_text import parse_control
from sdlora.generation.prompts.plan import Emphases
from sdlora.generation.request import GenerationRequest

_SETTINGS = (
    "prompt", "negative_prompt", "seed", "count", "steps", "guidance_scale", "emphasis", "clip_skip", "wildcards",
    "width", "height",
)  # fmt: skip


def add_request_flags(parser: argparse.ArgumentParser, *, prompt_required: bool = True) -> None:
    """`parser` takes one flag for each setting of a request, and the library in which its tags are looked up."""
    fields = {name: info.description for name, info in GenerationRequest.model_fields.items()}
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="adapter file and weight (default 1); several times for several",
    )
    parser.add_argument(
        "--library",
        default="runs",
        metavar="FOLDER",
        help="where <lora:NAME:0.8> in a prompt is looked up (default: runs)",
    )
    parser.add_argument("--prompt", required=prompt_required, help=fields["prompt"])
    parser.add_argument("--negative-prompt", default="", help=fields["negative_prompt"])
    parser.add_argument("--seed", type=int, default=0, help=fields["seed"])
    parser.add_argument("--count", type=int, default=1, help=fields["count"])
    parser.add_argument("--steps", type=int, default=25, help=fields["steps"])
    parser.add_argument("--guidance-scale", type=float, default=7.5, help=fields["guidance_scale"])
    add_sampler_flags(parser)
    parser.add_argument("--emphasis", choices=get_args(Emphases), default="original", help=fields["emphasis"])
    parser.add_argument("--clip-skip", type=int, default=1, help=fields["clip_skip"])
    parser.add_argument("--wildcards", default="", metavar="FOLDER", help=fields["wildcards"])
    parser.add_argument("--width", type=int, default=0, help=fields["width"])
    parser.add_argument("--height", type=int, default=0, help=fields["height"])
    parser.add_argument(
        "--control",
        action="append",
        nargs="+",
        default=[],
        metavar=("MODEL", "IMAGE"),
        help="a ControlNet (file, folder or Hugging Face id) and its map, then perhaps strength (default 1) and steps as shares "
        "of all (default 0-1): --control canny.safetensors edges.png 0.8 0-0.6; several times for several",
    )
    add_picture_flags(parser)


def request_values(options: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the request that the flags make, a prompt only where one is given."""
    values = {name: getattr(options, name) for name in _SETTINGS if getattr(options, name) is not None}
    more = {**sampler_values(options), **picture_settings(options)}
    adapters = [parse_adapter(text) for text in options.adapter]
    control = [parse_control(words) for words in options.control]
    return {
        **values,
        **more,
        **({"adapters": adapters} if adapters else {}),
        **({"control": control} if control else {}),
    }

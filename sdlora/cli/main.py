"""The `sdlora` command: picks the subcommand and turns our errors into one line and an exit status."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence

from sdlora import __version__
from sdlora.errors import SdloraError
from sdlora.quiet import quiet_libraries

COMMANDS = {
    "train": "train an adapter on a folder of pictures",
    "generate": "make pictures, with or without adapters",
    "batch": "make the pictures of a jobs file, hundreds of them, on one GPU or several",
    "upscale": "make pictures larger by an ESRGAN file",
    "replay": "make a picture again from its recipe, and compare",
    "history": "find pictures by what made them, and rate them",
    "app": "open the web page",
    "dataset": "check pictures before a run, write captions, see to the cache",
    "adapter": "adapter files: list, inspect, convert, verify, merge, extract, resize, share, fetch",
    "base": "look at a base model",
    "doctor": "check this machine and installation",
}

_HELP = f"""usage: sdlora COMMAND [OPTIONS]

Train Stable Diffusion LoRA adapters on one GPU, and make pictures with them.

commands:
{chr(10).join(f"  {name:<10} {text}" for name, text in COMMANDS.items())}

  sdlora COMMAND --help   the command's options
  sdlora --version        {__version__}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_HELP)
        return 0
    if words[0] == "--version":
        print(f"sdlora {__version__}")
        return 0
    if words[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; commands are {', '.join(COMMANDS)}"
        print(f"sdlora: unknown command {words[0]!r}{hint}", file=sys.stderr)
        return 2
    return run_command(words[0], words[1:])


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Run the command `name`; an error that sdlora explains is printed as one line."""
    quiet_libraries()
    _print_whatever_there_is()
    try:
        module = importlib.import_module(f"sdlora.cli.{name}")
        return int(module.run(list(arguments)))
    except SdloraError as error:
        if os.environ.get("SDLORA_DEBUG"):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _print_whatever_there_is() -> None:
    """A character that the terminal's code page does not have is printed as "?", instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a program that calls us may have put something else there
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())

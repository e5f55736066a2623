"""`sdlora app`: the web page."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdlora.cli.base_flags import add_base_flags, base_section
from sdlora.errors import ConfigError
from sdlora.quiet import quiet_libraries


def run(args: list[str]) -> int:
    """The page is served until Ctrl-C. Returns the exit status; raises SdloraError."""
    options = _parser().parse_args(args)
    password = _password(options.password)
    quiet_libraries()
    from sdlora.app.main import serve

    serve(
        base_section(options),
        options.library,
        options.output,
        host=options.host,
        port=options.port,
        password=password,
        open_browser=options.open,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdlora app",
        description="A web page that makes pictures with your adapters. Nothing leaves this computer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_base_flags(parser, default="tiny")
    parser.add_argument("--library", type=Path, default=Path("runs"), metavar="DIR", help="folder of adapters")
    parser.add_argument("--output", type=Path, default=Path("outputs"), metavar="DIR", help="where pictures go")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; another needs --password")
    parser.add_argument("--port", type=int, default=7860, help="0: any free one")
    parser.add_argument("--password", metavar="USER:PASSWORD", default="", help="asked of every visitor")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser


def _password(text: str) -> tuple[str, str] | None:
    if not text:
        return None
    user, _, password = text.partition(":")
    if not user or not password:
        raise ConfigError("--password must be user:password, both not empty")
    return user, password

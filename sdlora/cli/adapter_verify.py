"""`sdlora adapter verify`: what each format keeps of an adapter, in its updates and in pictures."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.cli.adapter_output import add_json
from sdlora.cli.base_flags import add_base_flags, base_section, given_base_flags
from sdlora.errors import ConfigError
from sdlora.storage import user_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sdlora import AdapterFile, Engine
    from sdlora.adapters.convert import Kept

_ALIKE = 1.0
"""Mean difference of pixels, of 255, that rounding in a base's precision may come to over some steps."""
_STEPS, _MOST_STEPS = 8, 1000


def add_parsers(commands: Any) -> None:
    """`verify` is among the subcommands."""
    parser = commands.add_parser(
        "verify",
        help="whether a file comes through every format, or does the same as another",
        description="Write the adapter in each format, read it back by that format's rules, and compare delta-W of "
        "every layer; with --against compare with that file instead. With --base the pictures are compared too.",
    )
    parser.add_argument("path", type=Path, metavar="FILE", help="adapter file, or PEFT's folder")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="adapter that should do the same")
    add_base_flags(parser, default="")
    parser.add_argument("--prompt", help="of the pictures; default: what calls the adapter")
    parser.add_argument("--steps", type=int, help=f"denoising steps of the pictures; default: {_STEPS}")
    add_json(parser)
    parser.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from sdlora import Engine, read_adapter
    from sdlora.adapters.convert import Kept, kept_by_formats
    from sdlora.adapters.verify import difference

    if not options.base:
        _refuse_flags_of_pictures(options)
    if options.steps is not None and not 1 <= options.steps <= _MOST_STEPS:
        raise ConfigError(f"--steps is {options.steps}; expected 1 to {_MOST_STEPS}")
    adapter = read_adapter(options.path)
    pictures = _Pictures(Engine(base_section(options)), adapter, options) if options.base else None
    with tempfile.TemporaryDirectory() as folder:
        if options.against:
            other = user_path(options.against)
            kept = [Kept(str(options.against), other, difference(adapter, read_adapter(other)), "")]
        else:
            kept = kept_by_formats(adapter, Path(folder))
        found = [_line(entry, pictures) for entry in kept]
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        for line in found:
            word = "cannot hold it" if line["same"] is None else "same" if line["same"] else "DIFFERS"
            print(f"{line['compared_with']}: {word}: {line['found']}")
    return 1 if any(line["same"] is False for line in found) else 0


def _refuse_flags_of_pictures(options: argparse.Namespace) -> None:
    """Raise ConfigError for flags that speak of pictures, which are made with --base alone."""
    own = {"--prompt": options.prompt, "--steps": options.steps}
    given = [flag for flag, value in own.items() if value is not None] + given_base_flags(options)
    if given:
        raise ConfigError(f"{', '.join(given)}: pictures are compared with --base alone; add it, or leave this out")


def _line(kept: Kept, pictures: _Pictures | None) -> dict[str, Any]:
    """Return what is printed of one comparison."""
    line: dict[str, Any] = {"compared_with": kept.format, "same": None, "found": kept.reason}
    if kept.difference is None:
        return line
    line |= {"same": kept.difference.same, "found": kept.difference.sentence()}
    if pictures and kept.difference.same:
        largest, mean = pictures.differ(kept.place)
        line |= {"largest_pixel_difference": largest, "mean_pixel_difference": mean, "same": mean <= _ALIKE}
        line["found"] += f"; pixels differ by {mean:.3f} of 255 in the mean, at most {largest}"
    return line


class _Pictures:
    """One picture made with an adapter, and with what should do the same."""

    def __init__(self, engine: Engine, adapter: AdapterFile, options: argparse.Namespace) -> None:
        said = adapter.metadata.get("modelspec.trigger_phrase", "").split(",")[0].strip()
        self._engine, self._steps = engine, options.steps or _STEPS
        self._prompt = options.prompt or said or next(iter(adapter.tokens), "a photo")
        self._expected = self._picture(user_path(options.path))

    def differ(self, place: Path) -> tuple[int, float]:
        """Return the largest and the mean difference of pixels, 0 to 255."""
        apart = abs(self._picture(place) - self._expected)
        return int(apart.max()), float(apart.mean())

    def _picture(self, place: Path) -> NDArray[np.int_]:
        import numpy as np

        from sdlora import make_request

        request = make_request(prompt=self._prompt, steps=self._steps, adapters=[{"path": str(place)}])
        ((picture, _),) = self._engine.generate(request)
        return np.asarray(picture, dtype=int)

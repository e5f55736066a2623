"""Names of pictures from a template: "{date}/{seed}-{prompt}", safe on every system whatever a prompt says."""

from __future__ import annotations

import difflib
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath

from sdlora.errors import ConfigError
from sdlora.generation.recipe import Recipe
from sdlora.storage import past_devices

DEFAULT_TEMPLATE = "{seed:05}-{prompt}"
FIELDS = (
    "seed", "prompt", "steps", "sampler", "base", "adapters", "date", "time", "width", "height", "number", "guidance",
)  # fmt: skip
FIELDS_OF_THE_MOMENT = ("date", "time")
"""Fields of which nobody knows beforehand what they will be."""
_NUMBERS = {"seed", "steps", "width", "height", "number"}
_WORDS_OF_PROMPT, _LONGEST_VALUE = 60, 80
_LONGEST_NAME_BYTES = 240
"""Of a file or folder; systems allow 255, and a number may follow."""
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f\x7f]')
_SPEC = re.compile(r"(?:0?[1-9][0-9]?)?")


@dataclass(frozen=True)
class NameFields:
    """What the names of pictures are made of."""

    seed: int
    prompt: str
    steps: int
    sampler: str
    base: str
    adapters: Sequence[str]
    width: int
    height: int
    guidance_scale: float
    number: int
    when: datetime | None = None
    """None where the template has no field of the moment."""


def picture_path(
    recipe: Recipe,
    template: str = DEFAULT_TEMPLATE,
    *,
    number: int = 1,
    when: datetime | None = None,
    suffix: str = ".png",
) -> PurePosixPath:
    """Return the way to a picture's file below the folder of pictures, made of its recipe.

    Fields are {seed}, {prompt} (its first words), {steps}, {sampler}, {base}, {adapters}, {date}, {time}, {width}, {height},
    {guidance} and {number}, of the picture within its series; {seed:05} fills up with zeros. "/" leads into a folder. No
    value leads anywhere, and no part is a name that some system refuses. Raises ConfigError as `check_template` does.
    """
    fields = NameFields(
        seed=recipe.seed,
        prompt=recipe.prompt,
        steps=recipe.steps,
        sampler=recipe.sampler or recipe.scheduler,
        base=recipe.base,
        adapters=[item.name for item in recipe.adapters],
        width=recipe.width,
        height=recipe.height,
        guidance_scale=recipe.guidance_scale,
        number=number,
        when=when or datetime.now(),
    )
    return filled_path(fields, template, suffix=suffix)


def filled_path(fields: NameFields, template: str, *, suffix: str = ".png") -> PurePosixPath:
    """Return the way that a template makes of what is known of a picture, as `picture_path` says."""
    values = _values(fields)
    filled = "".join(text + _filled(field, spec, values) for text, field, spec in _parts(template))
    *folders, name = (_allowed(part) for part in filled.split("/"))
    return PurePosixPath(*folders, f"{name}{suffix}")


def template_fields(template: str) -> frozenset[str]:
    """Return the fields that a template has. Raises ConfigError as `check_template` does."""
    return frozenset(field for _, field, _ in _parts(template) if field)


def check_template(template: str) -> None:
    """Raise ConfigError for a template with unknown fields, without a name, or that leads out of the folder."""
    template_fields(template)


def _parts(template: str) -> Iterator[tuple[str, str, str]]:
    """Yield (text, the field behind it, how that is filled up)."""
    where = f"the name template {template[:100]!r}"
    try:
        parsed = list(string.Formatter().parse(template.replace("\\", "/")))
    except ValueError as error:
        raise ConfigError(f"{where} has a brace that belongs to no field; write {{{{ for a brace itself") from error
    literal = "".join(text + ("x" if field is not None else "") for text, field, _, _ in parsed)
    steps = literal.split("/")
    if not steps[-1].strip(" .") or literal.startswith("/") or any(step.strip() in ("", ".", "..") for step in steps):
        raise ConfigError(f"{where} names no file below the folder of pictures; expected for example {{date}}/{{seed}}")
    for text, field, spec, conversion in parsed:
        if field is not None and field not in FIELDS:
            near = difflib.get_close_matches(field.lower(), FIELDS, n=1)
            hint = f"did you mean {{{near[0]}}}?" if near else f"fields are {', '.join(FIELDS)}"
            raise ConfigError(f"{where} has the unknown field {{{field[:40]}}}; {hint}")
        if conversion or (spec and (field not in _NUMBERS or not _SPEC.fullmatch(spec))):
            raise ConfigError(
                f"{where} fills {{{field}}} in an unknown way; only numbers are filled up, as {{seed:05}}"
            )
        yield text, field or "", spec or ""


def _values(known: NameFields) -> dict[str, int | str]:
    prompt = re.sub(r"[^\w]+", "-", known.prompt.lower()).strip("-")[:_WORDS_OF_PROMPT].rstrip("-")
    return {
        "seed": known.seed,
        "prompt": prompt or "picture",
        "steps": known.steps,
        "sampler": _plain(known.sampler),
        "base": _plain(known.base),
        "adapters": _plain("+".join(known.adapters)) or "no-adapter",
        "date": f"{known.when:%Y-%m-%d}" if known.when else "",
        "time": f"{known.when:%H%M%S}" if known.when else "",
        "width": known.width,
        "height": known.height,
        "number": known.number,
        "guidance": f"{known.guidance_scale:g}",
    }


def _filled(field: str, spec: str, values: dict[str, int | str]) -> str:
    return format(values[field], spec) if field else ""


def _plain(text: str) -> str:
    """Return a name without anything that separates folders or that a shell would mind."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-.")[:_LONGEST_VALUE]


def _allowed(part: str) -> str:
    """Return a file's or folder's name that every system takes."""
    name = unicodedata.normalize("NFC", _FORBIDDEN.sub("-", part)).encode("utf-8", "replace").decode()
    name = name.encode()[:_LONGEST_NAME_BYTES].decode("utf-8", "ignore").strip(" .")
    return past_devices(name or "picture")

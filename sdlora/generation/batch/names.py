"""The names of a batch's files, all decided before the first picture is made."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdlora.errors import ConfigError
from sdlora.families.registry import BaseDescription
from sdlora.generation.asked import Asked
from sdlora.generation.batch.faults import Faults
from sdlora.generation.batch.job_fields import is_template, name_parts, refuse_sheets
from sdlora.generation.batch.jobs import Job
from sdlora.generation.pictures.files import FORMATS, SUFFIXES
from sdlora.generation.pictures.names import NameFields, filled_path
from sdlora.storage import past_devices

_ID_DIGITS = 8


@dataclass(frozen=True)
class _Wanted:
    file: str
    where: str
    number: int
    """Of its picture."""
    by_template: bool


class FileNames:
    """Gives the pictures of a batch their files, those with one identity the first one's."""

    def __init__(self, base: BaseDescription, suffix: str) -> None:
        self._base_name = Path(base.section.path).name.removesuffix(".safetensors")
        self._base = base
        self._suffix = suffix
        self._wanted: dict[str, _Wanted] = {}

    def add(self, job: Job, asked: Asked, identity: str, number: int, size: tuple[int, int]) -> None:
        """The picture has a file: as its job says, else made up of number, prompt and identity.

        Raises ConfigError for the name of a file of another format, and for one in the folder of sheets.
        """
        name, own = name_parts(job.name)
        if own and SUFFIXES[own] != SUFFIXES[self._suffix]:
            raise ConfigError(
                f"name is {job.name[:80]!r}, but the pictures of this batch are {self._suffix} files; give --format "
                f"{FORMATS[SUFFIXES[own]]}, or leave the suffix out"
            )
        if identity in self._wanted:
            return
        by_template = is_template(name)
        if by_template:
            file = str(filled_path(self._fields(asked, number, size), name, suffix=self._suffix))
            refuse_sheets(file)
        elif name:
            *folders, stem = name.split("/")
            seed = f"-{asked.seed}" if job.request.count > 1 else ""
            file = "/".join([*map(past_devices, folders), f"{past_devices(stem + seed)}{self._suffix}"])
        else:
            file = f"{number:05d}-{_first_words(asked)}-{identity[:_ID_DIGITS]}{self._suffix}"
        self._wanted[identity] = _Wanted(file, job.where, number, by_template)

    def _fields(self, asked: Asked, number: int, size: tuple[int, int]) -> NameFields:
        """Return what the picture's recipe will say."""
        request = asked.request
        return NameFields(
            seed=asked.seed,
            prompt=asked.texts.prompt,
            steps=request.steps,
            sampler=request.sampler or self._base.sampler,
            base=self._base_name,
            adapters=[Path(choice.path).stem for choice in asked.adapters],
            width=size[0],
            height=size[1],
            guidance_scale=request.guidance_scale,
            number=number,
        )

    def settled(self, faults: Faults) -> dict[str, str]:
        """Return {identity: file}. Where another picture has the name that a template makes, the picture's number follows it.

        Names that two jobs say are told to `faults`. Case does not make a difference on every system.
        """
        files: dict[str, str] = {}
        taken: dict[str, _Wanted] = {}
        for identity, wanted in sorted(self._wanted.items(), key=lambda item: item[1].by_template):
            file = next(name for name in _names(wanted) if not wanted.by_template or name.casefold() not in taken)
            first = taken.setdefault(file.casefold(), wanted)
            if first is not wanted:
                other = "itself" if first.where == wanted.where else first.where
                faults.tell(
                    wanted.where,
                    f"the name {file} is that of another picture, of {other}; give each its own, or a field such as {{seed}}",
                )
            files[identity] = file
        return files


def _names(wanted: _Wanted) -> itertools.chain[str]:
    """Return what the file may be called: as wanted, with its picture's number, and with further ones."""
    path = PurePosixPath(wanted.file)
    numbered = (f"-{wanted.number}{more}" for more in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
    return itertools.chain([wanted.file], (str(path.with_stem(path.stem + number)) for number in numbered))


def _first_words(asked: Asked) -> str:
    words = re.sub(r"[^\w]+", "-", asked.texts.prompt.lower()).strip("-").encode()[:60].decode(errors="ignore")
    return words.strip("-") or "picture"


def identity_mark(file: str, identity: str = "") -> str:
    """Return what a made-up name tells of its picture's identity, "" of any other name, and of one of another identity."""
    match = re.search(rf"-([0-9a-f]{{{_ID_DIGITS}}})\.(?:png|jpe?g|webp)$", file)
    return match[1] if match and (not identity or identity.startswith(match[1])) else ""

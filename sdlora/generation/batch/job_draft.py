"""What a jobs file says of one job, before it is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdlora.errors import ConfigError
from sdlora.generation.batch.grid import Point
from sdlora.generation.batch.job_fields import kept, over


@dataclass(frozen=True)
class Draft:
    """A job as it was written."""

    where: str
    """Which line it is: "jobs.txt:12"."""
    values: Mapping[str, Any]
    """By setting, as in `job_fields.FIELDS`."""
    point: Point = ()
    """Where in the file's grid it is."""
    defaults: frozenset[str] = frozenset()
    """The settings that it does not say itself."""
    here: frozenset[str] = frozenset()
    """The settings that the command line says."""

    def on(self, defaults: Mapping[str, Any], *, here: bool = False) -> Draft:
        """Return the job with defaults for what it does not say, which are the command line's if they are from `here`."""
        left = kept(defaults, self.values)
        said_here = self.here | left if here else self.here
        return replace(self, values=over(defaults, self.values), defaults=self.defaults | left, here=said_here)


def file_text(path: Path) -> str:
    """Return the text of a jobs file. Raises ConfigError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such jobs file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read as text in UTF-8; save it so") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a jobs file ({error})") from error

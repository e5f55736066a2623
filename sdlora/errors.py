"""The exceptions that a user's mistake, a bad file or a failed run ends in.

Each message is one sentence for a person: what, where, what was expected, how to fix it. The command
line prints it without a traceback and exits with the class's status.
"""

from __future__ import annotations

import struct
import zlib


def first_line(error: BaseException, limit: int = 150) -> str:
    """Return the first line of somebody else's error, at most `limit` characters; its kind where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


class SdloraError(Exception):
    """Any failure that sdlora explains itself."""

    exit_status = 1


class ConfigError(SdloraError):
    """A setting, flag or value is wrong; nothing has been started."""

    exit_status = 2


class DataError(SdloraError):
    """Pictures or captions cannot be used as they are."""


class FormatError(SdloraError):
    """A file is not what its name or place promises: truncated, foreign, hostile."""


class ModelError(SdloraError):
    """Base weights are missing, incomplete, or do not fit the adapter."""


class OutputError(SdloraError):
    """A result cannot be written where it was asked for."""


class NetworkError(SdloraError):
    """A server cannot be reached, or does not do what it was asked for."""


class TrainingError(SdloraError):
    """A run cannot go on; what was saved before it is untouched."""


class GenerationError(SdloraError):
    """A picture could not be made."""


class GenerationCancelled(GenerationError):
    """Raised inside a generation to end it at the next step."""


PICTURE_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise on damaged files, as fuzzing shows."""

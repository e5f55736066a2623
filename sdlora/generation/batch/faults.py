"""Everything that is wrong with a set of jobs, told at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sdlora.errors import ConfigError, SdloraError

_SHOWN = 100


class Faults:
    """Collects faults, each with the line it is of; the same fault of a line is told once."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def tell(self, where: str, fault: str) -> None:
        """That is wrong there."""
        line = where.rpartition(":")[2]
        order = int(line) if line.isdecimal() else 0
        self._told[fault if fault.startswith(f"{where}:") else f"{where}: {fault}"] = order

    @contextmanager
    def of(self, where: str) -> Iterator[None]:
        """Inside, an error that sdlora explains is a fault of `where`, and ends the block alone."""
        try:
            yield
        except SdloraError as error:
            self.tell(where, str(error))

    def raise_all(self, what: str) -> None:
        """Raise one ConfigError with all that was told, by lines, if anything was."""
        told = sorted(self._told, key=self._told.__getitem__)
        if len(told) > 1:
            more = f"\n  and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
            lines = "\n".join(f"  {fault}" for fault in told[:_SHOWN])
            raise ConfigError(f"{len(told)} things are wrong with {what}:\n{lines}{more}")
        if told:
            raise ConfigError(told[0])

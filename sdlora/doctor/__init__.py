"""What this machine and installation can do: every finding with its meaning and, where there is one, its fix."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout

from sdlora.doctor.check import Check, State, failed
from sdlora.doctor.device import describe_device, examine_bf16, examine_precision, find_device
from sdlora.doctor.installed import BROKEN, MISSING, examine_installation
from sdlora.doctor.self_test import run_self_test
from sdlora.doctor.surroundings import examine_network, examine_space
from sdlora.doctor.trials import try_bitsandbytes
from sdlora.errors import ConfigError

__all__ = ["Check", "State", "examine", "examine_each"]


def examine(self_test: bool = True, device: str | None = None) -> list[Check]:
    """Return all findings, of `device` (default: what sdlora uses by itself).

    Nothing is printed, and nothing is asked of the network. Raises ConfigError for a device of no known kind.
    """
    return list(examine_each(self_test, device))


def examine_each(self_test: bool = True, device: str | None = None) -> Iterator[Check]:
    """Yield the findings of `examine`, each as soon as it is known."""
    if device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise ConfigError(f"--device is {device!r}; expected cpu, cuda, cuda:1 or mps")
    installed = examine_installation()
    yield from installed
    if any(check.value in (MISSING, BROKEN) for check in installed):
        fix = "mend the problems above, then run sdlora doctor again"
        yield Check("other checks", "note", "not made", "They need the libraries that are not there.", fix)
        return
    with _undisturbed():
        place = find_device(device)
    if isinstance(place, Check):
        yield place
    else:
        yield from _guarded("device", lambda: describe_device(place, asked_for=device is not None))
        yield from _guarded("bf16", lambda: [examine_bf16(place)])
        yield from _guarded("precision", lambda: [examine_precision(place)])
        yield from _guarded("bitsandbytes trials", lambda: try_bitsandbytes(place))
    yield from _guarded("space", examine_space)
    yield examine_network()
    if self_test and not isinstance(place, Check):
        yield from _guarded("self-test", lambda: [run_self_test(place)])


def _guarded(name: str, probe: Callable[[], Iterable[Check]]) -> list[Check]:
    """Return what `probe` finds; where it fails, the failure is the finding."""
    try:
        with _undisturbed():
            return list(probe())
    except Exception as error:  # of whatever kind: a run would meet it too, and a report must not end half-way
        return [failed(name, error)]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, nothing is written to standard output and the hub's libraries ask nothing of the network.

    bitsandbytes would, on some processors and with the package "kernels", fetch a kernel when it is imported.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        constants.HF_HUB_OFFLINE = before

"""Processes that go on from this one, with all libraries there: importing them takes longer than most tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")


def forked(work: Callable[[], int | None], stdout: int, stderr: int | None = None) -> BaseProcess:
    """Return the process that runs `work` and exits with the status it returns, 0 for None.

    It writes to these files, given by their descriptors, to `stdout` alone without the other.
    """

    def run() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(stdout, 1)
        os.dup2(stdout if stderr is None else stderr, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        try:
            status = work()
        finally:
            sys.stdout.flush()
        sys.exit(status)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def at_once(works: Sequence[Callable[[], int | None]], folder: Path) -> list[str]:
    """Return what each of `works` wrote, run in processes of their own at the same time; all of them succeeded.

    Their output is kept in `folder`.
    """
    outputs = [folder / f"output-{number}.txt" for number in range(len(works))]
    running = []
    for work, output in zip(works, outputs, strict=True):
        with output.open("w") as written:
            running.append(forked(work, written.fileno()))
    for process in running:
        process.join(timeout=120)
    statuses = [process.exitcode for process in running]
    for process in running:
        process.kill()
    told = [output.read_text(encoding="utf-8") for output in outputs]
    for status, output in zip(statuses, told, strict=True):
        assert status == 0, output[-3000:]
    return told

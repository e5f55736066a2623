"""What a person sees of a run: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ProgressView:
    """Says what goes on, and shows the steps of a run with loss, images a second and time left."""

    def __init__(self, *, visible: bool) -> None:
        """Not `visible`: nothing is shown, as wanted of all processes but the main one."""
        self._console = Console(highlight=False, quiet=not visible)
        self._visible = visible
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._steps = 0

    def say(self, text: str) -> None:
        """A line of text, above the bar where there is one."""
        self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def counting(self, steps: int, done: int) -> Iterator[None]:
        """Inside, `step` may be called; a bar is on the screen where that is a terminal."""
        self._steps = steps
        if not (self._visible and sys.stdout.isatty()):
            yield
            return
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.2f} images/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as self._bar:
            self._task = self._bar.add_task("training", total=steps, completed=done, loss=0.0, rate=0.0)
            yield
        self._bar = None

    def step(self, step: int, loss: float, images_per_second: float, eta_seconds: float) -> None:
        """Optimizer step `step` is done."""
        if self._bar:
            self._bar.update(self._task, completed=step, loss=loss, rate=images_per_second)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._steps:
            self._last_line = time.monotonic()
            self.say(
                f"step {step} of {self._steps}  loss {loss:.4f}  {images_per_second:.2f} images/s  "
                f"{eta_seconds:.0f} s left"
            )

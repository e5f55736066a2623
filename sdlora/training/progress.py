"""What a person sees of a run: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ProgressView:
    """Shows the steps of a run with loss, images a second and time left. A context manager."""

    def __init__(self, steps: int, done: int, *, visible: bool) -> None:
        self._console = Console(stderr=False, highlight=False, quiet=not visible)
        self._steps = steps
        self._last_line = 0.0
        self._bar: Progress | None = None
        if visible and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.2f} images/s"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=steps, completed=done, loss=0.0, rate=0.0)

    def __enter__(self) -> ProgressView:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line of text above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

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

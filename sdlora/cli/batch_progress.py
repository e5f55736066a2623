"""What a person sees of a batch: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sdlora.generation.batch.making import BatchProgress

_SECONDS_BETWEEN_LINES = 10.0


class BatchView:
    """Shows pictures done, pictures a second, and the time left. Of several processes the main one shows its share."""

    def __init__(self, pictures: int, *, visible: bool, processes: int = 1) -> None:
        self._visible = visible
        self._share = f" (this process, one of {processes})" if processes > 1 else ""
        self._last_line = 0.0
        self._bar: Progress | None = None
        if visible and sys.stdout.isatty():
            told = TextColumn("{task.fields[told]}")
            self._bar = Progress(TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), told)
            self._task = self._bar.add_task("pictures", total=pictures, told="")

    def __enter__(self) -> BatchView:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, progress: BatchProgress) -> None:
        """A batch is done."""
        finished = progress.done + progress.failed
        told = f"{finished / progress.seconds:.2f} pictures/s, {duration(progress.seconds_left)} left"
        if progress.failed:
            told += f", {progress.failed} failed"
        if self._bar:
            self._bar.update(self._task, completed=finished, told=told)
        elif self._visible and (
            time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES or finished == progress.pictures
        ):
            self._last_line = time.monotonic()
            print(f"{finished} of {progress.pictures}  {told}{self._share}", flush=True)


def duration(seconds: float) -> str:
    """Return a time as people say it: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"

"""What a person sees of pictures being made: a bar with the time left on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdlora.generation.denoising.progress import OnStep, StepProgress


@contextmanager
def step_bar() -> Iterator[OnStep | None]:
    """Give what shows each step on the terminal, None where the output is no terminal; what is printed stands above it."""
    if not sys.stdout.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=1.0, left="")

        def show(at: StepProgress) -> None:
            text = f"picture {at.pictures_done + 1} of {at.pictures}, step {at.step} of {at.steps}"
            share = (at.pictures_done + at.step / at.steps) / at.pictures
            left = f"{timedelta(seconds=round(at.seconds_left))} left"
            bar.update(task, description=text, completed=share, left=left)

        yield show

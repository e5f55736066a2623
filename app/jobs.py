"""Runs requests on the one engine: a job at a time, with progress, and ended within a step."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sdlora
from sdlora.errors import GenerationCancelled, GenerationError, SdloraError

if TYPE_CHECKING:
    from PIL.Image import Image

_REPORT_SECONDS = 0.1  # the page need not redraw more often


@dataclass(frozen=True)
class Waiting:
    """The job has not begun: `reason` is "loading" (the base) or "busy" (an earlier job)."""

    reason: str


@dataclass(frozen=True)
class Progress:
    """Denoising step `step` of `steps` of picture `picture` of `pictures` is done, all counted from 1."""

    picture: int
    pictures: int
    step: int
    steps: int
    seconds_left: float | None


@dataclass(frozen=True)
class Picture:
    """Request number `index` has come out as this picture."""

    index: int
    image: Image
    recipe: sdlora.Recipe


Report = Waiting | Progress | Picture


class _Job:
    def __init__(self, requests: Sequence[sdlora.GenerationRequest], owner: str) -> None:
        self.requests = requests
        self.owner = owner
        self.cancelled = threading.Event()
        self.reports: queue.SimpleQueue[Report | Exception | None] = queue.SimpleQueue()
        self._started = self._first_step = self._reported = 0.0
        self._steps_done, self._at = 0, (-1, 0)

    def check(self) -> None:
        if self.cancelled.is_set():
            raise GenerationCancelled("cancelled")

    def on_step(self, index: int, step: int, steps: int) -> None:
        """Report the step, and end the engine's work when the job was cancelled."""
        self.check()
        now = time.monotonic()
        step = min(step, steps)  # some schedulers take one step more than was asked for
        self._steps_done += max(step - self._at[1], 0) if index == self._at[0] else step
        self._at = index, step
        self._first_step = self._first_step or now
        if now - self._reported < _REPORT_SECONDS and step < steps:
            return
        self._reported = now
        remaining = sum(request.steps for request in self.requests[index + 1 :]) + steps - step
        # The first step also holds the warm-up, so the pace is that of the steps after it.
        pace = (now - self._first_step) / (self._steps_done - 1) if self._steps_done > 1 else None
        left = None if pace is None else pace * remaining
        self.reports.put(Progress(index + 1, len(self.requests), step, steps, left))


class EngineJobs:
    """One base, loaded once, and the jobs that use it, one after the other."""

    def __init__(self, base: str | sdlora.BaseSection, make_engine: Callable[[Any], Any] | None = None) -> None:
        self._base = sdlora.BaseSection(path=base) if isinstance(base, str) else base
        self._make_engine = make_engine
        self._engine: Any = None
        self._turn = threading.Lock()
        self._jobs: set[_Job] = set()
        self._announced: dict[str, bool] = {}
        self._jobs_lock = threading.Lock()
        self._tried = threading.Event()
        self.problem = ""
        """Why the base could not be loaded; empty while that is open or once it is loaded."""

    def start_loading(self) -> None:
        """The base begins to load in the background; a failure is kept in `problem`."""
        threading.Thread(target=self._load_in_background, daemon=True, name="load-base").start()

    def wait_for_base(self, seconds: float) -> bool:
        """Return whether loading has ended, well or not, waiting at most `seconds` for it."""
        return self._tried.wait(seconds)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the base's loader wants the user to know, such as a prediction type that was measured."""
        return tuple(self._engine.base.notes) if self._engine else ()

    @property
    def name(self) -> str:
        """What the base is called on the page: its path's last part."""
        return Path(self._base.path).name or self._base.path

    @property
    def busy(self) -> bool:
        """Whether the base is loading or some page's job is running."""
        return self._turn.locked()

    @property
    def resolution(self) -> int:
        """The base's own picture side in pixels, 0 as long as it is not loaded."""
        return int(self._engine.base.resolution) if self._engine else 0

    def announce(self, owner: str) -> None:
        """A job of `owner` is on its way to `run`, and `cancel` reaches it from now on."""
        with self._jobs_lock:
            self._announced[owner] = False  # not cancelled

    def run(self, requests: Sequence[sdlora.GenerationRequest], owner: str) -> Iterator[Report]:
        """Yield what happens until the last picture is there.

        Abandoning the iterator cancels the job. Raises GenerationCancelled after `cancel(owner)`, and
        SdloraError for everything that goes wrong.
        """
        job = _Job(requests, owner)
        with self._jobs_lock:
            if self._announced.pop(owner, False):
                raise GenerationCancelled("cancelled")
            self._jobs.add(job)
        waiting = "loading" if self._engine is None else "busy" if self.busy else ""
        threading.Thread(target=self._work, args=(job,), daemon=True, name="generate").start()
        try:
            if waiting:
                yield Waiting(waiting)
            while True:
                job.check()  # at once, though the engine may need to the end of its step, or of loading
                with suppress(queue.Empty):
                    report = job.reports.get(timeout=_REPORT_SECONDS)
                    if report is None:
                        return
                    if isinstance(report, Exception):
                        raise report
                    yield report
        finally:
            job.cancelled.set()
            with self._jobs_lock:
                self._jobs.discard(job)

    def cancel(self, owner: str) -> bool:
        """Every job of `owner`, announced or running, ends at its next step. Returns whether there was one."""
        with self._jobs_lock:
            jobs = [job for job in self._jobs if job.owner == owner]
            announced = owner in self._announced
            if announced:
                self._announced[owner] = True
        for job in jobs:
            job.cancelled.set()
        return announced or bool(jobs)

    def close(self) -> None:
        """Every job ends at its next step."""
        with self._jobs_lock:
            for job in self._jobs:
                job.cancelled.set()

    def _work(self, job: _Job) -> None:
        try:
            with self._turn:
                job.check()
                engine = self._load()
                for index, request in enumerate(job.requests):
                    job.check()
                    reporter = _step_reporter(job, index)
                    for image, recipe in engine.generate(request, on_step=reporter, should_stop=job.cancelled.is_set):
                        job.reports.put(Picture(index, image, recipe))
            job.reports.put(None)
        except Exception as error:  # the thread ends here, and the waiting page must hear of anything
            job.reports.put(_explained(error))

    def _load(self) -> Any:
        """Return the engine, loaded at the first call and again after a failure. Needs the turn."""
        if self._engine is None:
            try:
                # Naming sdlora.Engine imports torch: here, not before the page is served.
                self._engine = (self._make_engine or sdlora.Engine)(self._base)
                self.problem = ""
            except Exception as error:
                explained = _explained(error)
                self.problem = str(explained)
                raise explained from error
            finally:
                self._tried.set()
        return self._engine

    def _load_in_background(self) -> None:
        with self._turn, suppress(SdloraError):  # kept in `problem`, and raised anew for the first job
            self._load()


def _step_reporter(job: _Job, index: int) -> Callable[[Any], None]:
    return lambda progress: job.on_step(index, progress.step, progress.steps)


def _explained(error: Exception) -> SdloraError:
    """Return the failure as one sentence. The traceback of one that no user can mend goes to the terminal."""
    if isinstance(error, SdloraError):
        return type(error)(str(error))
    traceback.print_exception(error)
    detail = (str(error).strip().splitlines() or ["no details"])[0][:200]
    return GenerationError(f"something failed inside ({type(error).__name__}: {detail}); the terminal shows where")

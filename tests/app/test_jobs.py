import threading
import time
from types import SimpleNamespace

import pytest

import sdlora
from sdlora.app.jobs import EngineJobs, Picture, Progress, Waiting, _Job
from sdlora.errors import GenerationCancelled, GenerationError, ModelError

DEADLINE = 10.0


class FakeEngine:
    """Takes steps when it is let; its picture is the prompt, its recipe the seed."""

    base = SimpleNamespace(resolution=64, notes=("it predicts v",))

    def __init__(self, _base):
        self.may_step = threading.Event()
        self.may_step.set()
        self.running = self.most_running = self.steps_taken = 0

    def generate(self, request, *, on_step, should_stop):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if request.prompt == "fail":
                raise ValueError("no such thing\nsecond line")
            for step in range(1, request.steps + 2):  # one more than asked, as PNDM does
                assert self.may_step.wait(DEADLINE)
                self.steps_taken += 1
                time.sleep(0.001)
                on_step(SimpleNamespace(step=step, steps=request.steps))
            yield request.prompt, request.seed
        finally:
            self.running -= 1


@pytest.fixture
def jobs():
    jobs = EngineJobs("tiny", FakeEngine)
    jobs.start_loading()
    assert jobs.wait_for_base(DEADLINE)
    return jobs


def wait_until(condition):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def ask(prompt="a cat", **values):
    return sdlora.make_request(prompt=prompt, **{"steps": 3} | values)


def test_notes_of_the_base_are_there_once_it_is_loaded(jobs):
    assert EngineJobs("tiny", FakeEngine).notes == ()
    assert jobs.notes == ("it predicts v",)


def test_a_base_may_be_described_by_a_section():
    seen = []
    section = sdlora.BaseSection(path="models/dreamy", quantize="nf4")
    jobs = EngineJobs(section, lambda base: seen.append(base) or FakeEngine(base))
    jobs.start_loading()
    assert jobs.wait_for_base(DEADLINE)
    assert seen == [section]
    assert jobs.name == "dreamy"


def test_pictures_come_in_order_with_progress(jobs):
    reports = list(jobs.run([ask("one", seed=1), ask("two", seed=2)], "me"))
    pictures = [report for report in reports if isinstance(report, Picture)]
    steps = [report for report in reports if isinstance(report, Progress)]
    assert pictures == [Picture(0, "one", 1), Picture(1, "two", 2)]
    assert {(p.picture, p.pictures, p.step, p.steps) for p in steps} >= {(1, 2, 3, 3), (2, 2, 3, 3)}
    assert all(p.step <= p.steps for p in steps)
    assert steps[-1].seconds_left == 0


def test_a_step_that_is_told_more_than_once_counts_once_for_the_time_left(monkeypatch):
    """Where a sampler fits its steps to the picture, many evaluations may belong to a step."""
    clock = iter(range(1, 10))
    monkeypatch.setattr("sdlora.app.jobs.time", SimpleNamespace(monotonic=lambda: next(clock)))
    job = _Job([ask(steps=4), ask(steps=4)], "me")
    for index, step in ((0, 1), (0, 1), (0, 2), (0, 4), (1, 1), (1, 3)):
        job.on_step(index, step, 4)
    told = [job.reports.get().seconds_left for _ in range(6)]
    # At 3 there were 2 steps in 2 seconds, the first not counted; 2 and 4 are left, then 4, then 3, then 1.
    assert told == [None, None, 2 * 6, 3 / 3 * 4, 4 / 4 * 3, 5 / 6 * 1]


def test_cancel_ends_the_job_and_leaves_the_engine_usable(jobs):
    engine = jobs._engine
    engine.may_step.clear()
    outcome = []

    def consume():
        try:
            list(jobs.run([ask(steps=1000)], "me"))
        except GenerationCancelled as error:
            outcome.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    wait_until(lambda: jobs.busy and engine.running)
    assert jobs.cancel("another") is False
    assert jobs.cancel("me") is True
    consumer.join(DEADLINE)
    assert outcome  # although the engine has not finished its step yet
    engine.may_step.set()
    wait_until(lambda: not jobs.busy)
    assert engine.steps_taken <= 1
    assert isinstance(list(jobs.run([ask()], "me"))[-1], Picture)


def test_a_job_can_be_cancelled_before_it_arrives_and_the_next_one_runs(jobs):
    jobs.announce("me")
    assert jobs.cancel("me") is True
    with pytest.raises(GenerationCancelled):
        next(jobs.run([ask()], "me"))
    assert jobs._engine.steps_taken == 0
    assert jobs.cancel("me") is False
    jobs.announce("me")
    assert isinstance(list(jobs.run([ask()], "me"))[-1], Picture)


def test_a_waiting_job_can_be_cancelled(jobs):
    engine = jobs._engine
    engine.may_step.clear()
    first = threading.Thread(target=list, args=(jobs.run([ask()], "another"),))
    first.start()
    wait_until(lambda: engine.running)
    waiting = jobs.run([ask()], "me")
    assert next(waiting) == Waiting("busy")
    assert jobs.cancel("me") is True
    with pytest.raises(GenerationCancelled):
        next(waiting)
    engine.may_step.set()
    first.join(DEADLINE)
    wait_until(lambda: not jobs.busy)
    assert engine.steps_taken == 4  # the other job's alone


def test_abandoned_job_is_cancelled(jobs):
    running = jobs.run([ask(steps=1000)], "me")
    assert isinstance(next(running), Progress)
    running.close()
    wait_until(lambda: not jobs.busy)
    assert jobs._engine.steps_taken < 1000


def test_jobs_take_turns(jobs):
    engine = jobs._engine
    engine.may_step.clear()
    threads = [threading.Thread(target=list, args=(jobs.run([ask()], str(i)),)) for i in range(2)]
    threads[0].start()
    wait_until(lambda: engine.running)
    threads[1].start()
    third = jobs.run([ask()], "third")
    assert next(third) == Waiting("busy")
    engine.may_step.set()
    assert isinstance(list(third)[-1], Picture)
    for thread in threads:
        thread.join(DEADLINE)
    assert engine.most_running == 1


def test_failure_inside_is_one_sentence_and_a_traceback_in_the_terminal(jobs, capfd):
    with pytest.raises(GenerationError, match=r"\(ValueError: no such thing\); the terminal shows where"):
        list(jobs.run([ask("fail")], "me"))
    assert "Traceback" in capfd.readouterr().err
    assert isinstance(list(jobs.run([ask()], "me"))[-1], Picture)


def test_base_that_cannot_be_loaded_is_tried_again():
    engines = [ModelError("x: there is no such file"), ModelError("x: there is no such file"), FakeEngine("x")]

    def make(_base):
        made = engines.pop(0)
        if isinstance(made, Exception):
            raise made
        return made

    jobs = EngineJobs("x", make)
    jobs.start_loading()
    assert jobs.wait_for_base(DEADLINE)
    assert (jobs.problem, jobs.resolution) == ("x: there is no such file", 0)
    with pytest.raises(ModelError, match="no such file"):
        list(jobs.run([ask()], "me"))
    reports = list(jobs.run([ask()], "me"))
    assert (reports[0], type(reports[-1])) == (Waiting("loading"), Picture)
    assert (jobs.problem, jobs.resolution) == ("", 64)

"""One run of the ablation in a process of its own, so that its memory and start-up are its own.

Started by ablation.py with a JSON file that holds a `Job`; prints what was measured as its last line.
"""

from __future__ import annotations

import os

# Before any library is imported: it is read once. Runs side by side, of one thread each, take their time alone.
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
from ablation_rows import config_of

if TYPE_CHECKING:
    from sdlora import RunResult, TrainConfig


@dataclass(frozen=True)
class Job:
    """One run: all its settings by dotted name, and what is measured."""

    row: str
    settings: dict[str, Any]
    seed: int
    prompts: int
    """Prompts of each kind that are judged; 0: none."""
    validate_every: int = 0
    """Steps between measurements of the held-out loss; 0: only before and after."""
    trains: bool = True
    """False: the base alone is judged."""


def measure(job: Job, started: float) -> dict[str, Any]:
    """Return what one job measured; `started` is when its process was. Raises SdloraError."""
    from sdlora import train

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        more = {
            "data.cache.folder": str(Path(scratch) / "cache"),  # empty, so that start-up is the same for all
            "training.seed": job.seed,
            "validation.every_steps": job.validate_every,
            "output.folder": str(folder),
        }
        config = config_of({**job.settings, **more})
        if not job.trains:
            return _judge(config, None, job.prompts)
        result = train(config)
        if result.interrupted:
            raise KeyboardInterrupt
        # Before judging takes memory and time; process_time does not see what else the machine does.
        found = {"peak_gb": machine.peak_memory_gb(), "cpu_seconds": time.process_time(), **_of_run(result, started)}
        return found | (_judge(config, result.adapter, job.prompts) if job.prompts else {})


def _of_run(result: RunResult, started: float) -> dict[str, Any]:
    lines = (result.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    begun = next(event for event in events if event["event"] == "start")
    curve = training_clock(events)
    return {
        "steps": result.steps,
        "parameters": begun["trainable_parameters"],
        "adapter_bytes": adapter_bytes(result.adapter),
        "startup_seconds": begun["time"] - started,
        "seconds": training_seconds(events),
        "loss_before": result.loss_before,
        "loss_after": result.loss_after,
        "curve": curve,
    }


def adapter_bytes(adapter: Path) -> int:
    """Return the size of the adapter's file and of the new words' files beside it."""
    files = [adapter, *adapter.parent.glob("embeddings/*.safetensors")]
    return sum(file.stat().st_size for file in files)


def training_seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds that optimizer steps took: of each step, since the event before it was written.

    So the time of validation, samples and saving, which end with events of their own, is left out.
    """
    pairs = itertools.pairwise(events)
    return round(sum(after["time"] - before["time"] for before, after in pairs if _is_step(after)), 3)


def training_clock(events: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Return [step, seconds of training until then, held-out loss] for each validation."""
    return [
        [event["step"], training_seconds(events[: number + 1]), event["loss"]]
        for number, event in enumerate(events)
        if event["event"] == "validation"
    ]


def _is_step(event: Mapping[str, Any]) -> bool:
    return event["event"] in {"step", "skipped"}


def _judge(config: TrainConfig, adapter: Path | None, prompts: int) -> dict[str, Any]:
    """Return the shares of two pictures a prompt with the trigger and of one a prompt without it."""
    from exam import Exam

    from sdlora import Engine
    from sdlora.families.quantize import weight_bytes

    engine = Engine(config.base)
    weight = None if adapter is None else 1.0
    return {
        "unet_bytes": weight_bytes(engine.base.unet),
        "concept_share": Exam(engine, adapter, prompts, seeds_each=2).concept_share(weight),
        "following": Exam(engine, adapter, prompts, seeds_each=1).following(weight),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The job is measured and the result printed; a refused or failed job prints its error instead."""
    parser = argparse.ArgumentParser(description="One run of the ablation, started by ablation.py.")
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--started", type=float, default=time.time())
    options = parser.parse_args(arguments)
    from sdlora import SdloraError
    from sdlora.quiet import quiet_libraries

    quiet_libraries()
    job = Job(**json.loads(options.job.read_text(encoding="utf-8")))
    try:
        found = measure(job, options.started)
    except SdloraError as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({**asdict(job), **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Seconds an optimizer step, peak memory and start-up of `sdlora.train`, beside a diffusers trainer.

    python benchmarks/train_step.py --out benchmarks/results

Each measured run is a process of its own, and ours and the peer's take turns, so that a busy moment of
the machine meets both. Rank 4 on the attention layers, batch 1; the adapter is float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import machine

_WARM_STEPS = 2
_RANK = 4
_JOB_FLAGS: dict[str, dict[str, Any]] = {
    "pictures": {"type": Path, "required": True},
    "rank": {"type": int, "required": True},
    "steps": {"type": int, "required": True},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The measurements are made, printed and, with --out, written."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if machine.ran_as_child(words, measure_job, **_JOB_FLAGS):
        return
    options = _options(words)
    with tempfile.TemporaryDirectory() as scratch:
        jobs = {
            (model, precision): _job(model, precision, options, Path(scratch))
            for model in options.models
            for precision in options.precisions
        }
        with machine.busy() if options.busy else nullcontext():
            results = [
                {"model": model, "precision": precision, **_measure(job, options)}
                for (model, precision), job in jobs.items()
            ]
    result = {"machine": machine.describe(), "busy": options.busy, "file_pixels": options.file_pixels, "runs": results}
    title = "Training step: batch 1, rank 4, attention layers"
    name = "train_step"
    if options.file_pixels:
        title, name = f"{title}, picture files of {options.file_pixels} pixels a side", f"{name}_files"
    if options.busy:
        title, name = f"{title}, beside another process that computes", f"{name}_busy"
    machine.report(name, title, [_table(results), _NOTES], result, options.out)


def _job(model: str, precision: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return what both trainers are told about one job."""
    base, pixels = machine.find_base(model, options, scratch)
    return {
        "base": base,
        "precision": precision,
        "pictures": machine.make_pictures(scratch / f"pictures-{pixels}", options.file_pixels or pixels),
        "pixels": pixels,
        "rank": _RANK,
        "steps": _WARM_STEPS + (options.steps if model == "sd15" else options.steps_tiny),
    }


def _measure(job: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return the medians of both trainers over the rounds."""
    ours, peers = [], []
    for _ in range(options.rounds):
        ours.append(machine.run_child("train_step.py", job))
        if options.peer:
            peers.append(machine.run_child("peer_diffusers.py", job))
    result = _summary(ours)
    result["operations"] = ours[0]["operations"]
    result["matmul_rate"] = max(run["matmul_rate"] for run in ours)
    result["floor_seconds"] = round(result["operations"] / result["matmul_rate"], 4)
    result["losses"] = ours[0]["losses"]
    if peers:
        result["peer"] = _summary(peers)
        result["ratio"] = round(result["seconds"] / result["peer"]["seconds"], 3)
    return result


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steady = [run["seconds"][_WARM_STEPS:] for run in runs]
    return {
        "seconds": machine.median([value for values in steady for value in values]),
        "seconds_each_run": [machine.median(values) for values in steady],
        "startup_seconds": round(machine.median([run["startup_seconds"] for run in runs]), 1),
        "peak_gb": round(max(run["peak_gb"] for run in runs), 2),
    }


def _table(results: Sequence[Mapping[str, Any]]) -> str:
    columns = [
        "model",
        "precision",
        "s a step",
        "floor s",
        "peer s",
        "ratio",
        "peak GB",
        "peer GB",
        "start s",
        "peer start s",
    ]
    rows = []
    for run in results:
        peer = run.get("peer", {"seconds": "-", "peak_gb": "-", "startup_seconds": "-"})
        rows.append(
            [
                *(run["model"], run["precision"], run["seconds"], run["floor_seconds"]),
                *(peer["seconds"], run.get("ratio", "-"), run["peak_gb"], peer["peak_gb"]),
                *(run["startup_seconds"], peer["startup_seconds"]),
            ]
        )
    return machine.table(columns, rows)


_NOTES = """Seconds: median of the steady steps of all rounds. Floor: operations of the forward pass and of the
backward pass through the activations, over the rate of a large matrix product measured in the same
processes. Peer: benchmarks/peer_diffusers.py, which does per step what diffusers'
train_text_to_image_lora.py does. Peak: largest resident memory of the whole process, loading included.
Start: from the start of the process to the end of the first step."""


def measure_job(options: argparse.Namespace) -> dict[str, Any]:
    """Return step seconds, start-up and peak memory of one `sdlora.train`, and its floor's two numbers."""
    from sdlora.quiet import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        seconds, first_step, losses = _train(options, Path(scratch))
    return {
        "seconds": seconds,
        "startup_seconds": first_step - options.started,
        "peak_gb": machine.peak_memory_gb(),
        "losses": losses,
        "operations": count_operations(options.base, options.pixels, options.rank),
        "matmul_rate": machine.matmul_rate(options.precision, _device()),
    }


def _train(options: argparse.Namespace, folder: Path) -> tuple[list[float], float, list[float]]:
    """Return the seconds of each step, the time at which the first was done, and the losses."""
    from sdlora import parse_config, train

    values: dict[str, Any] = {
        "base": {"path": options.base, "precision": options.precision},
        "data": {"folder": str(options.pictures), "resolution": options.pixels},
        "adapter": {"rank": options.rank, "alpha": float(options.rank), "targets": ["attention"]},
        "optimizer": {"warmup_steps": 0},
        "training": {"steps": options.steps},
        "output": {"folder": str(folder)},
    }
    train(parse_config(values))
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] in {"start", "step"}]
    times = [event["time"] for event in events]
    seconds = [round(after - before, 4) for before, after in itertools.pairwise(times)]
    return seconds, times[1], [event["loss"] for event in events[1:]]


def count_operations(base: str, pixels: int, rank: int) -> int:
    """Return the operations of one step at batch 1: forward, and backward through the activations.

    Counted on a model without storage, with a gradient that is asked for the adapter only.
    """
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    from sdlora import LoadedBase, detect_family
    from sdlora.adapters.trainable import new_adapter
    from sdlora.config import AdapterSection

    meta = torch.device("meta")
    with meta:
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base, subfolder="unet"))
    unet.requires_grad_(False)
    schedule = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    loaded = LoadedBase(detect_family(Path(base)), None, unet, None, {}, {}, schedule, meta, torch.float32, pixels)  # type: ignore[arg-type]
    new_adapter(loaded, "counted", AdapterSection(rank=rank, alpha=rank), seed=0)
    side = pixels // 8
    latents = torch.empty(1, 4, side, side, device=meta)
    states = torch.empty(1, 77, unet.config.cross_attention_dim, device=meta)
    with FlopCounterMode(display=False) as counter:
        unet(latents, torch.zeros(1, device=meta), states, return_dict=False)[0].sum().backward()
    return int(counter.get_total_flops())


def _device() -> str:
    from sdlora.families.registry import default_device

    return default_device().type


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machine.common_options(parser)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of a run, SD 1.5")
    parser.add_argument("--steps-tiny", type=int, default=60, help="measured steps of a run, other bases")
    parser.add_argument("--file-pixels", type=int, default=0, help="side of the picture files; 0: as trained")
    parser.add_argument("--busy", action="store_true", help="beside a process that computes on all cores")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="measure the peer too")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()

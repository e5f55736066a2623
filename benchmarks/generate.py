"""Seconds a picture, bare and with an adapter, and the time to load and to switch adapters.

    python benchmarks/generate.py --out benchmarks/results

Each measured run is a process of its own. Adapters have rank 16 on all attention layers; they act as
side branches, so the base stays as it is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import machine

_RANK = 16
_JOB_FLAGS: dict[str, dict[str, Any]] = {
    "pictures": {"type": int, "required": True},
    "denoising-steps": {"type": int, "required": True},
}
_SECONDS = ("bare", "adapter", "load", "switch", "remove")


def main(arguments: Sequence[str] | None = None) -> None:
    """The measurements are made, printed and, with --out, written."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if machine.ran_as_child(words, measure_job, **_JOB_FLAGS):
        return
    options = _options(words)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            for precision in options.precisions:
                results.append(_measure(model, precision, options, Path(scratch)))
    result = {"machine": machine.describe(), "runs": results}
    title = f"Generation: one picture, {options.denoising_steps} denoising steps with guidance"
    machine.report("generate", title, [_table(results), _NOTES], result, options.out)


def _measure(model: str, precision: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    base, pixels = machine.find_base(model, options, scratch)
    job = {
        "base": base,
        "precision": precision,
        "pixels": pixels,
        "pictures": options.pictures if model == "sd15" else options.pictures_tiny,
        "denoising-steps": options.denoising_steps,
    }
    runs = [machine.run_child("generate.py", job) for _ in range(options.rounds)]
    result: dict[str, Any] = {"model": model, "precision": precision, "pixels": pixels}
    result |= {f"{key}_seconds": machine.median([value for run in runs for value in run[key]]) for key in _SECONDS}
    result["adapter_ratio"] = machine.median(
        [a / b for run in runs for a, b in zip(run["adapter"], run["bare"], strict=True)]
    )
    result["operations"] = runs[0]["operations"]
    result["matmul_rate"] = max(run["matmul_rate"] for run in runs)
    result["floor_seconds"] = round(result["operations"] / result["matmul_rate"], 4)
    result["startup_seconds"] = round(machine.median([run["startup_seconds"] for run in runs]), 1)
    result["peak_gb"] = round(max(run["peak_gb"] for run in runs), 2)
    return result


def _table(results: Sequence[Mapping[str, Any]]) -> str:
    columns = ["model", "precision", "pixels", "s bare", "s adapter", "ratio", "floor s", "load s", "switch s"]
    keys = ["model", "precision", "pixels", "bare_seconds", "adapter_seconds", "adapter_ratio", "floor_seconds"]
    keys += ["load_seconds", "switch_seconds", "remove_seconds", "peak_gb", "startup_seconds"]
    columns += ["remove s", "peak GB", "start s"]
    return machine.table(columns, [[run[key] for key in keys] for run in results])


_NOTES = """Seconds: medians over all rounds; bare pictures and pictures with the adapter take turns, and ratio is
the median of the pairs. Floor: operations of text encoder, UNet and VAE for one bare picture, over the
rate of a large matrix product measured in the same processes. Load: reading the file and hanging the
adapter in. Switch: making another loaded adapter act. Start: from the start of the process to the
first picture, which is not among the measured ones."""


def measure_job(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of each kind of work on one base in one precision."""
    from sdlora.quiet import quiet_libraries

    quiet_libraries()
    from sdlora import BaseSection, Engine, make_request

    engine = Engine(BaseSection(path=options.base, precision=options.precision))
    values = {
        "prompt": "a photo of a red circle",
        "steps": options.denoising_steps,
        "width": options.pixels,
        "height": options.pixels,
    }
    bare = make_request(**values)
    _seconds(lambda: list(engine.generate(bare)))
    result: dict[str, Any] = {"startup_seconds": time.time() - options.started}
    with tempfile.TemporaryDirectory() as scratch:
        files = [random_adapter(engine.base, Path(scratch) / f"{seed}.safetensors", seed) for seed in (1, 2)]
        result |= _adapter_work(engine.base, files, options.pictures)
        with_adapter = make_request(**values, adapters=({"path": str(files[0])},))
        list(engine.generate(with_adapter))
        pairs = [
            (_seconds(lambda: list(engine.generate(bare))), _seconds(lambda: list(engine.generate(with_adapter))))
            for _ in range(options.pictures)
        ]
    result["bare"], result["adapter"] = map(list, zip(*pairs, strict=True))
    result["peak_gb"] = machine.peak_memory_gb()
    result["operations"] = _count(lambda: list(engine.generate(bare)))
    result["matmul_rate"] = machine.matmul_rate(options.precision, engine.base.device.type)
    return result


def _adapter_work(base: Any, files: Sequence[Path], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of loading, switching and removing adapters, `rounds` of each."""
    from sdlora import read_adapter
    from sdlora.adapters.inject import add_adapter, remove_adapter, set_adapter_weights

    seconds: dict[str, list[float]] = {"load": [], "switch": [], "remove": []}
    for _ in range(rounds):
        for file in files:
            seconds["load"].append(_seconds(lambda file=file: add_adapter(base, file.stem, read_adapter(file))))  # type: ignore[misc]
        for file in files:
            seconds["switch"].append(_seconds(lambda file=file: set_adapter_weights(base, {file.stem: 1.0})))  # type: ignore[misc]
        for file in files:
            seconds["remove"].append(_seconds(lambda file=file: remove_adapter(base, file.stem)))  # type: ignore[misc]
    return seconds


def random_adapter(base: Any, file: Path, seed: int) -> Path:
    """`file` is an adapter for `base` with random weights in every attention layer."""
    import torch

    from sdlora import AdapterFile, LoraLayer, write_adapter
    from sdlora.adapters.inject import remove_adapter
    from sdlora.adapters.trainable import new_adapter
    from sdlora.config import AdapterSection

    section = AdapterSection(rank=_RANK, alpha=float(_RANK), targets=("attention",))
    fresh = new_adapter(base, "made", section, seed).layers()
    remove_adapter(base, "made")
    generator = torch.Generator().manual_seed(seed)
    layers = {
        path: LoraLayer(layer.down, 0.01 * torch.randn(layer.up.shape, generator=generator), layer.alpha)
        for path, layer in fresh.items()
        if isinstance(layer, LoraLayer)
    }
    write_adapter(AdapterFile(layers, base.family.name, {}), file)
    return file


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _count(work: Callable[[], object]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machine.common_options(parser)
    parser.add_argument("--denoising-steps", type=int, default=4, help="steps of a picture")
    parser.add_argument("--pictures", type=int, default=2, help="measured pictures of a run, SD 1.5")
    parser.add_argument("--pictures-tiny", type=int, default=10, help="measured pictures of a run, other bases")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()

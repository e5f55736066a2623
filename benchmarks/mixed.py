"""Pictures a second in batches of several adapters, of one adapter, and one adapter after the other as in diffusers.

    python benchmarks/mixed.py --out benchmarks/results

All ways make the same number of pictures and take turns in one process.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
from generate import random_adapter

_ADAPTERS = 8
_PROMPT = "a photo of a red circle"
_JOB_FLAGS: dict[str, dict[str, Any]] = {
    "turns": {"type": int, "required": True},
    "denoising-steps": {"type": int, "required": True},
    "threads": {"type": int, "required": True},
    "each": {"type": int, "required": True},
    "batch-size": {"type": int, "required": True},
}
_WAYS = ("mixed", "one", "mixed_read_anew", "diffusers")


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
    count = _ADAPTERS * options.each
    notes = _NOTES.format(each=options.each, batch=options.batch_size)
    title = f"Batches of several adapters: {count} pictures, {options.denoising_steps} denoising steps with guidance"
    machine.report("mixed", title, [_table(results), notes], result, options.out)


def _measure(model: str, precision: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    base, pixels = machine.find_base(model, options, scratch)
    job = {
        "base": base,
        "precision": precision,
        "pixels": pixels,
        "turns": options.turns,
        "denoising-steps": options.denoising_steps,
        "threads": options.threads,
        "each": options.each,
        "batch-size": options.batch_size,
    }
    runs = [machine.run_child("mixed.py", job) for _ in range(options.rounds)]
    seconds = {way: [value for run in runs for value in run[way]] for way in _WAYS}
    count = _ADAPTERS * options.each
    rates = {f"{way}_pictures_per_second": round(count / statistics.median(seconds[way]), 3) for way in _WAYS}
    ratios = {
        f"{way}_to_{other}": machine.median([b / a for a, b in zip(seconds[way], seconds[other], strict=True)])
        for way, other in (("mixed", "one"), ("mixed_read_anew", "diffusers"))
    }
    named = {"model": model, "precision": precision, "pixels": pixels, "threads": options.threads}
    return {**named, **rates, **ratios, "seconds": seconds}


def _table(results: Sequence[Mapping[str, Any]]) -> str:
    columns = ["model", "precision", "pixels", "mixed 1/s", "one 1/s", "mixed, read anew 1/s", "diffusers 1/s"]
    columns += ["mixed / one", "mixed, read anew / diffusers"]
    keys = ["model", "precision", "pixels", *(f"{way}_pictures_per_second" for way in _WAYS)]
    keys += ["mixed_to_one", "mixed_read_anew_to_diffusers"]
    return machine.table(columns, [[run[key] for key in keys] for run in results])


_NOTES = f"""Mixed: {_ADAPTERS} adapters with {{each}} pictures each, in batches of up to {{batch}}, the adapters in memory from before. One: as
many pictures of one adapter, in the same batches. Mixed, read anew: the same with files that were not read before.
Diffusers: the pipeline reads an adapter, sets it, makes its {{each}} pictures in one batch and unloads it, one adapter after
the other. Pictures a second: medians over all turns; the ratios are medians of the turns', above 1 where the first is
faster. Adapters have rank 16 on all attention layers."""


def measure_job(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of each way, as often as there are turns."""
    from sdlora.quiet import quiet_libraries

    quiet_libraries()
    import torch

    from sdlora import BaseSection, Engine

    torch.set_num_threads(options.threads)
    engine = Engine(BaseSection(path=options.base, precision=options.precision), resident_adapters=2 * _ADAPTERS)
    seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        files = [random_adapter(engine.base, Path(scratch) / f"{seed}.safetensors", seed) for seed in range(_ADAPTERS)]
        theirs = _diffusers_way(options, torch)
        for turn in range(options.turns + 1):
            # Copies, so that they are not in memory from the turn before.
            fresh = [Path(shutil.copy(file, file.with_name(f"turn{turn}-{file.name}"))) for file in files]
            taken = {
                "mixed": _seconds(lambda: _our_way(engine, files, options)),
                "one": _seconds(lambda: _our_way(engine, files[:1], options)),
                "mixed_read_anew": _seconds(lambda fresh=fresh: _our_way(engine, fresh, options)),  # type: ignore[misc]
                "diffusers": _seconds(lambda fresh=fresh: theirs(fresh)),  # type: ignore[misc]
            }
            for way, value in taken.items() if turn else ():  # the first turn warms up
                seconds[way].append(value)
    return seconds


def _our_way(engine: Any, files: Sequence[Path], options: argparse.Namespace) -> None:
    """All pictures are made, in full batches."""
    from sdlora import make_request

    requests = [
        make_request(
            prompt=_PROMPT,
            seed=number,
            steps=options.denoising_steps,
            width=options.pixels,
            height=options.pixels,
            adapters=({"path": str(files[number % len(files)])},),
        )
        for number in range(_ADAPTERS * options.each)
    ]
    assert sum(1 for _ in engine.generate_all(requests, batch_size=options.batch_size)) == len(requests)


def _diffusers_way(options: argparse.Namespace, torch: Any) -> Callable[[Sequence[Path]], None]:
    """Return what makes all pictures with diffusers' pipeline, one adapter after the other."""
    from diffusers import DiffusionPipeline

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = DiffusionPipeline.from_pretrained(options.base, torch_dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def make(files: Sequence[Path]) -> None:
        for number, file in enumerate(files):
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="one")
            pipeline.set_adapters(["one"], [1.0])
            seeds = range(number * options.each, (number + 1) * options.each)
            pipeline(
                [_PROMPT] * options.each,
                num_inference_steps=options.denoising_steps,
                guidance_scale=7.5,
                width=options.pixels,
                height=options.pixels,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            )
            pipeline.unload_lora_weights()

    return make


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machine.common_options(parser)
    parser.set_defaults(models=["tiny"], precisions=["fp32"])
    parser.add_argument("--denoising-steps", type=int, default=10, help="steps of a picture")
    parser.add_argument("--turns", type=int, default=3, help="measured turns of a run, after one that warms up")
    parser.add_argument("--each", type=int, default=4, help="pictures of each adapter")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures that we make at once")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch in the measured process")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()

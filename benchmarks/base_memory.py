"""What a base of the true architecture takes in memory, in each form of the frozen UNet.

Each is loaded as training loads it, in a process of its own: encoders first, freed, then the UNet.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import machine

_FORMS = ("none", "int8", "nf4")
_TITLES = {"sd1": "SD 1.5", "sd2": "SD 2.1", "sdxl": "SDXL"}


def main(arguments: Sequence[str] | None = None) -> None:
    """The measurements are made, printed and, with --out, written."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if machine.ran_as_child(words, measure, quantize={"required": True}):
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the .md and .json report; left out: only printed")
    parser.add_argument("--models", nargs="+", default=["sd1", "sdxl"], choices=list(_TITLES))
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--keep", type=Path, help="where the random bases (fp16, SDXL 7 GB) are kept for the next time")
    options = parser.parse_args(words)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            folder = machine.make_random_base(model, (options.keep or Path(scratch)) / model, "float16")
            for form in _FORMS:
                job = {"base": folder, "precision": options.precision, "pixels": 0, "quantize": form}
                runs.append({"model": model, "quantize": form, **machine.run_child("base_memory.py", job)})
    result = {"machine": machine.describe(), "precision": options.precision, "runs": runs}
    title = f"Memory of a base whose other weights are {options.precision}"
    machine.report("base_memory", title, [_table(runs)], result, options.out)


def measure(options: argparse.Namespace) -> Mapping[str, Any]:
    """Return what loading the base in one form took, in gigabytes of 10^9 bytes and seconds."""
    from torch import nn

    from sdlora import BaseSection, load_base
    from sdlora.families.quantize import weight_bytes

    section = BaseSection(path=options.base, precision=options.precision, quantize=options.quantize)
    base = load_base(section, "cpu", unet=False)
    encoders = sum(weight_bytes(module) for name, module in base.components() if name != "unet")
    base.drop_encoders()
    started = time.perf_counter()
    base.fetch_unet()
    seconds = time.perf_counter() - started
    linear = [p for p, m in base.unet.named_modules() if isinstance(m, nn.Linear) and ".attentions." in f".{p}"]
    return {
        "encoders_gb": encoders / 1e9,
        "unet_gb": weight_bytes(base.unet) / 1e9,
        "quantizable_share": sum(_count(base.unet.get_submodule(p)) for p in linear) / _parameters(base.unet, linear),
        "seconds": seconds,
        "peak_gb": machine.peak_memory_gb(),
    }


def _count(linear: Any) -> int:
    return int(linear.in_features * linear.out_features)


def _parameters(unet: Any, linear: Sequence[str]) -> int:
    """Return the number of weights, of quantised layers as many as they stand for."""
    quantised = {id(unet.get_submodule(path).weight) for path in linear}
    rest = sum(parameter.numel() for parameter in unet.parameters() if id(parameter) not in quantised)
    return rest + sum(_count(unet.get_submodule(path)) for path in linear)


def _table(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            _TITLES[run["model"]],
            run["quantize"],
            f"{run['quantizable_share']:.0%}",
            f"{run['unet_gb']:.2f} GB",
            f"{run['encoders_gb']:.2f} GB",
            f"{run['peak_gb']:.1f} GB",
            f"{run['seconds']:.1f} s",
        )
        for run in runs
    ]
    columns = [
        "base",
        "quantize",
        "share of weights",
        "UNet",
        "encoders, freed before",
        "peak of the process",
        "UNet loads in",
    ]
    return machine.table(columns, rows)


if __name__ == "__main__":
    main()

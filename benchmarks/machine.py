"""What a measurement needs besides the thing measured: the machine's name, its matmul rate, memory, a report.

Light to import: whoever starts the measured processes should not hold a model library itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ENVIRONMENT = dict(os.environ)  # as the benchmark was started: importing sdlora adds to it
_HERE = Path(__file__).resolve().parent
_LIBRARIES = ("sdlora", "torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")


def describe() -> dict[str, Any]:
    """Return commit, device, cores, versions and the time of the measurement."""
    return {
        "commit": _commit(),
        "device": _device(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _LIBRARIES},
        "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def matmul_rate(precision: str, device: str = "cpu", side: int = 2048) -> float:
    """Return the operations a second of a large square product, the best of eight; multiply and add are two."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(9):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # reading a value waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2.0 * side**3 / best


def peak_memory_gb() -> float:
    """Return the largest resident memory this process has had, in units of 10^9 bytes."""
    # Not ru_maxrss on Linux: a new process inherits its parent's value there.
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def run_child(script: str, options: Mapping[str, object]) -> dict[str, Any]:
    """Return the JSON object that `script`, in a process of its own, prints as its last line.

    The child gets the options as flags, and as --started the time at which it was started.
    Raises RuntimeError with the child's last words when it fails.
    """
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(_HERE / script), *flags, "--started", repr(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_ENVIRONMENT)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(flags)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


@contextmanager
def busy() -> Iterator[None]:
    """Inside, another process keeps multiplying matrices with as many threads as torch gives it."""
    program = "import torch; a = torch.randn(1024, 1024); print('begun', flush=True)\nwhile True: a @ a"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=_ENVIRONMENT) as other:
        assert other.stdout is not None
        try:
            other.stdout.readline()
            yield
        finally:
            other.kill()


def make_pictures(folder: Path, pixels: int, count: int = 4) -> Path:
    """`folder` holds `count` drawn square JPEG pictures with captions; returns it."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 4 * np.pi, pixels)
    for number in range(count):
        waves = [np.sin(ramp[:, None] * (number + 1) + ramp[None, :] * band) for band in range(3)]
        levels = (127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8)
        Image.fromarray(levels).save(folder / f"{number}.jpg", quality=95)
        (folder / f"{number}.txt").write_text("a photo of a red circle", encoding="utf-8")
    return folder


def find_base(model: str, options: argparse.Namespace, scratch: Path) -> tuple[Path, int]:
    """Return the folder of the base that `model` names, and the side in pixels at which it is measured.

    SD 1.5 is measured at --pixels, any other base at its own size.
    """
    if model == "sd15":
        return make_random_base("sd1", options.sd15 or scratch / "sd15", "float32"), options.pixels
    from sdlora.assets import TINY_SD

    folder = TINY_SD if model == "tiny" else Path(model)
    return folder, 8 * int(json.loads((folder / "unet" / "config.json").read_text())["sample_size"])


def make_random_base(shape: str, folder: Path, dtype: str) -> Path:
    """`folder` holds a base of the true architecture, random weights in torch's `dtype`; returns it.

    Made in a process of its own, once: a folder that is there already is used again.
    """
    if not (folder / "model_index.json").is_file():
        program = (
            "import sys, torch; from sdlora.families.tiny import random_base; "
            "base = random_base(sys.argv[1], getattr(torch, sys.argv[2]), torch.device('cpu')); "
            "base.family.make_pipeline(base).save_pretrained(sys.argv[3])"
        )
        subprocess.run([sys.executable, "-c", program, shape, dtype, str(folder)], check=True, capture_output=True)
    return folder


def median(values: Sequence[float]) -> float:
    """Return the median, rounded to four decimals for the report."""
    return round(statistics.median(values), 4)


def common_options(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark are in `parser`."""
    parser.add_argument("--out", type=Path, help="folder for the .md and .json report; left out: only printed")
    parser.add_argument("--models", nargs="+", default=["tiny", "sd15"], help="tiny, sd15, or a diffusers folder")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--sd15", type=Path, help="where the random SD 1.5 base (4.3 GB) is kept for the next time")
    parser.add_argument("--rounds", type=int, default=3, help="how often each process is started, in turn")
    parser.add_argument("--pixels", type=int, default=256, help="side of the pictures, for the SD 1.5 base")


def ran_as_child(
    words: Sequence[str], measure: Callable[[argparse.Namespace], Mapping[str, Any]], **more: Mapping[str, Any]
) -> bool:
    """Make and print the measured run if `words` are those of `run_child`; return whether they were.

    The run is told base, precision, pixels, start time, and `more` (flag: its settings).
    """
    if "--base" not in words:
        return False
    parser = argparse.ArgumentParser(description="One measured run, started by the benchmark itself.")
    parser.add_argument("--base", required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--pixels", type=int, required=True)
    parser.add_argument("--started", type=float, default=time.time())
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    print(json.dumps(measure(parser.parse_args(words))))
    return True


def report(name: str, title: str, tables: Sequence[str], result: Mapping[str, Any], out: Path | None) -> None:
    """The report is printed and, where `out` is given, written there as NAME.md and NAME.json."""
    machine = result["machine"]
    versions = ", ".join(f"{library} {version}" for library, version in machine["versions"].items())
    head = [
        f"# {title}",
        f"Commit {machine['commit']}; {machine['device']}, {machine['cores']} cores; "
        f"Python {machine['python']}; {versions}; {machine['measured']}.",
    ]
    text = "\n\n".join([*head, *tables]) + "\n"
    print(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.md").write_text(text, encoding="utf-8")
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(_HERE), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD") or "none"
    return f"{commit} with changes" if git("status", "--porcelain", "--", "../sdlora") else commit


def _device() -> str:
    import_torch = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    found = subprocess.run([sys.executable, "-c", import_torch], capture_output=True, text=True, check=False)
    if found.stdout.strip():
        return found.stdout.strip()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU {line.partition(':')[2].strip()}"
    return f"CPU {platform.processor() or platform.machine()}"


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "absent"

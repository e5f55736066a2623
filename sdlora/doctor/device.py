"""The device that runs would use: whether it computes, what it has, in which number formats."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

from sdlora.doctor.check import GIB, TORCH_BUILDS, Check, failed, sentence

if TYPE_CHECKING:
    import torch

_SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def find_device(wanted: str | None) -> torch.device | Check:
    """Return the device that runs would use, or the finding that nothing can be computed on it."""
    try:
        import torch

        from sdlora.families.registry import default_device
    except (ImportError, OSError) as error:
        return failed("device", error)
    device = torch.device(wanted) if wanted else default_device()
    try:
        if (torch.ones(8, device=device) * 2).sum().item() != 16:
            raise RuntimeError("it computes 8 x 2 wrongly")
    except (RuntimeError, AssertionError) as error:
        fix = f"update the GPU's driver, or install the torch build that {TORCH_BUILDS} names for this GPU"
        meaning = f"Nothing can be computed on it: {sentence(error)}"
        return Check("device", "problem", str(device), meaning, f"{fix}; --device cpu does without it")
    return device


def describe_device(device: torch.device, *, asked_for: bool) -> list[Check]:
    """Return what `device` is and has; of a CPU that nobody asked for, why it is not a GPU."""
    if device.type == "cuda":
        return _cuda(device)
    if device.type == "mps":
        return [Check("device", "ok", "mps", "The GPU of Apple Silicon trains and makes pictures.")]
    return [_cpu(asked_for=asked_for)]


def _cuda(device: torch.device) -> list[Check]:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    name = f"{device}, {torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    return [Check("device", "ok", name, "This GPU trains and makes pictures."), _gpu_memory(free, total)]


def _gpu_memory(free: int, total: int) -> Check:
    value = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free >= 5 * GIB:
        meaning = "What other programs leave of the GPU's memory; sdlora is made for GPUs of 6 GB and more."
        return Check("gpu memory", "ok", value, meaning)
    meaning = "Less than a free GPU of 6 GB has, for which sdlora is made; a run may end for want of memory."
    fix = (
        "close other programs that use the GPU (nvidia-smi lists them), keep training.batch_size at 1, and set "
        "training.gradient_checkpointing = true"
    )
    return Check("gpu memory", "note", value, meaning, fix)


def _cpu(*, asked_for: bool) -> Check:
    import torch

    value = f"cpu, {torch.get_num_threads()} threads"
    slow = "The CPU computes: enough for the tiny base, slow for a true-size one."
    if asked_for:
        return Check("device", "ok", value, slow)
    gpus, complaint = _nvidia_smi()
    if not gpus:
        meaning = f"No GPU was found{f' (nvidia-smi: {complaint})' if complaint else ''}. {slow}"
        return Check("device", "note", value, meaning, "for true-size bases use a machine with an NVIDIA GPU")
    if torch.version.cuda is None:
        meaning = f"The {gpus[0]} of this machine stays unused, because torch is a build without CUDA. {slow}"
        fix = f"pip uninstall torch, then install it with the command that {TORCH_BUILDS} gives for CUDA"
        return Check("device", "problem", value, meaning, fix)
    meaning = f"The {gpus[0]} of this machine stays unused, because torch cannot start CUDA ({_cuda_fault()}). {slow}"
    fix = (
        "see that CUDA_VISIBLE_DEVICES does not hide it, update its driver, "
        f"or install the torch build that {TORCH_BUILDS} names for the driver"
    )
    return Check("device", "problem", value, meaning, fix)


def _nvidia_smi() -> tuple[list[str], str]:
    """Return the names of the machine's NVIDIA GPUs as the driver knows them, and what it complains of."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], ""
    try:
        query = [program, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], sentence(error)
    lines = done.stdout.strip().splitlines()
    return (lines, "") if done.returncode == 0 else ([], " ".join([*lines, done.stderr.strip()]).strip()[:200])


def _cuda_fault() -> str:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return sentence(error)
    return "it sees no GPU"


def examine_bf16(device: torch.device) -> Check:
    """Return whether `device` has instructions for bf16, as far as torch knows."""
    import torch

    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        if native:
            return Check("bf16", "ok", "native", "Half the memory of fp32, with its range.")
        meaning = "This GPU has no bf16 of its own; fp16 takes its place, and gives NaN with some bases."
        return Check("bf16", "note", "not native", meaning, 'where pictures come out as NaN, set precision = "fp32"')
    if device.type == "mps":
        return Check("bf16", "ok", "not examined", "Only CUDA devices and CPUs are asked for it.")
    native_by = sorted(name for name, has in torch.cpu.get_capabilities().items() if "bf16" in name and has is True)
    if native_by:
        meaning = "This CPU multiplies bf16 itself: a base in it takes half the memory of fp32."
        return Check("bf16", "ok", f"native ({', '.join(native_by)})", meaning)
    meaning = "bf16 works here and halves a base's memory, but torch reports no instructions for it: it is slow."
    return Check("bf16", "note", "not native", meaning, "leave precision at auto, which uses fp32 on a CPU")


def examine_precision(device: torch.device) -> Check:
    """Return what a base that is loaded on `device` really comes in."""
    from sdlora import BaseSection, load_base

    dtype = str(load_base(BaseSection(path="tiny", precision="auto"), device).dtype).removeprefix("torch.")
    meaning = "What precision = auto is here: the number format of the frozen base. Adapters are fp32 always."
    return Check("precision", "ok", _SHORT_NAMES.get(dtype, dtype), meaning)

"""Room in memory and on disks, and whether the network may be used."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

from sdlora.doctor.check import GIB, Check


def examine_space() -> Iterator[Check]:
    """Yield what is free: RAM, the disk of the current folder, the disk of downloaded models."""
    import psutil
    from huggingface_hub import constants

    free = psutil.virtual_memory().available
    fix = "close other programs; choose smaller pictures and training.batch_size = 1"
    meaning = "RAM that programs can still have; training Stable Diffusion 1.5 on a CPU takes 3 to 6 GB."
    yield _room("memory", free, f"{free / GIB:.1f} GiB free", (6, 0.6), meaning, fix)
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    fix = "delete what is not needed, or name an output folder on another disk"
    meaning = "Adapters, checkpoints and pictures of runs that are started in this folder go here."
    yield _room("disk", free, f"{free / GIB:.1f} GiB free at {here}", (5, 0.5), meaning, fix)
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    bases = f"{len(list(cache.glob('models--*')))} models" if cache.exists() else "not there yet"
    fix = "delete models that are not needed (hf cache rm), or set HF_HOME to a folder on another disk"
    meaning = "Bases named by a Hugging Face id are kept here; one takes 2 to 14 GB."
    yield _room("model cache", free, f"{cache} ({bases}), {free / GIB:.1f} GiB free", (15, 0), meaning, fix)


def _room(name: str, free: int, value: str, bounds_gib: tuple[float, float], meaning: str, fix: str) -> Check:
    """Return the finding about room: below the first bound it is worth a note, below the second a problem."""
    comfortable, least = (bound * GIB for bound in bounds_gib)
    if free >= comfortable:
        return Check(name, "ok", value, meaning)
    return Check(name, "note" if free >= least else "problem", value, f"That is little. {meaning}", fix)


def examine_network() -> Check:
    """Return what may be contacted; nothing is, to find out."""
    from huggingface_hub import constants

    promise = "Nothing is contacted unless a run names what lives there, such as a base by its Hugging Face id"
    if constants.HF_HUB_OFFLINE:
        meaning = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: an id works only for what is in the model cache."
        return Check("network", "note", "offline", meaning, "to download a base, unset these variables")
    if importlib.util.find_spec("kernels"):
        meaning = (
            f"{promise}. But with the package kernels, bitsandbytes may fetch a kernel from huggingface.co when loaded."
        )
        return Check("network", "note", "online", meaning, "set HF_HUB_OFFLINE=1, or pip uninstall kernels")
    return Check("network", "ok", "online, not tried", f"{promise}.")

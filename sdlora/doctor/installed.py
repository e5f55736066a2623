"""The versions of what is installed, held against what sdlora needs."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from sdlora import __version__
from sdlora.doctor.check import Check, sentence

MISSING, BROKEN = "not installed", "does not load"
_PURPOSES = {
    "torch": "computes everything",
    "diffusers": "holds the UNet, the VAE and the samplers",
    "transformers": "holds the text encoders",
    "peft": "puts an adapter into a model",
    "accelerate": "runs training on one device or several",
    "bitsandbytes": "holds optimizer states and layers in 8 and 4 bits",
    "safetensors": "reads and writes the files of models and adapters",
    "huggingface_hub": "downloads a base that is named by its Hugging Face id",
    "gradio": "serves the web page",
    "numpy": "computes with pictures",
    "rich": "shows progress",
    "tomli-w": "writes the settings of a run",
    "pydantic": "checks settings",
    "pillow": "reads and writes pictures",
}


def examine_installation() -> list[Check]:
    """Return the versions of Python, sdlora and each library, held against what sdlora's metadata demand."""
    try:
        wanted_python, recorded = metadata("sdlora")["Requires-Python"], version("sdlora")
    except PackageNotFoundError:
        return [Check("sdlora", "problem", MISSING, "It runs from a folder.", "pip install -e . in that folder")]
    python = platform.python_version()
    recent = SpecifierSet(wanted_python).contains(python, prereleases=True)
    fix = "" if recent else f"install Python {wanted_python} and sdlora in a new environment of it"
    checks = [Check("python", "ok" if recent else "problem", python, f"sdlora needs {wanted_python}.", fix)]
    here = f"This program, in {Path(__file__).parents[1]}."
    if recorded == __version__:
        checks.append(Check("sdlora", "ok", __version__, here))
    else:
        meaning = f"{here} It was installed as {recorded}, and the versions below are held against that one's needs."
        checks.append(Check("sdlora", "note", __version__, meaning, "install it again: pip install -e ."))
    needs = [Requirement(line) for line in requires("sdlora") or ()]
    return checks + [_library(need) for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def _library(need: Requirement) -> Check:
    meaning = f"It {_PURPOSES.get(need.name, 'is used by sdlora')}; sdlora needs {need.specifier}."
    fix = f'pip install --upgrade "{need.name}{need.specifier}"'
    try:
        found = version(need.name)
    except PackageNotFoundError:
        return Check(need.name, "problem", MISSING, meaning, fix)
    if not need.specifier.contains(found, prereleases=True):
        return Check(need.name, "problem", found, f"Too old. {meaning}", fix)
    check = Check(need.name, "ok", found, meaning)
    return _torch_build(check) if need.name == "torch" else check


def _torch_build(check: Check) -> Check:
    """Return the finding about torch with what it was built for."""
    try:
        import torch
    except (ImportError, OSError) as error:
        fix = "pip install --force-reinstall torch; on Windows install the Microsoft Visual C++ Redistributable too"
        return replace(check, state="problem", value=BROKEN, meaning=sentence(error), fix=fix)
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda} build"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip} build"
    else:
        build = "Metal build" if torch.backends.mps.is_built() else "CPU build"
    return replace(check, value=f"{check.value} ({build})")

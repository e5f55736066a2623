"""Keeps the libraries' irrelevant messages away from users."""

from __future__ import annotations

import logging
import os
import warnings

_LIBRARIES = (
    "transformers",
    "diffusers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
    "httpx",
    "httpx2",
    "datasets",
    "fsspec",
)


def quiet_libraries() -> None:
    """Only errors of the model libraries are shown from now on. Call before they are imported.

    Silenced among others: "MISSING ... newly initialized" of a text-encoder adapter, torchvision
    fallbacks, and bitsandbytes' notice about optional kernels. `SDLORA_DEBUG=1` shows all again.
    """
    if os.environ.get("SDLORA_DEBUG"):
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in (
        "transformers",
        "diffusers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "torch",
        "huggingface_hub",
        "PIL",
    ):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")

"""What every test has: one thread, no network, tiny bases."""

from __future__ import annotations

import os

# Before any library is imported: these are read once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["SDLORA_CACHE"] = os.devnull + "/none"  # nothing of the user's is read or written, see fresh_cache

import gc
import itertools
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

_NUMBERS = itertools.count()
_LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


def pytest_collection_finish() -> None:
    """What is there by now stays to the end: looking through it for garbage took a tenth of all the time."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[None]:
    """Any connection that leaves the machine fails the test that makes it."""
    real_connect, real_lookup = socket.socket.connect, socket.getaddrinfo

    def connect(self: socket.socket, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(_LOOPBACK):
            raise AssertionError(f"a test tried to connect to {address}")
        return real_connect(self, address)

    def getaddrinfo(host, *arguments, **options):
        if host is not None and not str(host).startswith(_LOOPBACK):
            raise AssertionError(f"a test tried to look up {host}")
        return real_lookup(host, *arguments, **options)

    socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo
    try:
        yield
    finally:
        socket.socket.connect, socket.getaddrinfo = real_connect, real_lookup


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path_factory, monkeypatch) -> None:
    """Each test has a cache folder of its own, empty at first."""
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{next(_NUMBERS)}"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Callable[[str], Path]:
    """`tiny_folder(shape)`: a diffusers folder of that shape with random weights; do not write to it."""
    from sdlora.families.tiny import save_tiny
    from sdlora.quiet import quiet_libraries

    quiet_libraries()
    _one_thread()
    folders: dict[str, Path] = {}

    def folder(shape: str) -> Path:
        if shape not in folders:
            folders[shape] = save_tiny(shape, tmp_path_factory.mktemp("bases") / shape)
        return folders[shape]

    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Callable[[str], Path]:
    """`checkpoints(shape)`: the tiny base of that shape as one file, which declares what it predicts; do not write."""
    import ldm_layout

    from sdlora.families.tiny import tiny_pipeline

    files: dict[str, Path] = {}

    def checkpoint(shape: str) -> Path:
        if shape not in files:
            path = tmp_path_factory.mktemp("checkpoints") / f"{shape}.safetensors"
            metadata = {"modelspec.prediction_type": "v" if shape == "sd2" else "epsilon"}
            ldm_layout.write_checkpoint(tiny_pipeline(shape), path, metadata=metadata)
            files[shape] = path
        return files[shape]

    return checkpoint


@pytest.fixture
def shape() -> str:
    """The family of bases that a test asks for without naming one; some folders of tests go through them all."""
    return "sd1"


@pytest.fixture(scope="session")
def loaded_bases() -> dict[str, Any]:
    """What `tiny_base` has loaded, and how its parts are copied."""
    return {}


@pytest.fixture
def tiny_base(tiny_folder, loaded_bases, shape):
    """`tiny_base(shape)`: that base as freshly loaded on the CPU in float32; a copy, which takes a tenth of the time."""
    from copier import copier

    from sdlora.config import BaseSection
    from sdlora.families.registry import load_base

    def base(wanted: str = shape):
        if wanted not in loaded_bases:
            section = BaseSection(path=str(tiny_folder(wanted)), precision="fp32")
            loaded = load_base(section, "cpu")
            copied = ("unet", "vae", "text_encoders", "scheduler", "sampler_config", "words")
            loaded_bases[wanted] = loaded, copier({name: getattr(loaded, name) for name in copied})
        loaded, fresh_parts = loaded_bases[wanted]
        return replace(loaded, tokenizers=dict(loaded.tokenizers), **fresh_parts())

    return base


@pytest.fixture
def make_adapter():
    """`make_adapter(base, ...)`: an AdapterFile of random weights that fits the base."""
    import torch

    from sdlora.adapters.file import AdapterFile
    from sdlora.adapters.layers import LoraLayer
    from sdlora.families.base import match_targets

    def make(
        base,
        patterns=("attn1.to_q", "attn2.to_*", "attentions.*.proj_in", "resnets.*.conv1"),
        text_encoder=True,
        rank=2,
        alpha=1.5,
        seed=0,
    ) -> AdapterFile:
        generator = torch.Generator().manual_seed(seed)
        live = {f"unet.{path}": base.unet.get_submodule(path) for path in match_targets(base.unet, patterns)}
        for name, encoder in base.text_encoders.items() if text_encoder else ():
            for path in match_targets(encoder, ["attention"], base.family.text_encoder_presets):
                live[f"{name}.text_model.{path.removeprefix('text_model.')}"] = encoder.get_submodule(path)
        layers = {}
        for path, module in live.items():
            out, inside, *kernel = module.weight.shape
            down = torch.randn(rank, inside, *kernel, generator=generator) * 0.1
            up = torch.randn(out, rank, *(1 for _ in kernel), generator=generator) * 0.3
            layers[path] = LoraLayer(down, up, alpha)
        return AdapterFile(layers, base.family.name, {"ss_output_name": "random"})

    return make


@pytest.fixture
def recipe():
    """A recipe with every field filled."""
    from sdlora.generation.recipe import Recipe, UsedAdapter

    return Recipe(
        prompt='ein roter Ball, "schön", 猫',
        negative_prompt="blurry, blue",
        seed=41,
        steps=20,
        guidance_scale=6.5,
        width=24,
        height=16,
        base="dreamy",
        base_family="sd1",
        base_sha256="ab" * 32,
        adapters=(UsedAdapter("zorb", "cd" * 32, "ef" * 32, 0.8),),
        scheduler="PNDMScheduler",
        scheduler_config={"steps_offset": 1, "trained_betas": None},
        noise_device="cpu",
        precision="fp32",
        device="cpu",
        emphasis="original",
        versions={"sdlora": "0.1.0", "torch": "2.13"},
    )


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)

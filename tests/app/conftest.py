from pathlib import Path

import pytest
import torch

import sdlora
from sdlora.families.tiny import save_tiny


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    return save_tiny("sd1", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter_bytes(base_folder, tmp_path_factory):
    """An adapter file that changes every attention layer of the tiny base a lot."""
    base = sdlora.load_base(sdlora.BaseSection(path=str(base_folder)), "cpu")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) / 2

    layers = {
        f"unet.{name}": sdlora.LoraLayer(draw(4, layer.in_features), draw(layer.out_features, 4), 4.0)
        for name, layer in base.unet.named_modules()
        if isinstance(layer, torch.nn.Linear) and ".attn" in name
    }
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    metadata = {"modelspec.trigger_phrase": "sks ball"}
    sdlora.write_adapter(sdlora.AdapterFile(layers, "sd1", metadata), path)
    return path.read_bytes()


@pytest.fixture
def library_folder(tmp_path: Path, adapter_bytes):
    """A library with one good adapter, demo/adapter, and a web page saved as a model."""
    folder = tmp_path / "library"
    (folder / "demo").mkdir(parents=True)
    (folder / "demo" / "adapter.safetensors").write_bytes(adapter_bytes)
    (folder / "broken.safetensors").write_bytes(b"<!doctype html><html>sign in first</html>")
    return folder

import pytest
import torch

from sdlora.assets import CONFIGS, TINY_SD
from sdlora.families.tiny import save_tiny, tiny_pipeline


@pytest.mark.parametrize("shape", ["sd1", "sd2", "sdxl"])
def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone(shape):
    state = torch.get_rng_state()
    one, again, other = tiny_pipeline(shape), tiny_pipeline(shape), tiny_pipeline(shape, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("unet", "vae", "text_encoder"):
        first = dict(getattr(one, name).named_parameters())
        second = dict(getattr(again, name).named_parameters())
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(one.unet.conv_in.weight, other.unet.conv_in.weight)
    assert sum(parameter.numel() for parameter in one.unet.parameters()) < 2_000_000


def test_a_saved_one_is_a_whole_folder_of_safetensors(tmp_path):
    folder = save_tiny("sd1", tmp_path / "sd1")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {
        "model_index.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    } <= names
    assert not any(name.endswith((".bin", ".pt", ".ckpt")) for name in names)


def test_the_shipped_folders_are_there():
    assert (TINY_SD / "model_index.json").is_file()
    assert (TINY_SD / "tokenizer" / "vocab.json").is_file()
    assert (CONFIGS / "sd1" / "model_index.json").is_file()

"""Loading a UNet piece by piece gives what the libraries give."""

import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from sdlora.families.detect import detect_base
from sdlora.families.weights import FolderWeights, fill, skeleton

CPU = torch.device("cpu")


def load_unet(folder, variant="", dtype=torch.float32):
    weights = FolderWeights(folder, detect_base(folder, variant).files)
    unet = skeleton(UNet2DConditionModel, weights, "unet")
    assert all(parameter.is_meta for parameter in unet.parameters())
    fill(unet, weights, "unet", CPU, dtype)
    return unet


def same_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and ours[name].equal(theirs[name]) for name in theirs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_unet_is_the_one_that_diffusers_loads(tiny_folder, dtype):
    folder = tiny_folder("sd1")
    ours = load_unet(folder, dtype=dtype)
    theirs = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype)
    assert same_weights(ours, theirs)
    assert dict(ours.config).keys() - {"_name_or_path"} == dict(theirs.config).keys() - {"_name_or_path"}
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in ours.parameters())
    assert ours.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_a_variant_and_weights_in_several_files_load_too(tiny_folder, tmp_path, variant):
    unet = UNet2DConditionModel.from_pretrained(tiny_folder("sd1"), subfolder="unet")
    for folder, size in ((tmp_path / "one", "10GB"), (tmp_path / "several", "200KB")):
        shutil.copytree(tiny_folder("sd1"), folder, ignore=shutil.ignore_patterns("diffusion*"))
        for part, kind in (("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
            kind.from_pretrained(tiny_folder("sd1"), subfolder=part).save_pretrained(
                folder / part, variant=variant or None
            )
        unet.save_pretrained(folder / "unet", variant=variant or None, max_shard_size=size)
        assert same_weights(load_unet(folder, variant), unet)
    assert len(list((tmp_path / "one" / "unet").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "several" / "unet").glob("*.safetensors"))) > 1

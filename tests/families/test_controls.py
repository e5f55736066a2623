"""ControlNets of true size, without their weights: what they are, and that each weight has its place."""

from types import SimpleNamespace

import pytest
import torch
from control_files import original_name, random_control
from diffusers import ControlNetModel, UNet2DConditionModel

from sdlora.assets import CONFIGS
from sdlora.errors import ModelError
from sdlora.families import controls
from sdlora.families.control_weights import names_in_diffusers
from sdlora.families.tiny import tiny_pipeline
from sdlora.headers import TensorEntry


@pytest.mark.parametrize("shape", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("original", [True, False])
def test_a_true_controlnet_is_known_and_every_weight_has_its_place(shape, original, monkeypatch, tmp_path):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / shape / "unet"))
        net = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    weights = net.state_dict()
    keys = {f"control_model.{original_name(name, net)}" if original else name: name for name in weights}
    tensors = {key: TensorEntry("F16", tuple(weights[name].shape), 0, 0) for key, name in keys.items()}
    monkeypatch.setattr(controls, "read_header", lambda path: SimpleNamespace(tensors=tensors))
    assert controls._family_of_file(tmp_path / "net.safetensors").name == shape
    assert names_in_diffusers(list(keys), net.config) == {name: key for key, name in keys.items()}


def test_a_hub_id_is_downloaded_in_fp16_where_there_is_nothing_else(monkeypatch, tmp_path):
    random_control(tiny_pipeline("sd2").unet).save_pretrained(tmp_path / "fp16", variant="fp16")
    (tmp_path / "plain").mkdir()

    def download(name, revision, wanted):
        return tmp_path / ("fp16" if "*model.fp16.safetensors" in wanted else "plain")

    monkeypatch.setattr(controls, "download", download)
    facts = controls.find_control("someone/net")
    assert (facts.name, facts.family.name, facts.path) == ("someone/net", "sd2", tmp_path / "fp16")


def test_a_hub_id_that_cannot_be_had_is_one_sentence():
    with pytest.raises(ModelError, match=r"^someone/net: there is no such folder, it is not in the Hugging Face cache"):
        controls.find_control("someone/net")
    assert controls.find_cached_control("someone/net") is None

"""Every family on a CUDA device, in each precision and form of the base: `pytest -m gpu`."""

from typing import Any

import pytest
import torch
from every_family import shape
from run_settings import configure, settings

from sdlora import BaseSection, Engine, make_request, train
from sdlora.training.events import read_events

__all__ = ["configure", "settings", "shape"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_it_trains_and_generates_and_leaves_the_base_as_it_was(configure: Any, precision: str, quantize: str) -> None:
    config = configure(base__precision=precision, base__quantize=quantize, adapter__text_encoder=True)
    result = train(config)
    steps = [event for event in read_events(result.folder / "events.jsonl") if event["event"] == "step"]
    assert len(steps) >= 4  # fp16's loss scale may cost the first ones
    assert result.effect.noticeable
    engine = Engine(BaseSection(path=config.base.path, precision=precision, quantize=quantize))
    before = engine.weights_sha256()
    pictures = []
    for weight in (0.0, 1.0):
        request = make_request(prompt="a ball", steps=2, adapters=[{"path": str(result.adapter), "weight": weight}])
        ((picture, recipe),) = engine.generate(request)
        pictures.append(picture.tobytes())
        assert (recipe.precision, recipe.quantize) == (precision, quantize)
    assert pictures[0] != pictures[1]
    assert engine.weights_sha256() == before


def test_encoders_leave_the_device_before_the_unet_comes(tiny_folder: Any, shape: str) -> None:
    from sdlora import load_base

    base = load_base(BaseSection(path=str(tiny_folder(shape)), precision="fp32"), "cuda", unet=False)
    with_encoders = torch.cuda.memory_allocated()
    assert not any(parameter.is_cuda for parameter in base.unet.parameters())
    base.drop_encoders()
    assert torch.cuda.memory_allocated() < with_encoders / 2
    base.fetch_unet()
    assert all(parameter.is_cuda for parameter in base.unet.parameters())

"""Every family on a CUDA device, in each precision and form of the base: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from every_family import shape
from run_settings import configure, settings
from trained_kinds import KINDS

from sdlora import BaseSection, Engine, RunResult, TrainConfig, make_request, read_adapter, train
from sdlora.config import OPTIMIZERS
from sdlora.generation.denoising.noise import cuda_randn
from sdlora.training.events import read_events
from sdlora.training.loop import TrainingLoop

__all__ = ["configure", "settings", "shape"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def acts(config: TrainConfig, result: RunResult, prompt: str = "a ball") -> None:
    """A picture is another with what was trained, and the base is as it was."""
    base = config.base
    engine = Engine(BaseSection(path=base.path, precision=base.precision, quantize=base.quantize))
    before = engine.weights_sha256()
    pictures = []
    for weight in (0.0, 1.0):
        request = make_request(prompt=prompt, steps=2, adapters=[{"path": str(result.adapter), "weight": weight}])
        ((picture, recipe),) = engine.generate(request)
        pictures.append(picture.tobytes())
        assert (recipe.precision, recipe.quantize) == (base.precision, base.quantize)
    assert pictures[0] != pictures[1]
    assert engine.weights_sha256() == before


def test_noise_as_a_cuda_device_draws_it_is_the_devices_own() -> None:
    device = torch.Generator("cuda").manual_seed(1234567)
    for drawn in range(3):
        expected = torch.randn((1, 4, 64, 64), generator=device, device="cuda").cpu().flatten()
        found = torch.from_numpy(cuda_randn(1234567, drawn, expected.numel()))
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)


def steps_of(result: RunResult) -> list[int]:
    return [event["step"] for event in read_events(result.folder / "events.jsonl") if event["event"] == "step"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_it_trains_and_generates_and_leaves_the_base_as_it_was(configure: Any, precision: str, quantize: str) -> None:
    config = configure(base__precision=precision, base__quantize=quantize, adapter__text_encoder=True)
    result = train(config)
    assert len(steps_of(result)) >= 4  # fp16's loss scale may cost the first ones
    assert result.effect.noticeable
    acts(config, result)


def test_encoders_leave_the_device_before_the_unet_comes(tiny_folder: Any, shape: str) -> None:
    from sdlora import load_base

    base = load_base(BaseSection(path=str(tiny_folder(shape)), precision="fp32"), "cuda", unet=False)
    with_encoders = torch.cuda.memory_allocated()
    assert not any(parameter.is_cuda for parameter in base.unet.parameters())
    base.drop_encoders()
    assert torch.cuda.memory_allocated() < with_encoders / 2
    base.fetch_unet()
    assert all(parameter.is_cuda for parameter in base.unet.parameters())


QUANTIZED = [("locon", "nf4"), ("dora", "nf4"), ("loha", "int8"), ("lokr", "int8")]


@pytest.mark.parametrize(("kind", "quantize"), [*((kind, "none") for kind in KINDS), *QUANTIZED])
def test_every_kind_of_adapter_trains_beside_what_holds_it_back(configure: Any, kind: str, quantize: str) -> None:
    adapter = {"rank": 4, "alpha": 4.0, "text_encoder": True, "targets": ("attention", "resnet"), **KINDS[kind]}
    if kind == "full":
        del adapter["rank"], adapter["alpha"]
    config = configure(
        adapter=adapter,
        base__precision="bf16",
        base__quantize=quantize,
        data__class_prompt="a cat",
        data__prior__source="training",
        optimizer__learning_rate=1e-2,
    )
    result = train(config)
    assert steps_of(result) == [1, 2, 3, 4, 5, 6]
    assert result.effect.noticeable and result.effect.delta_share > 0
    acts(config, result)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("mode", ["alone", "first", "together"])
def test_new_words_train(configure: Any, settings: dict[str, Any], mode: str, precision: str) -> None:
    values: dict[str, Any] = {"tokens": {"train": mode, "learning_rate": 0.05}, "optimizer__warmup_steps": 0}
    if mode == "alone":
        del settings["adapter"], settings["optimizer"]["learning_rate"]
    else:
        values["adapter__text_encoder"] = True
    config = configure(base__precision=precision, training__steps=12, **values)
    result = train(config)
    assert result.effect.noticeable
    assert set(read_adapter(result.adapter).tokens) == {"zorb"}
    acts(config, result, "a zorb")


@pytest.mark.parametrize("mode", ["alone", "first"])
def test_a_step_without_any_gradient_is_none_for_fp16_either(
    configure: Any, settings: dict[str, Any], mode: str
) -> None:
    """Batches of one picture, half of them without the word: there is nothing to scale."""
    for number in (0, 2, 4):
        (Path(settings["data"]["folder"]) / f"{number}.txt").write_text("a wall", encoding="utf-8")
    if mode == "alone":
        del settings["adapter"], settings["optimizer"]["learning_rate"]
    tokens = {"train": mode, "learning_rate": 0.05}
    values = {"base__precision": "fp16", "optimizer__warmup_steps": 0, "validation__folder": ""}
    result = train(configure(tokens=tokens, training__batch_size=1, training__steps=24, **values))
    assert len(steps_of(result)) >= 12 and result.effect.noticeable


@pytest.mark.parametrize("shape", ["sd1"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_steps_on_the_device(configure: Any, kind: str) -> None:
    rate = 1.0 if kind == "prodigy" else 1e-2
    schedule = "constant" if kind == "schedule-free" else "cosine"
    optimizer = {"kind": kind, "learning_rate": rate, "warmup_steps": 0, "schedule": schedule}
    # Rank 160 makes matrices of over 4,096 weights, which the 8-bit kinds really keep in 8 bits.
    result = train(configure(adapter__rank=160, training__steps=12, optimizer=optimizer))
    assert len(steps_of(result)) == 12 and result.effect.delta_share > 0


def test_what_is_saved_is_the_average_and_a_resumed_run_goes_on_with_it(configure: Any) -> None:
    values = {"training__ema_decay": 0.5, "training__checkpoint_every_steps": 3, "base__precision": "fp32"}
    first = train(configure(**values))
    saved = read_adapter(first.adapter)
    (first.folder / "checkpoints" / "state-000006.pt").unlink(missing_ok=True)
    again = read_adapter(train(configure(**values, training__resume=True)).adapter)
    for path, layer in saved.layers.items():
        for one, other in zip(layer.tensors(), again.layers[path].tensors(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", ["sd1"])
def test_where_memory_runs_out_the_batch_is_computed_in_parts(
    configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"base__precision": "fp32", "training__batch_size": 3}
    whole = read_adapter(train(configure(**values, output__folder=str(tmp_path / "whole"))).adapter)
    torch.cuda.empty_cache()
    half = torch.cuda.mem_get_info()[0] // 2
    backward = TrainingLoop._backward

    def hungry(self: TrainingLoop, part: Any) -> float:
        """As much memory as there is suffices for one picture, not for two and their weights."""
        room = torch.empty(len(part) * (half + 2**20), dtype=torch.uint8, device="cuda")
        loss = backward(self, part)
        del room
        return loss

    monkeypatch.setattr(TrainingLoop, "_backward", hungry)
    result = train(configure(**values))
    assert "1 picture is computed at once from now on" in capsys.readouterr().out
    assert steps_of(result) == [1, 2, 3, 4, 5, 6]
    parted = read_adapter(result.adapter)
    for path, layer in whole.layers.items():
        for one, other in zip(layer.tensors(), parted.layers[path].tensors(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("shape", ["sd2"])  # the family that predicts v
def test_a_schedule_that_ends_in_pure_noise_trains_and_generates(configure: Any) -> None:
    config = configure(objective__zero_terminal_snr=True, base__precision="bf16")
    result = train(config)
    assert result.effect.noticeable
    acts(config, result)

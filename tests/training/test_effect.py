"""What is said of an adapter at the end of a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdlora.adapters.layers import AdapterLayer
from sdlora.adapters.live import base_weight
from sdlora.adapters.tokens import new_tokens
from sdlora.adapters.trainable import new_adapter
from sdlora.config import AdapterSection, BaseSection, TokensSection, TrainConfig
from sdlora.families.base import LoadedBase, PictureSize
from sdlora.families.registry import load_base
from sdlora.training.effect import Effect, measure_effect
from sdlora.training.trainee import Trainee

TARGETS = ("attn2.to_k", "resnets.*.conv1")


def example(caption: str) -> Any:
    size = PictureSize((64, 64), (0, 0), (64, 64))
    return SimpleNamespace(bucket=(64, 64), size=size, sample=SimpleNamespace(caption=caption))


def moved(base: LoadedBase, **options: Any) -> Trainee:
    """An adapter all of whose weights are moved at random."""
    adapter = new_adapter(base, "it", AdapterSection(rank=4, alpha=2.0, targets=TARGETS, **options), 0)
    trainee = Trainee(base, TrainConfig(), adapter, None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trainee.weights:
            noise = torch.randn(weight.parameter.shape, generator=generator)
            weight.parameter.add_(0.05 * noise.to(weight.parameter.device))
    return trainee


def difference(trainee: Trainee, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """W' - W and W of a layer in float64, of LoRA with scale 1/2, or of DoRA."""
    roles = {
        w.role: w.parameter.detach().double().flatten(1)
        for w in trainee.weights
        if w.path == path and w.role != "magnitude"
    }
    weight = base_weight(trainee.base, path).double().flatten(1)
    delta = 0.5 * roles["up"] @ roles["down"]
    for magnitude in (
        w.parameter.detach().double().flatten() for w in trainee.weights if w.name == f"{path}:magnitude"
    ):
        changed = weight + delta
        delta = (magnitude / changed.norm(dim=1))[:, None] * changed - weight
    return delta, weight


@pytest.mark.parametrize("dora", [False, True])
def test_the_share_is_the_changes_norm_over_the_weights(tiny_base, dora):
    trainee = moved(tiny_base(), dora=dora)
    pairs = [difference(trainee, path) for path in dict.fromkeys(weight.path for weight in trainee.weights)]
    expected = (sum(delta.norm() ** 2 for delta, _ in pairs) / sum(weight.norm() ** 2 for _, weight in pairs)) ** 0.5
    effect = measure_effect(trainee, [example("a ball")], {})
    assert effect.delta_share == pytest.approx(float(expected), rel=1e-4) and expected > 0.01
    assert effect.noticeable and not effect.words_alone


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"kind": "loha"}, {"kind": "lokr"}, {"kind": "full"}])
def test_weights_are_measured_where_they_are(tiny_base, options, monkeypatch):
    """A copy on the CPU could not be added to the weight of a base on another device."""
    trainee = moved(tiny_base(), **options)
    seen = set()
    for kind in {type(part.form(torch.Tensor.detach)) for part in trainee.adapter.parts}:
        update_of = kind.update_of

        def watch(self: AdapterLayer, weight: torch.Tensor, update_of: Any = update_of) -> torch.Tensor:
            seen.update(tensor.data_ptr() for tensor in self.tensors())
            return update_of(self, weight)

        monkeypatch.setattr(kind, "update_of", watch)
    measure_effect(trainee, [example("a ball")], {})
    assert {weight.parameter.data_ptr() for weight in trainee.weights} == seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"kind": "loha"}, {"kind": "lokr"}, {"kind": "full"}])
def test_a_base_on_a_gpu_gives_the_numbers_of_the_cpu(tiny_folder, shape, options):
    section = BaseSection(path=str(tiny_folder(shape)), precision="fp32")
    on_cpu, on_gpu = (
        measure_effect(moved(load_base(section, device), **options), [example("a ball")], {})
        for device in ("cpu", "cuda")
    )
    assert on_gpu.delta_share == pytest.approx(on_cpu.delta_share, rel=1e-3)
    assert on_gpu.output_change == pytest.approx(on_cpu.output_change, rel=1e-2)


def test_new_words_are_measured_on_captions_that_hold_one(tiny_base):
    base = tiny_base()
    words = new_tokens(base, {"zorb": ""}, TokensSection(train="alone", vectors=1, start="random"), 0)
    others = [example("a wall")] * 5
    nothing = measure_effect(Trainee(base, TrainConfig(), None, words), others, {})
    assert nothing.output_change == 0 and nothing.words_alone
    assert (
        measure_effect(Trainee(base, TrainConfig(), None, words), [*others, example("a zorb")], {}).output_change > 1e-4
    )


@pytest.mark.parametrize(
    ("effect", "sentence"),
    [
        (
            Effect(0.0, 1e-5, True),
            "THESE WORDS DO NOTHING: the UNet's output changes by 0.001% only; train longer or raise tokens.learning_rate",
        ),
        (Effect(0.5, 0.02), "delta-W is 50.00% of the weights it adds to, the UNet's output changes by 2.0%"),
        (Effect(0.0, 0.02, True), "the UNet's output changes by 2.0%"),
    ],
)
def test_the_sentence_says_what_to_raise(effect, sentence):
    assert effect.sentence() == sentence

"""Gradients of every kind of adapter."""

import pytest
import torch
from trained_kinds import EVERYWHERE, KINDS, NAME, SIZE, section, trained, unet_output

from sdlora.adapters.dora_norms import _Float32Norms
from sdlora.adapters.trainable import new_adapter
from sdlora.families.base import Conditioning

STEP = 1e-5


def loss_of(base) -> torch.Tensor:
    """A scalar of the UNet's output on text that the text encoders have read, in the base's precision."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(base.dtype)
    conditioning: Conditioning = base.family.encode_prompts(base, ["a red ball", "a hill"])
    output = base.family.predict(base, latents, torch.tensor([10, 700]), conditioning, [SIZE] * 2)
    goal = torch.randn(output.shape, generator=generator).to(base.dtype)
    return (output - goal).square().mean()


def in_float64(base) -> None:
    base.dtype = torch.float64
    base.unet.double()
    for encoder in base.text_encoders.values():
        encoder.double()


@pytest.mark.parametrize(("shape", "kind"), EVERYWHERE)
def test_gradients_reach_what_trains_and_agree_with_finite_differences(tiny_base, monkeypatch, kind, shape):
    """For each role apart, along a random direction, in float64: (L(w + h d) - L(w - h d)) / 2h = gradient . d."""
    base = tiny_base()
    adapter = trained(base, kind)
    in_float64(base)
    for weight in adapter.weights:
        weight.parameter.data = weight.parameter.data.double()
    if kind == "dora":
        _freeze_norms(monkeypatch, base)
    loss_of(base).backward()
    _check_reach(base, adapter)
    generator = torch.Generator().manual_seed(1)
    for role in dict.fromkeys(weight.role for weight in adapter.weights):
        parameters = [weight.parameter for weight in adapter.weights if weight.role == role]
        directions = [torch.randn(p.shape, generator=generator).double() for p in parameters]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        expected = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        losses = []
        with torch.no_grad():
            for factor in (STEP, -2 * STEP):
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += factor * direction
                losses.append(float(loss_of(base)))
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += STEP * direction
        measured = (losses[0] - losses[1]) / (2 * STEP)
        assert measured == pytest.approx(expected, rel=1e-4, abs=1e-8), role
        assert abs(expected) > 1e-6, role


def _check_reach(base, adapter) -> None:
    """Gradients are there for every trained weight, and nothing else in the model has any."""
    for weight in adapter.weights:
        if any(weight.path.startswith(path) for path in _unused(base)):
            assert weight.parameter.grad is None, weight.name
        else:
            assert weight.parameter.grad is not None and weight.parameter.grad.abs().max() > 0, weight.name
    own = {id(weight.parameter) for weight in adapter.weights}
    for component, module in base.components():
        strays = [name for name, p in module.named_parameters() if p.grad is not None and id(p) not in own]
        assert not strays, (component, strays)


def _unused(base) -> list[str]:
    """SDXL reads the last layer but one of its first text encoder, so that the last has no say."""
    if base.family.name != "sdxl":
        return []
    return [
        f"text_encoder.text_model.encoder.layers.{base.text_encoders['text_encoder'].config.num_hidden_layers - 1}."
    ]


def _freeze_norms(monkeypatch, base) -> None:
    """DoRA takes its norms for constants (Liu et al. 2024, section 4.3), so they must not move with the weights."""
    kept = {}
    real = _Float32Norms.get_weight_norm

    def frozen(self, *arguments, **options):
        if self not in kept:
            kept[self] = real(self, *arguments, **options)
        return kept[self]

    monkeypatch.setattr(_Float32Norms, "get_weight_norm", frozen)
    with torch.no_grad():
        loss_of(base)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "full", "pissa"])
@pytest.mark.parametrize("shape", ["sd1"])
def test_checkpointed_gradients_are_the_same(tiny_base, kind):
    """Dropout included: what is computed again draws the same numbers."""

    def gradients(checkpointing):
        base = tiny_base()
        dropout = {"rank_dropout": 0.3} if kind in ("lora", "loha", "lokr") else {}
        adapter = trained(base, kind, text_encoder=False, **dropout)
        if checkpointing:
            base.unet.enable_gradient_checkpointing()
        base.unet.train()
        torch.manual_seed(0)
        unet_output(base).square().mean().backward()
        return [weight.parameter.grad for weight in adapter.weights]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["sd1"])
def test_an_optimizer_step_changes_the_adapter_and_not_the_base(tiny_base, kind):
    base = tiny_base()
    digest = base.weights_sha256()
    adapter = new_adapter(base, NAME, section(kind), seed=7)
    optimizer = torch.optim.AdamW([weight.parameter for weight in adapter.weights], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = loss_of(base)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    assert base.weights_sha256() == digest
    assert all(tensor.abs().max() > 0 for layer in adapter.layers().values() for tensor in layer.tensors())

"""Every kind of adapter that can be trained, and a model's outputs with one."""

import torch

from sdlora.adapters.trainable import TrainedAdapter, new_adapter
from sdlora.config import AdapterSection
from sdlora.families.base import Conditioning, LoadedBase, PictureSize, autocast

NAME = "trained"
TARGETS = ("attn1.to_q", "attn2.to_v", "attentions.*.proj_in", "resnets.*.conv1", "resnets.*.time_emb_proj")
KINDS = {
    "lora": {},
    "locon": {"conv_rank": 2, "conv_alpha": 3.0},
    "rank-stabilized": {"rank_stabilized": True},
    "dora": {"dora": True},
    "pissa": {"start": "pissa"},
    "olora": {"start": "olora"},
    "loha": {"kind": "loha"},
    "lokr": {"kind": "lokr"},
    "lokr-whole": {"kind": "lokr", "rank": 40, "lokr_factor": 2},
    "full": {"kind": "full"},
}
EVERYWHERE = [("sd1", kind) for kind in KINDS] + [(s, k) for s in ("sd2", "sdxl") for k in ("locon", "dora", "lokr")]
"""(family, kind) pairs: every kind in one family, and in the others those that look at the layers' shapes most."""
SIZE = PictureSize((64, 64), (0, 0), (64, 64))


def section(kind: str = "lora", **settings) -> AdapterSection:
    """A small adapter of a kind of `KINDS`, on linear layers and convolutions of the UNet and in the text encoders."""
    usual = {
        "rank": 4,
        "alpha": 2.0,
        "targets": TARGETS,
        "text_encoder": True,
        "text_encoder_targets": ("q_proj", "fc1"),
    }
    return AdapterSection(**(usual | KINDS[kind] | settings))


def changed(adapter: TrainedAdapter, seed: int = 0, size: float = 0.05) -> TrainedAdapter:
    """The adapter with random numbers added to all its weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter.weights:
            noise = torch.randn(weight.parameter.shape, generator=generator) * size
            weight.parameter.add_(noise.to(weight.parameter.device, weight.parameter.dtype))
    return adapter


def trained(base: LoadedBase, kind: str, seed: int = 7, **settings) -> TrainedAdapter:
    """An adapter of that kind in `base`, some way from its start."""
    return changed(new_adapter(base, NAME, section(kind, **settings), seed))


def unet_output(base: LoadedBase) -> torch.Tensor:
    """The UNet's output for fixed random inputs, [2,4,8,8], with gradients where they are wanted."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(base.dtype)
    states = torch.randn(2, 77, base.unet.config.cross_attention_dim, generator=generator).to(base.dtype)
    pooled = torch.randn(2, 32, generator=generator).to(base.dtype)
    with autocast(base):
        return base.family.predict(base, latents, torch.tensor([10, 700]), Conditioning(states, pooled), [SIZE] * 2)


def outputs(base: LoadedBase) -> tuple[torch.Tensor, torch.Tensor]:
    """The UNet's output and the text encoders', without gradients."""
    with torch.no_grad():
        with autocast(base):
            states = base.family.encode_prompts(base, ["a red ball", ""]).states
        return unet_output(base), states

"""What a trained adapter does: measured at the end of a run, so that one that does nothing is noticed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sdlora.adapters.inject import adapters_off, base_weight_norms, extract_adapter
from sdlora.data.examples import CachedExample
from sdlora.families.base import Conditioning, LoadedBase, autocast
from sdlora.training.objective import EncodedTexts

_NOTICEABLE = 1e-3


@dataclass(frozen=True)
class Effect:
    """`delta_share`: norm of delta-W over the norm of the weights it is added to, all layers together.

    `output_change`: root mean square difference of the UNet's output with and without the adapter, over
    the output's own root mean square, on the run's first pictures.
    """

    delta_share: float
    output_change: float

    @property
    def noticeable(self) -> bool:
        """Whether a picture would differ visibly at all."""
        return self.output_change >= _NOTICEABLE

    def sentence(self) -> str:
        """Return one line for the end of a run."""
        sizes = f"delta-W is {self.delta_share:.2%} of the weights it adds to, the UNet's output changes by"
        if self.noticeable:
            return f"{sizes} {self.output_change:.1%}"
        return (
            f"THIS ADAPTER DOES NOTHING: {sizes} {self.output_change:.3%} only; "
            "train longer or raise optimizer.learning_rate (1e-4 to 1e-3 is usual for LoRA)"
        )


@torch.no_grad()
def measure_effect(base: LoadedBase, name: str, examples: Sequence[CachedExample], texts: EncodedTexts) -> Effect:
    """Return the effect of the live adapter `name`, on at most four of `examples`."""
    layers = extract_adapter(base, name)
    weights = base_weight_norms(base, list(layers))
    delta = math.sqrt(sum(layer.delta_norm() ** 2 for layer in layers.values()))
    share = delta / math.sqrt(sum(norm**2 for norm in weights.values()))

    changed = size = 0.0
    generator = torch.Generator().manual_seed(0)
    for example in examples[:4]:
        width, height = example.bucket
        noisy = torch.randn((1, 4, height // 8, width // 8), generator=generator).to(base.device, base.dtype)
        timestep = torch.tensor([len(base.alphas_cumprod) // 2], device=base.device)

        def predict(
            example: CachedExample = example, noisy: torch.Tensor = noisy, timestep: torch.Tensor = timestep
        ) -> torch.Tensor:
            with autocast(base):
                text = example.sample.caption
                conditioning = texts[text] if texts else base.family.encode_prompts(base, [text])
                encoded: Conditioning = conditioning.to(base.device, base.dtype)
                return base.family.predict(base, noisy, timestep, encoded, [example.size]).float()

        trained = predict()
        with adapters_off(base):
            bare = predict()
        changed += float((trained - bare).square().sum())
        size += float(bare.square().sum())
    return Effect(share, math.sqrt(changed / size))

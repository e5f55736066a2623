"""What a trained adapter does: measured at the end of a run, so that one that does nothing is noticed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from sdlora.adapters.inject import adapters_off
from sdlora.adapters.live import base_weight
from sdlora.data.examples import CachedExample
from sdlora.families.base import Conditioning, autocast
from sdlora.families.words import fingerprint
from sdlora.training.objective import EncodedTexts
from sdlora.training.trainee import Trainee

_NOTICEABLE = 1e-3
_PICTURES = 4


@dataclass(frozen=True)
class Effect:
    """`delta_share`: norm of delta-W over the norm of the weights it is added to, all layers together; 0 without layers.

    `output_change`: root mean square difference of the UNet's output with and without what was trained, over
    the output's own root mean square, on the run's first pictures. `words_alone`: no adapter was trained.
    """

    delta_share: float
    output_change: float
    words_alone: bool = False

    @property
    def noticeable(self) -> bool:
        """Whether a picture would differ visibly at all."""
        return self.output_change >= _NOTICEABLE

    def sentence(self) -> str:
        """Return one line for the end of a run."""
        change = f"the UNet's output changes by {self.output_change:{'.1%' if self.noticeable else '.3%'}}"
        if self.delta_share:
            change = f"delta-W is {self.delta_share:.2%} of the weights it adds to, {change}"
        if self.noticeable:
            return change
        if self.words_alone:
            return f"THESE WORDS DO NOTHING: {change} only; train longer or raise tokens.learning_rate"
        return (
            f"THIS ADAPTER DOES NOTHING: {change} only; "
            "train longer or raise optimizer.learning_rate (1e-4 to 1e-3 is usual for LoRA)"
        )


@torch.no_grad()
def measure_effect(trainee: Trainee, examples: Sequence[CachedExample], texts: EncodedTexts) -> Effect:
    """Return the effect of what is trained, on at most four of `examples`, of those with a new word if there are any."""
    base = trainee.base
    delta = weights = 0.0
    for part in trainee.adapter.parts if trainee.adapter else ():
        # On the weight's device, and in float32, the most that all devices have.
        weight = base_weight(base, part.path)
        delta += float(part.form(torch.Tensor.detach).update_of(weight).norm()) ** 2
        weights += float(weight.norm()) ** 2
    share = math.sqrt(delta / weights) if weights else 0.0

    changed = size = 0.0
    generator = torch.Generator().manual_seed(0)
    with_words = (example for example in examples if fingerprint(base, example.sample.caption))
    for example in list(islice(with_words, _PICTURES)) or examples[:_PICTURES]:
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
    return Effect(share, math.sqrt(changed / size), words_alone=trainee.adapter is None)

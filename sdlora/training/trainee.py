"""What a run trains: an adapter, new words, or both, live in the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sdlora.adapters.file import AdapterFile
from sdlora.adapters.metadata import trained_metadata
from sdlora.adapters.tokens import TrainedTokens, new_tokens, start_words
from sdlora.adapters.trainable import TrainedAdapter, new_adapter
from sdlora.adapters.weights import TrainedWeight
from sdlora.config import TrainConfig
from sdlora.data.source import fill_trigger
from sdlora.diffusion import seed_from
from sdlora.errors import ModelError
from sdlora.families.base import LoadedBase

ADAPTER = "trained"
"""Name of the adapter in the live model while it is trained."""


@dataclass(frozen=True)
class Trainee:
    """The trained parts of a base; either may be missing, not both."""

    base: LoadedBase
    config: TrainConfig
    adapter: TrainedAdapter | None
    words: TrainedTokens | None

    @property
    def weights(self) -> tuple[TrainedWeight, ...]:
        """Every trained weight, the adapter's first."""
        return (self.adapter.weights if self.adapter else ()) + (self.words.weights if self.words else ())

    def after_step(self) -> None:
        """The bounds that an optimizer step may have broken hold again."""
        if self.adapter and (largest := self.config.adapter.max_norm):
            self.adapter.limit_norms(largest)
        if self.words:
            self.words.keep_norms()

    def file(self, metadata: Mapping[str, str]) -> AdapterFile:
        """Return what a file holds of it, as it is now; its header says that beside `metadata`, which is of the run."""
        layers = self.adapter.layers() if self.adapter else {}
        words = self.words.words() if self.words else {}
        metadata = {**metadata, **trained_metadata(self.config, self.base, layers)}
        return AdapterFile(layers, self.base.family.name, metadata, words)

    def copy_weights(self) -> dict[str, torch.Tensor]:
        """Return every trained weight by its name, on the CPU."""
        return {weight.name: weight.parameter.detach().cpu().clone() for weight in self.weights}

    def restore_weights(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Every trained weight is the saved one. Raises ModelError when they are not the same weights."""
        shapes = {weight.name: weight.parameter.shape for weight in self.weights}
        if shapes != {name: tensor.shape for name, tensor in saved.items()}:
            raise ModelError(
                f"the saved adapter ({len(saved)} weights) and the running one ({len(shapes)} weights) "
                "differ in their layers, ranks or kinds; they must match"
            )
        with torch.no_grad():
            for weight in self.weights:
                weight.parameter.copy_(saved[weight.name])


def new_trainee(base: LoadedBase, config: TrainConfig) -> Trainee:
    """Return what `config` says is trained, freshly made and in place; at first it changes nothing but new words."""
    adapter = words = None
    if config.tokens.train != "none":
        words = new_tokens(base, triggers(config), config.tokens, _words_seed(config))
    if config.tokens.train != "alone":
        adapter = new_adapter(base, ADAPTER, config.adapter, seed_from(config.training.seed, "adapter"))
    return Trainee(base, config, adapter, words)


def first_words(base: LoadedBase, config: TrainConfig) -> dict[str, dict[str, torch.Tensor]]:
    """Return the new words of a run and the vectors that they start as. Raises ConfigError for what makes no words."""
    if config.tokens.train == "none":
        return {}
    return start_words(base, triggers(config), config.tokens, _words_seed(config))


def triggers(config: TrainConfig) -> dict[str, str]:
    """Return {trigger: class prompt} of all concepts."""
    concepts = config.data.concepts or (config.data,)
    return {c.trigger: fill_trigger(c.class_prompt, c.trigger) for c in concepts if c.trigger.strip()}


def _words_seed(config: TrainConfig) -> int:
    return seed_from(config.training.seed, "tokens")

"""`TrainedWeight`: one tensor that is being trained, and what it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

_ZERO_IS_A_CHANGE = ("vectors", "magnitude")


@dataclass(frozen=True)
class TrainedWeight:
    """A trained parameter, always float32.

    `path` is the layer's path as files have it, component first ("unet.down_blocks.0...to_q",
    "text_encoder.text_model.encoder..."); of a new word's vectors "tokens.text_encoder.zorblin". `role` says
    which part of it: "down" and "up" of LoRA, "magnitude" of DoRA, "dense", "vectors" of a word, or the
    parameter's own name ("hada_w1_a", "lokr_w2_b"). `started`: it began at values that change nothing, as the
    factors of PiSSA and OLoRA do, whose zero is a change.
    """

    path: str
    role: str
    parameter: nn.Parameter
    started: bool = False

    @property
    def name(self) -> str:
        """What no other trained weight is called."""
        return f"{self.path}:{self.role}"

    @property
    def component(self) -> str:
        """The part of the model that it belongs to: "unet", "text_encoder", "text_encoder_2" or "tokens"."""
        return self.path.partition(".")[0]

    @property
    def decays(self) -> bool:
        """Whether weight decay, which pulls towards zero, pulls towards the base."""
        return not self.started and self.role not in _ZERO_IS_A_CHANGE

"""One layer of an adapter that is being trained, one class a kind: what trains in it, and what files hold of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sdlora.adapters.layers import AdapterLayer, DenseLayer, DoraLayer, LohaLayer, LokrLayer, LoraLayer
from sdlora.adapters.starts import DownWithStart, UpLessStart
from sdlora.adapters.weights import TrainedWeight

Take = Callable[[torch.Tensor], torch.Tensor]


class TrainedLayer(ABC):
    """One layer of it. `path` is the layer's as files have it; `weights` are float32 and want gradients."""

    def __init__(self, path: str, parameters: dict[str, nn.Parameter], started: bool = False) -> None:
        self.path = path
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self.weights = tuple(TrainedWeight(path, role, parameter, started) for role, parameter in parameters.items())

    @abstractmethod
    def form(self, take: Take) -> AdapterLayer:
        """Return it as files hold it, made of what `take` makes of each of its tensors."""


class TrainedLora(TrainedLayer):
    """LoRA in a layer of peft's, from whatever start, or with magnitudes DoRA."""

    def __init__(self, path: str, layer: Any, name: str) -> None:
        self._down, self._up = layer.lora_A[name], layer.lora_B[name]
        self._alpha = float(layer.lora_alpha[name])
        self._magnitude = layer.lora_magnitude_vector[name].weight if layer.use_dora[name] else None
        parameters = {"down": self._down.weight, "up": self._up.weight}
        if self._magnitude is not None:
            parameters["magnitude"] = self._magnitude
        super().__init__(path, parameters, started=isinstance(self._down, DownWithStart))

    def form(self, take: Take) -> AdapterLayer:
        down, up, alpha = take(self._down.weight), take(self._up.weight), self._alpha
        if isinstance(self._down, DownWithStart) and isinstance(self._up, UpLessStart):
            # up @ down - up_0 @ down_0 as one product of twice the rank, which alpha / rank has to make up for.
            down = torch.cat((down, take(self._down.start.weight)), 0)
            up = torch.cat((up, -take(self._up.start.weight)), 1)
            alpha = 2 * alpha
        lora = LoraLayer(down, up, alpha)
        return lora if self._magnitude is None else DoraLayer(lora, take(self._magnitude).flatten())


class TrainedLoha(TrainedLayer):
    """LoHa in a layer of peft's."""

    def __init__(self, path: str, layer: Any, name: str) -> None:
        self._alpha = float(layer.alpha[name])
        super().__init__(path, _named(layer, name, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")))

    def form(self, take: Take) -> AdapterLayer:
        w1_a, w1_b, w2_a, w2_b = (take(weight.parameter) for weight in self.weights)
        return LohaLayer(w1_a, w1_b, w2_a, w2_b, self._alpha)


class TrainedLokr(TrainedLayer):
    """LoKr in a layer of peft's, its left matrix whole, the right one whole where the rank reaches that far."""

    def __init__(self, path: str, layer: Any, name: str) -> None:
        if name in layer.lokr_w2:
            # Readers multiply two whole matrices with 1, whatever alpha says.
            layer.alpha[name], layer.scaling[name] = layer.r[name], 1.0
        self._alpha = float(layer.alpha[name])
        super().__init__(path, _named(layer, name, ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")))

    def form(self, take: Take) -> AdapterLayer:
        first, *second = (take(weight.parameter) for weight in self.weights)
        return LokrLayer(first, second[0] if len(second) == 1 else (second[0], second[1]), self._alpha)


class TrainedDense(TrainedLayer):
    """The whole difference of a layer's weight."""

    def __init__(self, path: str, delta: nn.Parameter) -> None:
        super().__init__(path, {"dense": delta})

    def form(self, take: Take) -> AdapterLayer:
        return DenseLayer(take(self.weights[0].parameter))


def _named(layer: Any, name: str, kinds: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Return those of the parameters of a peft layer's adapter that it has."""
    return {kind: getattr(layer, kind)[name] for kind in kinds if name in getattr(layer, kind)}

"""Random layers of every kind of adapter, for a weight of any shape."""

from __future__ import annotations

import math

import torch

from sdlora.adapters.layers import AdapterLayer, DenseLayer, DoraLayer, LohaLayer, LokrLayer, LoraLayer

RANK, ALPHA = 3, 2.0
LINEAR = ("lora", "loha", "lokr", "lokr pair", "lokr pairs", "dense", "dora", "dora by column", "dora of loha")
TUCKER = ("tucker", "loha tucker", "lokr tucker")
KINDS = LINEAR + TUCKER
EVERYWHERE = [("sd1", kind) for kind in KINDS] + [
    (shape, kind) for shape in ("sd2", "sdxl") for kind in ("lora", "lokr pairs", "dora", "loha tucker")
]
"""(family, kind) pairs: every kind in one family, and in the others those that look at the layers' shapes most."""


def random_layer(kind: str, shape: tuple[int, ...], seed: int = 0) -> AdapterLayer:
    """Return a layer of `kind` for a weight [out,in] or [out,in,kh,kw], its update about as large as a weight's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * 0.25

    out, inside, *kernel = shape
    ones = [1 for _ in kernel]
    flat = inside * math.prod(kernel)
    left_out, left_in = _divisor(out), _divisor(inside)
    right = (out // left_out, inside // left_in)

    def make() -> AdapterLayer:
        match kind:
            case "lora":
                return LoraLayer(draw(RANK, inside, *kernel), draw(out, RANK, *ones), ALPHA)
            case "tucker":
                down, up = draw(RANK, inside, *ones), draw(out, RANK, *ones)
                return LoraLayer(down, up, ALPHA, draw(RANK, RANK, *kernel))
            case "loha" | "dora of loha":
                return LohaLayer(draw(out, RANK), draw(RANK, flat), draw(out, RANK), draw(RANK, flat), ALPHA)
            case "loha tucker":
                factors = draw(RANK, out), draw(RANK, inside), draw(RANK, out), draw(RANK, inside)
                return LohaLayer(*factors, ALPHA, draw(RANK, RANK, *kernel), draw(RANK, RANK, *kernel))
            case "lokr":
                return LokrLayer(draw(left_out, left_in), draw(*right, *kernel), ALPHA)
            case "lokr pair":
                pair = draw(right[0], RANK), draw(RANK, right[1] * math.prod(kernel))
                return LokrLayer(draw(left_out, left_in), pair, ALPHA)
            case "lokr pairs":
                left = draw(left_out, RANK), draw(RANK, left_in)
                return LokrLayer(left, (draw(right[0], RANK), draw(RANK, right[1] * math.prod(kernel))), ALPHA)
            case "lokr tucker":
                pair = draw(RANK, right[0]), draw(RANK, right[1])
                return LokrLayer(draw(left_out, left_in), pair, ALPHA, draw(RANK, RANK, *kernel))
            case "dense":
                return DenseLayer(draw(*shape))
            case "dora":
                return LoraLayer(draw(RANK, inside, *kernel), draw(out, RANK, *ones), ALPHA)
            case "dora by column":
                return LoraLayer(draw(RANK, inside, *kernel), draw(out, RANK, *ones), ALPHA)
        raise ValueError(kind)

    layer = make()
    if not kind.startswith("dora"):
        return layer
    magnitude = draw(1, inside, *ones) if kind == "dora by column" else draw(out, 1, *ones)
    return DoraLayer(layer, magnitude.abs() + 0.5)


def _divisor(number: int) -> int:
    return next((divisor for divisor in (4, 2, 3, 5, 7) if number % divisor == 0), 1)

"""Weighted prompts of any length into conditioning: chunks of 75 tokens, each encoded by itself, one after the other.

As AUTOMATIC1111 does it, whose weights multiply what comes out of the text encoder; or as ComfyUI does, where they move
it away from what an empty prompt gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sdlora.errors import ConfigError
from sdlora.families.base import Emphasis, LoadedBase, PromptStyle, Segments
from sdlora.families.traits import BREAK_SEGMENT
from sdlora.families.words import put_in, spelled, token_limit

_COMMA = ",</w>"
_SMALLEST_MEAN = 1e-5
"""Relative to the root of the mean square."""
_BACKTRACK = 20
"""Tokens after the last comma that go on to the next chunk, so that what they describe is not torn apart."""


NOTHING: Segments = (("", 1.0),)


@dataclass
class _Chunk:
    """Tokens between start and end: the id, which row of the new words' vectors it stands for or -1, its weight."""

    ids: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: Sequence[int], places: Sequence[int], weight: float) -> None:
        """More tokens of one weight stand at its end."""
        self.ids += ids
        self.places += places
        self.weights += [weight] * len(ids)

    def cut(self, length: int) -> _Chunk:
        """Return what stands behind `length` tokens, which are left."""
        rest = _Chunk(self.ids[length:], self.places[length:], self.weights[length:])
        del self.ids[length:], self.places[length:], self.weights[length:]
        return rest


def encode_chunks(
    base: LoadedBase,
    encoder: str,
    prompts: Sequence[Segments],
    length: int,
    style: PromptStyle,
    *,
    layer: int,
    normed: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a text encoder's states [B, 77 * n, D] for the prompts, and their pooled embedding where it has one, [B, P].

    n is `length`, their `chunk_count`; shorter ones have empty chunks behind them. `layer` counts from the
    last, which is 1; where `normed`, its states go through the final norm. The pooled embedding is the first chunk's,
    and weights do not touch it. Raises ConfigError for a layer that the encoder does not have.
    """
    chunked = [list(_chunks(base, encoder, prompt)) for prompt in prompts]
    rows = [chunk for chunks in chunked for chunk in (*chunks, *(_Chunk() for _ in range(length - len(chunks))))]
    states, pooled = _encode(base, encoder, rows, layer, normed)
    if any(weight != 1 for chunk in rows for weight in chunk.weights):
        empty = _encode(base, encoder, [_Chunk()], layer, normed)[0] if style.emphasis == "comfy" else None
        states = _weighted(states, _weights(base, encoder, rows, states.device), style.emphasis, empty)
    width = states.shape[-1]
    return states.reshape(len(prompts), -1, width), None if pooled is None else pooled[::length]


def chunk_count(base: LoadedBase, prompts: Sequence[Segments | None]) -> int:
    """Return in how many chunks the longest of the prompts is encoded by every text encoder.

    One may split a text into more tokens than the other.
    """
    return max(len(list(_chunks(base, name, prompt or NOTHING))) for name in base.text_encoders for prompt in prompts)


def _chunks(base: LoadedBase, encoder: str, prompt: Segments) -> Iterator[_Chunk]:
    """Yield the prompt's chunks, at least one, each as many tokens long as fit between start and end.

    Where a chunk is full shortly after a comma, what follows the comma goes on to the next; a new word is never torn
    apart where it fits into one.
    """
    room = token_limit(base, encoder) - 2
    tokenizer = base.tokenizers[encoder]
    comma = tokenizer.convert_tokens_to_ids(_COMMA)
    comma = None if comma == tokenizer.unk_token_id else comma
    chunk, last_comma, any_yet = _Chunk(), -1, False
    for text, weight in prompt:
        if (text, weight) == BREAK_SEGMENT:
            yield chunk
            chunk, last_comma, any_yet = _Chunk(), -1, True
            continue
        for ids, places in spelled(base, encoder, text):
            is_comma = ids == [comma] and places == [-1]
            if is_comma:
                last_comma = len(chunk)
            elif len(chunk) == room and last_comma != -1 and len(chunk) - last_comma <= _BACKTRACK:
                rest = chunk.cut(last_comma + 1)
                yield chunk
                chunk, last_comma, any_yet = rest, -1, True
            if len(chunk) == room or (len(chunk) + len(ids) > room and len(ids) <= room):
                yield chunk
                chunk, last_comma, any_yet = _Chunk(), -1, True
            chunk.add(ids, places, weight)
            while len(chunk) > room:  # a word of more vectors than fit anywhere
                rest = chunk.cut(room)
                yield chunk
                chunk, last_comma, any_yet = rest, -1, True
    if len(chunk) or not any_yet:
        yield chunk


def _encode(
    base: LoadedBase, encoder: str, rows: Sequence[_Chunk], layer: int, normed: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    module, tokenizer, limit = base.text_encoders[encoder], base.tokenizers[encoder], token_limit(base, encoder)
    ids = torch.full((len(rows), limit), tokenizer.pad_token_id)
    places = torch.full((len(rows), limit), -1)
    for number, chunk in enumerate(rows):
        whole = [tokenizer.bos_token_id, *chunk.ids, tokenizer.eos_token_id]
        ids[number, : len(whole)] = torch.tensor(whole)
        places[number, 1 : len(chunk) + 1] = torch.tensor(chunk.places)
    layers = module.config.num_hidden_layers
    if not 1 <= layer <= layers:
        raise ConfigError(f"clip skip {layer} is too much: the {encoder} of {base.source.name} has {layers} layers")
    with put_in(base, encoder, places):
        output = module(ids.to(base.device), output_hidden_states=True)
    states: torch.Tensor = output.hidden_states[-layer]
    if normed:
        states = output.last_hidden_state if layer == 1 else _final_norm(module)(states)
    return states, getattr(output, "text_embeds", None)


def _final_norm(module: Any) -> Any:
    return getattr(module, "text_model", module).final_layer_norm


def _weights(base: LoadedBase, encoder: str, rows: Sequence[_Chunk], device: torch.device) -> torch.Tensor:
    """Return how strongly each state counts, [rows, 77, 1] float32; start, end and filling count once."""
    weights = torch.ones(len(rows), token_limit(base, encoder))
    for number, chunk in enumerate(rows):
        weights[number, 1 : len(chunk) + 1] = torch.tensor(chunk.weights)
    return weights[..., None].to(device)


def _weighted(
    states: torch.Tensor, weights: torch.Tensor, emphasis: Emphasis, empty: torch.Tensor | None
) -> torch.Tensor:
    """Return states with their weights: in float32, since half precision would round weights like 1.003 away."""
    plain = states.float()
    if empty is not None:
        changed = torch.where(weights == 1, plain, empty.float() + weights * (plain - empty.float()))
    else:
        changed = plain * weights
        if emphasis == "original":
            changed = changed * _mean_kept(plain, changed)
    limit = torch.finfo(states.dtype).max
    return changed.clamp(-limit, limit).to(states.dtype)


def _mean_kept(states: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """Return what brings the mean of each row of `changed` back to that of `states`, [rows, 1, 1]."""
    before, after = (tensor.mean(dim=(1, 2), keepdim=True) for tensor in (states, changed))
    size = changed.square().mean(dim=(1, 2), keepdim=True).sqrt()
    # A mean that is rounding alone says nothing; norms without a bias, as in untrained models, leave no other.
    return torch.where(after.abs() <= _SMALLEST_MEAN * size, 1.0, before / after)

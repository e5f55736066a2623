"""Encodes captions once, for all runs: every text that a step may need, and no prompt at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from sdlora.data import Progress
from sdlora.data.cache_folder import store_folder
from sdlora.data.store import ALONE, TensorStore, Together
from sdlora.families.base import Conditioning, LoadedBase, module_sha256
from sdlora.families.words import fingerprint

_TEXTS_AT_ONCE = 16
_TOKENIZED_AT_ONCE = 256
_ENCODER_VERSION = 1
"""Raised when the same text would be encoded to another conditioning."""


class CaptionRows(Mapping[str | None, Conditioning]):
    """Encoded captions by their text, read from the store when asked for; None stands for no prompt."""

    def __init__(self, store: TensorStore, names: Mapping[str, str], without_prompt: Conditioning) -> None:
        self._store = store
        self._names = names
        self._without_prompt = without_prompt

    def __getitem__(self, text: str | None) -> Conditioning:
        """Return the conditioning of one text, one row, on the CPU."""
        if text is None:
            return self._without_prompt
        packed = self._store.read(self._names[text])
        states, pooled = self._without_prompt.states, self._without_prompt.pooled
        count = states.numel()
        return Conditioning(
            packed[:count].reshape(states.shape), None if pooled is None else packed[count:].reshape(pooled.shape)
        )

    def __iter__(self) -> Iterator[str | None]:
        yield None
        yield from self._names

    def __len__(self) -> int:
        return len(self._names) + 1


def caption_store(base: LoadedBase, cache: Path) -> TensorStore:
    """Return the store of texts encoded by this base's text encoders in their precision."""
    encoders = [(name, module_sha256(module), module.dtype) for name, module in base.text_encoders.items()]
    return TensorStore(store_folder(cache, "captions", (_ENCODER_VERSION, base.family.name, encoders)))


def encode_captions(
    base: LoadedBase,
    texts: Iterable[str],
    store: TensorStore,
    *,
    together: Together = ALONE,
    on_progress: Progress | None = None,
) -> CaptionRows:
    """Return the rows of all `texts`; what the store does not have is encoded, by each process its part of it."""
    unique = sorted(set(texts))
    names = dict(zip(unique, _names_of(base, unique), strict=True))
    with torch.no_grad(), store.writing() as writer:
        there = store.find(set(names.values()))
        missing = [text for text in together.part(unique) if names[text] not in there]
        wanted: list[str | None] = [None, *missing]
        for start in range(0, len(wanted), _TEXTS_AT_ONCE):
            part = wanted[start : start + _TEXTS_AT_ONCE]
            encoded = base.family.encode_prompts(base, part).to(torch.device("cpu"))
            for index, text in enumerate(part):
                row = encoded.rows([index])
                if text is None:
                    without_prompt = row
                    continue
                parts = [row.states] if row.pooled is None else [row.states, row.pooled]
                writer.add(names[text], torch.cat([part.flatten() for part in parts]))
            if on_progress:
                on_progress(start + len(part), len(wanted))
    together.wait()
    store.require(set(names.values()))
    return CaptionRows(store, names, without_prompt)


def _names_of(base: LoadedBase, texts: list[str]) -> list[str]:
    """Return a name for each text, which depends on the tokens and new words that the encoders see."""
    names = []
    for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
        part = texts[start : start + _TOKENIZED_AT_ONCE]
        tokens = [tokenizer(part).input_ids for tokenizer in base.tokenizers.values()]
        for index, text in enumerate(part):
            seen = repr([ids[index] for ids in tokens]) + fingerprint(base, text)
            names.append(hashlib.sha256(seen.encode()).hexdigest()[:32])
    return names

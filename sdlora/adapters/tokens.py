"""`TrainedTokens`: new words of the prompt language while they are trained (textual inversion)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sdlora.adapters.weights import TrainedWeight
from sdlora.config import TokensSection
from sdlora.errors import ConfigError
from sdlora.families.base import LoadedBase, Words
from sdlora.families.words import (
    clamp_norms,
    fingerprint,
    knowing,
    norm_range,
    random_vectors,
    same_word,
    start_vectors,
    token_limit,
)


@dataclass(frozen=True)
class TrainedTokens:
    """The vectors of new words, float32 parameters that the base's prompts use from the start."""

    weights: tuple[TrainedWeight, ...]
    """One a word and text encoder, role "vectors", [n,D]."""
    _words: Mapping[str, Mapping[str, nn.Parameter]]
    _norms: Mapping[str, tuple[float, float]]
    """{text encoder: range of lengths}; empty where they are free."""

    def words(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return {word: {text encoder: [n,D]}}, detached copies in float32 on the CPU."""
        return {
            word: {encoder: vectors.detach().float().cpu().clone() for encoder, vectors in parts.items()}
            for word, parts in self._words.items()
        }

    def keep_norms(self) -> None:
        """Each vector is as long as some vector of the base may be, where tokens.keep_norm asks for it."""
        for parts in self._words.values():
            for encoder, vectors in parts.items():
                if encoder in self._norms:
                    clamp_norms(vectors, *self._norms[encoder])


def start_words(
    base: LoadedBase, triggers: Mapping[str, str], section: TokensSection, seed: int
) -> dict[str, dict[str, torch.Tensor]]:
    """Return what each of `triggers` ({trigger: its class_prompt}) starts as, {word: {text encoder: [n,D] float32}}.

    The text encoders must be loaded. Raises ConfigError for triggers or starts that make no words.
    """
    _refuse_equal(list(triggers))
    generator = torch.Generator().manual_seed(seed)
    words = {}
    for word, class_prompt in triggers.items():
        words[word] = _start(base, word, class_prompt, section, generator)
        _check_length(base, word, words[word])
    return words


def new_tokens(base: LoadedBase, triggers: Mapping[str, str], section: TokensSection, seed: int) -> TrainedTokens:
    """The base knows each of `triggers` as a new word, which starts as `start_words` has it; returns their vectors."""
    words = {
        word: {encoder: nn.Parameter(rows.to(base.device)) for encoder, rows in parts.items()}
        for word, parts in start_words(base, triggers, section, seed).items()
    }
    base.words = words
    weights = tuple(
        TrainedWeight(f"tokens.{encoder}.{word}", "vectors", parameter)
        for word, parts in words.items()
        for encoder, parameter in parts.items()
    )
    return TrainedTokens(weights, words, norm_range(base) if section.keep_norm else {})


def unheard_words(base: LoadedBase, words: Words, texts: Iterable[str]) -> list[str]:
    """Return those of `words` that none of `texts` holds, as prompts are read: of two that overlap the longer counts."""
    missing = dict.fromkeys(words)
    for text in texts:
        if not missing:
            break
        with knowing(base, words):
            whole = fingerprint(base, text)
        for word in [*missing] if whole else ():
            with knowing(base, {other: vectors for other, vectors in words.items() if other != word}):
                if fingerprint(base, text) != whole:
                    del missing[word]
    return [*missing]


def _start(
    base: LoadedBase, word: str, class_prompt: str, section: TokensSection, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    texts = {"trigger": word, "random": word, "class": class_prompt, "words": section.words}
    vectors = start_vectors(base, texts[section.start], section.vectors)
    if section.start == "random":
        return random_vectors(base, len(next(iter(vectors.values()))), generator)
    return vectors


def _refuse_equal(triggers: Sequence[str]) -> None:
    for one, other in itertools.combinations(triggers, 2):
        if same_word(one, other):
            raise ConfigError(
                f"data.trigger: {one!r} and {other!r} are one word to a prompt; give each concept a word of its own"
            )


def _check_length(base: LoadedBase, word: str, vectors: Mapping[str, torch.Tensor]) -> None:
    count = max(map(len, vectors.values()))
    room = min(token_limit(base, encoder) for encoder in vectors) - 2
    if count > room:
        raise ConfigError(
            f"data.trigger: {word[:40]!r} would stand for {count} vectors and a prompt holds {room}; "
            "choose a shorter word, or set tokens.vectors"
        )

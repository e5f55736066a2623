"""New words of the prompt language (textual inversion): vectors that stand where a word stands in a prompt.

The embedding tables are never written nor enlarged. Where a new word stands, ordinary ids keep the places and
the rows that were looked up for them are replaced: CLIP models whose configuration calls 2 their end token take
the pooled embedding where the largest id is, which an id above the vocabulary would move.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sdlora.errors import ConfigError, ModelError
from sdlora.families.base import LoadedBase, Words

_ORDINARY = -1
_SMALLEST_NORM = 1e-12


def encode_texts(base: LoadedBase, encoder: str, texts: Sequence[str], **options: Any) -> Any:
    """Return a text encoder's output for `texts`, cut or filled up to its 77 tokens; `options` go to its forward."""
    module = base.text_encoders[encoder]
    ids = _ids(base, encoder, texts)
    limit = token_limit(base, encoder)
    rows = {index: found for index, text in enumerate(texts) if (found := _spell(base, encoder, text))}
    if not rows:
        return module(ids, **options)
    starts = _starts(base, encoder)
    places = torch.full(ids.shape, _ORDINARY)
    for index, found in rows.items():
        ids[index] = torch.tensor(_fit(base.tokenizers[encoder], [id for id, _ in found], limit))
        for position, (_, place) in enumerate(found[: limit - 1]):
            if place:
                word, number = place
                places[index, position] = starts[word] + number
    with put_in(base, encoder, places):
        return module(ids, **options)


@contextmanager
def put_in(base: LoadedBase, encoder: str, places: torch.Tensor) -> Iterator[None]:
    """Inside, the encoder sees rows of the new words' vectors in place of its own where `places` [B,L] is not -1."""
    if not bool((places != _ORDINARY).any()):
        yield
        return
    table = torch.cat([vectors[encoder].to(base.device) for vectors in base.words.values()])
    rows = places.to(base.device)

    def replace(embedding: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        vectors = table.to(output.device, output.dtype)[rows.clamp(min=0)]
        return torch.where(rows[..., None] == _ORDINARY, output, vectors)

    hook = base.text_encoders[encoder].get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def spelled(base: LoadedBase, encoder: str, text: str) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the text's tokens without start and end, each alone, a new word's together: ids and rows for `put_in`."""
    starts = _starts(base, encoder)
    found = _spell(base, encoder, text)
    if not found:
        yield from (([id], [_ORDINARY]) for id in _plain_ids(base, encoder, text))
        return
    tokens = found[1:-1]
    position = 0
    while position < len(tokens):
        id, place = tokens[position]
        if place is None:
            yield [id], [_ORDINARY]
            position += 1
            continue
        count, first = len(base.words[place[0]][encoder]), starts[place[0]]
        yield [id] * count, list(range(first, first + count))
        position += count


def token_counts(base: LoadedBase, encoder: str, texts: Sequence[str]) -> list[int]:
    """Return how many tokens each text has, start and end included, uncut."""
    counts = [len(ids) for ids in base.tokenizers[encoder](list(texts), truncation=False).input_ids]
    for index, text in enumerate(texts):
        if spelled := _spell(base, encoder, text):
            counts[index] = len(spelled)
    return counts


def token_limit(base: LoadedBase, encoder: str) -> int:
    """Return how many tokens an encoder sees, start and end included."""
    # Not the tokenizer's own limit: one of vocab.json and merges.txt alone knows none.
    return int(base.text_encoders[encoder].config.max_position_embeddings)


def fingerprint(base: LoadedBase, text: str) -> str:
    """Return what the new words in `text` add to its tokens, places and vectors hashed; "" where there is none."""
    digest = hashlib.sha256()
    found = False
    for encoder in base.tokenizers:
        if spelled := _spell(base, encoder, text):
            found = True
            digest.update(repr(spelled).encode())
            for word in sorted({place[0] for _, place in spelled if place}):
                vectors = base.words[word][encoder].detach().float().cpu().contiguous()
                digest.update(vectors.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if found else ""


@contextmanager
def knowing(base: LoadedBase, words: Words) -> Iterator[None]:
    """Inside, the base knows exactly `words`, so none with {}; afterwards those that it knew before."""
    before = base.words
    base.words = words
    try:
        yield
    finally:
        base.words = before


def check_words(base: LoadedBase, words: Words) -> None:
    """Raise ModelError where some word's vectors do not fit the text encoders of the base."""
    expected = {name: table.shape[1] for name, table in _tables(base).items()}
    for word, vectors in words.items():
        given = {name: tensor.shape[1] for name, tensor in vectors.items()}
        if given != expected:
            raise ModelError(
                f"the new word {word!r} has vectors of width {_widths(given)}, the text encoders of the base "
                f"{base.source.name} ({base.family.title}) take {_widths(expected)}; choose an embedding made for this family"
            )


def same_word(one: str, other: str) -> bool:
    """Return whether two spellings are one word to a prompt, in which case and spacing make no difference."""
    return _normal(one) == _normal(other)


def start_vectors(base: LoadedBase, text: str, count: int) -> dict[str, torch.Tensor]:
    """Return {encoder: [n, D] float32}, the table's own vectors of the tokens of `text`, to start a word from.

    n is `count`, or with 0 as many as the text has tokens. For a smaller number neighbours are averaged; for
    a larger one the tokens come again from the first on. Raises ConfigError for a text without tokens.
    """
    ids = {name: _plain_ids(base, name, text) for name in base.tokenizers}
    if not all(ids.values()):
        raise ConfigError(f"the text {text!r} has no tokens to start a new word from; write at least one word")
    wanted = count or max(map(len, ids.values()))
    return {name: _spread(table[ids[name]].detach().float(), wanted) for name, table in _tables(base).items()}


def random_vectors(base: LoadedBase, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return {encoder: [count, D] float32} drawn with the mean and deviation that the base's own vectors have."""
    drawn = {}
    for name, table in _tables(base).items():
        rows = table.detach().float()
        noise = torch.randn(count, rows.shape[1], generator=generator).to(rows.device)
        drawn[name] = rows.mean(dim=0) + noise * rows.std(dim=0)
    return drawn


def norm_range(base: LoadedBase) -> dict[str, tuple[float, float]]:
    """Return {encoder: (smallest, largest)} of the lengths of the base's own vectors."""
    norms = {name: table.detach().float().norm(dim=1) for name, table in _tables(base).items()}
    return {name: (float(lengths.min()), float(lengths.max())) for name, lengths in norms.items()}


def clamp_norms(vectors: torch.Tensor, smallest: float, largest: float) -> None:
    """Each row of `vectors` is scaled, in place, to a length within the range; one within it is not touched."""
    with torch.no_grad():
        norms = vectors.norm(dim=1, keepdim=True).clamp(min=_SMALLEST_NORM)
        outside = (norms < smallest) | (norms > largest)
        vectors.copy_(torch.where(outside, vectors * (norms.clamp(smallest, largest) / norms), vectors))


def _ids(base: LoadedBase, encoder: str, texts: Sequence[str]) -> torch.Tensor:
    """Return the ids [B,77] of the texts without any new word, on the base's device; longer texts are cut."""
    tokens = base.tokenizers[encoder](
        list(texts),
        padding="max_length",
        max_length=token_limit(base, encoder),
        truncation=True,
        return_tensors="pt",
    )
    ids: torch.Tensor = tokens.input_ids.to(base.device)
    return ids


_Spelled = list[tuple[int, tuple[str, int] | None]]
"""A text's tokens, start and end included: the id, and for a place of a new word (word, number of its vector)."""


def _spell(base: LoadedBase, encoder: str, text: str) -> _Spelled:
    """Return the tokens of a text that holds new words, uncut; of another text, nothing."""
    pieces = list(_pieces(tuple(base.words), text))
    if all(word is None for _, word in pieces):
        return []
    tokenizer = base.tokenizers[encoder]
    special = set(tokenizer.all_special_ids)
    filler = next(id for id in range(len(tokenizer)) if id not in special)
    spelled: _Spelled = [(tokenizer.bos_token_id, None)]
    for piece, word in pieces:
        if word is None:
            spelled += [(id, None) for id in _plain_ids(base, encoder, piece)]
        else:
            spelled += [(filler, (word, number)) for number in range(len(base.words[word][encoder]))]
    return [*spelled, (tokenizer.eos_token_id, None)]


def _pieces(words: tuple[str, ...], text: str) -> Iterator[tuple[str, str | None]]:
    """Yield the text in pieces, (piece, None) or (piece, the new word that it is).

    A tokenizer's words end where a letter meets what is none, so the pieces tokenize as within the whole text.
    """
    if not words:
        return
    text = unicodedata.normalize("NFC", text)  # as the tokenizer does
    pattern, ordered = _pattern(words)
    end = 0
    for match in pattern.finditer(text):
        yield text[end : match.start()], None
        yield match[0], ordered[(match.lastindex or 1) - 1]
        end = match.end()
    yield text[end:], None


@functools.lru_cache(maxsize=64)
def _pattern(words: tuple[str, ...]) -> tuple[re.Pattern[str], tuple[str, ...]]:
    """Return what matches any of the words, and the word of each of its groups; of two that overlap the longer matches."""
    ordered = tuple(sorted(words, key=len, reverse=True))
    return re.compile("|".join(f"({_whole(word)})" for word in ordered), re.IGNORECASE), ordered


def _whole(word: str) -> str:
    """Return the expression for a word in any case and spacing, outside of longer words."""
    parts = unicodedata.normalize("NFC", word).split()
    inner = r"\s+".join(map(re.escape, parts))
    before = r"(?<!\w)" if re.match(r"\w", parts[0]) else ""
    after = r"(?!\w)" if re.search(r"\w$", parts[-1]) else ""
    return f"{before}{inner}{after}"


def _normal(word: str) -> str:
    return " ".join(unicodedata.normalize("NFC", word).lower().split())


def _plain_ids(base: LoadedBase, encoder: str, text: str) -> list[int]:
    """Return the ids of a text without start and end token."""
    ids: list[int] = base.tokenizers[encoder](text, add_special_tokens=False).input_ids
    return ids


def _fit(tokenizer: Any, ids: list[int], limit: int) -> list[int]:
    """Return the ids cut, the end token kept, or filled up to `limit`."""
    if len(ids) > limit:
        return [*ids[: limit - 1], tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (limit - len(ids))


def _starts(base: LoadedBase, encoder: str) -> dict[str, int]:
    """Return where each word's vectors begin when all words' lie below each other."""
    starts, total = {}, 0
    for word, vectors in base.words.items():
        starts[word] = total
        total += len(vectors[encoder])
    return starts


def _tables(base: LoadedBase) -> dict[str, torch.Tensor]:
    return {name: module.get_input_embeddings().weight for name, module in base.text_encoders.items()}


def _spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    if count <= len(rows):
        return torch.stack([group.mean(dim=0) if len(group) > 1 else group[0] for group in rows.tensor_split(count)])
    return rows[torch.arange(count) % len(rows)]


def _widths(widths: Mapping[str, int]) -> str:
    return " and ".join(str(widths[name]) for name in sorted(widths))

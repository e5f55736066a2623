"""The tiny base's tokenizer and text encoder, and the encoder's warm-up on captions."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_loop import LossOfStep, StepRandom
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdlora.assets import scenes

CONTEXT_TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "object": scenes.OBJECTS,
    "colour": scenes.COLOURS,
    "background": scenes.BACKGROUNDS,
    "size": scenes.SIZES,
    "texture": scenes.TEXTURES,
}


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a tokenizer that has one token for each word of the captions, and load it.

    The vocabulary is laid out as CLIP's: all 256 bytes, the same at the end of a word, the merges,
    the two marks. So every text has tokens, and the end mark has the highest number.
    """
    merges = learn_merges(" ".join(scenes.every_caption_word()).replace(",", " ").split())
    alphabet = list(byte_symbols().values())
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *map("".join, merges)]
    vocabulary = {token: number for number, token in enumerate([*tokens, START, END])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=CONTEXT_TOKENS)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def write_vocabulary(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Write `vocab.json` and `merges.txt`, the form that programs with older libraries read."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    text = json.dumps(model["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    lines = ["#version: 0.2", *pairs]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def byte_symbols() -> dict[int, str]:
    """Return the printable character that stands for each byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(others)}


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges until every word is one token, commonest pair first."""
    counts = Counter(words)
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelled.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = {word: _merged(symbols, best) for word, symbols in spelled.items()}


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained CLIP text model for the tokenizer's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_TOKENS,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class CaptionIds:
    """Token numbers [B,77] of captions, padded as the pipeline pads; each caption is cut once."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, captions: list[str]) -> Tensor:
        for caption in captions:
            if caption not in self._known:
                self._known[caption] = self._tokenizer(
                    caption, padding="max_length", truncation=True, max_length=CONTEXT_TOKENS
                ).input_ids
        return torch.tensor([self._known[caption] for caption in captions])


class CaptionReader(nn.Module):
    """The text encoder with one linear head for each attribute, used in the warm-up alone."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        width = 2 * encoder.config.hidden_size
        self.heads = nn.ModuleDict({k: nn.Linear(width, len(v)) for k, v in ATTRIBUTES.items()})

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Return logits of every attribute, read where the caption ends and in the padding."""
        hidden = self.encoder(ids).last_hidden_state
        ends = (ids == self.encoder.config.eos_token_id).int().argmax(dim=1)
        at_end = hidden[torch.arange(len(ids), device=ids.device), ends]
        read = torch.cat([at_end, hidden[:, -20:].mean(dim=1)], dim=1)
        return {name: head(read) for name, head in self.heads.items()}


def reading_loss(ids_of: CaptionIds, batch_size: int, device: torch.device) -> LossOfStep:
    """Return the loss of one warm-up step: which attributes does the caption name?"""

    def loss_of_step(model: nn.Module, random: StepRandom) -> tuple[Tensor, dict[str, float]]:
        chosen = [scenes.random_scene(random.numpy) for _ in range(batch_size)]
        captions = [scenes.caption(scene, random.numpy) for scene in chosen]
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(ids_of(captions).to(device))
        losses, right = [], []
        for name, choices in ATTRIBUTES.items():
            target = _named(chosen, captions, name, choices).to(device)
            losses.append(F.cross_entropy(logits[name].float(), target, ignore_index=-1))
            hits = (logits[name].argmax(dim=1) == target)[target >= 0]
            right.append(hits.float().mean().item())
        return torch.stack(losses).mean(), {"right": float(np.mean(right))}

    return loss_of_step


def _named(chosen: list[scenes.Scene], captions: list[str], name: str, choices: tuple[str, ...]) -> Tensor:
    values = [str(getattr(scene, name)) for scene in chosen]
    return torch.tensor(
        [choices.index(value) if value in caption else -1 for value, caption in zip(values, captions, strict=True)]
    )

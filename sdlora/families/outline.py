"""What a base asks of pictures and captions, told from its small files: no weight is read or downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.assets import CONFIGS
from sdlora.config import BaseSection
from sdlora.diffusion import Prediction
from sdlora.families.base import ModelFamily
from sdlora.families.detect import detect_base, family_of, read_json
from sdlora.families.registry import FAMILIES, explained
from sdlora.families.sources import checkpoint_tokenizers, download, find_base, folder_tokenizers, is_hub_id
from sdlora.families.traits import PREDICTION_NAMES

_SMALL_FILES = ["model_index.json", "*/config.json", "scheduler/*", "tokenizer/*", "tokenizer_2/*"]
_TEXTS_AT_ONCE = 1000
_BYTE_TOKENS = 512
"""256 bytes, and as many that end a word."""


@dataclass(frozen=True)
class CutText:
    """A text that is longer than a text encoder sees."""

    excess: int
    """How many tokens are not seen."""
    lost: str
    """The text's end that is not seen."""


@dataclass(frozen=True)
class BaseOutline:
    """What is known of a base without its weights."""

    title: str
    resolution: int | None
    """Side of its pictures in pixels; None where only measuring the base would tell."""
    tokenizers: Mapping[str, Any]
    """Text encoder -> its tokenizer."""
    token_limits: Mapping[str, int]
    """Text encoder -> how many tokens it sees, the two marks of beginning and end included."""

    def cut(self, texts: Sequence[str]) -> dict[str, CutText]:
        """Return those of `texts` that some encoder does not see whole, with what that encoder loses."""
        found: dict[str, CutText] = {}
        for encoder, tokenizer in self.tokenizers.items():
            limit = self.token_limits[encoder]
            for text, ids in zip(texts, _token_ids(tokenizer, texts), strict=True):
                excess = len(ids) - limit
                if excess > 0 and (text not in found or excess > found[text].excess):
                    found[text] = CutText(excess, _text_after(tokenizer, text, limit - 1))
        return found

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, without the marks of beginning and end; all encoders of a base split alike."""
        return [ids[1:-1] for ids in _token_ids(next(iter(self.tokenizers.values())), texts)]

    def texts_with(self, word: str, texts: Sequence[str]) -> set[str]:
        """Return those of `texts` among whose tokens those of `word` come, one after another."""
        wanted = self.tokens([word])[0]
        return {
            text
            for text, inside in zip(texts, self.tokens(texts), strict=True)
            if any(inside[start : start + len(wanted)] == wanted for start in range(len(inside) - len(wanted) + 1))
        }

    def is_common_word(self, word: str) -> bool:
        """Return whether `word` is a single token, and one of the more frequent half of those of several letters."""
        tokens = self.tokens([word])[0]
        # After the bytes, which come first, a CLIP vocabulary grew by merging what is most frequent.
        merged = len(next(iter(self.tokenizers.values()))) - _BYTE_TOKENS
        return len(tokens) == 1 and tokens[0] < _BYTE_TOKENS + merged // 2


def outline_base(section: BaseSection) -> BaseOutline:
    """Return what is known of the base that `section` names. Raises ModelError and FormatError as `load_base` does."""
    path = _find(section)
    family = FAMILIES[family_of(path).name]
    with explained(path, family.traits):
        if path.is_dir():
            configs = path
            tokenizers = folder_tokenizers(path, family)
        else:
            configs = Path(section.config).expanduser() if section.config else CONFIGS / family.name
            tokenizers = checkpoint_tokenizers(section, family, path, configs)
        limits = {
            encoder: int(read_json(configs / encoder / "config.json")["max_position_embeddings"])
            for encoder in family.text_encoders
        }
        return BaseOutline(family.title, _resolution(section, family, path, configs), tokenizers, limits)


def _find(section: BaseSection) -> Path:
    name = section.path
    if is_hub_id(name) and not Path(name).exists() and Path(name).suffix not in (".safetensors", ".ckpt", ".pt"):
        return download(name, section.revision, _SMALL_FILES)
    return find_base(section)


def _resolution(section: BaseSection, family: ModelFamily, path: Path, configs: Path) -> int | None:
    size = read_json(configs / "unet" / "config.json").get("sample_size")
    if isinstance(size, int):
        return size * 2 ** (len(read_json(configs / "vae" / "config.json")["block_out_channels"]) - 1)
    prediction: Prediction | None = None if section.prediction == "auto" else section.prediction
    if prediction is None and path.is_file():
        prediction = detect_base(path).prediction
    scheduler = configs / "scheduler" / "scheduler_config.json"
    # The configurations that ship with sdlora are for any checkpoint of the family: what they say is not its own.
    if prediction is None and scheduler.is_file() and (path.is_dir() or section.config):
        declared = read_json(scheduler).get("prediction_type", "epsilon" if path.is_dir() else None)
        prediction = PREDICTION_NAMES.get(str(declared))
    possible = set(family.resolutions.values()) if prediction is None else {family.resolutions[prediction]}
    return possible.pop() if len(possible) == 1 else None


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        yield from tokenizer(list(texts[start : start + _TEXTS_AT_ONCE]), truncation=False, verbose=False).input_ids


def _text_after(tokenizer: Any, text: str, seen: int) -> str:
    """Return what follows the first `seen` tokens; a word that is cut apart is lost whole."""
    start = int(tokenizer(text, truncation=False, verbose=False, return_offsets_mapping=True).offset_mapping[seen][0])
    while start > 0 and text[start - 1].isalnum() and text[start].isalnum():
        start -= 1
    return text[start:]

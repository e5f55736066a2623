"""From a data section to encoded examples, for tests of what comes after that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdlora.config import DataSection
from sdlora.data.cache import encode_pictures, picture_store
from sdlora.data.cache_folder import data_cache, index_file
from sdlora.data.embeddings import CaptionRows, caption_store, encode_captions
from sdlora.data.examples import CachedExample, plan_examples
from sdlora.data.index import content_hash, learn_facts, open_index
from sdlora.data.source import open_dataset, raise_problems


def encode(base: Any, section: DataSection, resolution: int = 64) -> list[CachedExample]:
    """Return the examples of a data section, encoded."""
    samples = open_dataset(section).samples
    problems: list[str] = []
    with open_index(index_file(data_cache(section))) as index:
        facts = [fact for fact in learn_facts(samples, index, problems) if fact]
        masks = [content_hash(sample.mask, index) if sample.mask else "" for sample in samples]
    raise_problems(problems)
    examples = plan_examples(samples, facts, masks, resolution, picture_store(base, data_cache(section)))
    encode_pictures(base, examples)
    return examples


def encode_texts(base: Any, texts: Any, section: DataSection | None = None) -> CaptionRows:
    """Return the conditioning of texts."""
    return encode_captions(base, texts, caption_store(base, data_cache(section or DataSection())))


def picture_files(folder: Path) -> set[Path]:
    """Return the shards of encoded pictures in a cache folder."""
    return set((folder / "pictures").rglob("*.safetensors"))

"""Where a model lies: a local path, or Hugging Face and its cache; and where the tokenizers are that checkpoints lack."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.assets import TINY_SD
from sdlora.config import BaseSection
from sdlora.errors import ModelError
from sdlora.families.detect import weight_patterns
from sdlora.families.traits import tokenizer_folder

if TYPE_CHECKING:
    from sdlora.families.base import ModelFamily

_WEIGHT_FOLDERS = ("unet", "vae", "text_encoder", "text_encoder_2")
_TOKENIZER_FILES = ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
_CLIP_TOKENIZER = "openai/clip-vit-large-patch14"


def find_base(section: BaseSection) -> Path:
    """Return the local folder or file of the base; a hub id is downloaded, or taken from its cache.

    Nothing is asked of the network for "tiny" or for anything that looks like a path.
    """
    name = section.path
    if not name:
        raise ModelError('no base is named; --base takes for example "tiny", a folder or a .safetensors file')
    if name == "tiny":
        return TINY_SD
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # "~name" of an unknown user
        path = Path(name)
    if path.exists():
        return path
    if not is_hub_id(name):
        raise ModelError(
            f"{name}: there is no such file or folder; --base takes tiny, a diffusers folder, "
            "a .safetensors checkpoint, or a Hugging Face id such as owner/name"
        )
    if path.suffix in {".safetensors", ".ckpt", ".pt"}:
        raise ModelError(f"{name}: there is no such file")
    wanted = [f"{part}/{weights}" for part in _WEIGHT_FOLDERS for weights in weight_patterns(section.variant)]
    wanted += [
        "*/*.index.json",
        "*/*.index.*.json",
        "model_index.json",
        "*/config.json",
        "scheduler/*",
        "tokenizer/*",
        "tokenizer_2/*",
    ]
    return download(name, section.revision, wanted)


def download(name: str, revision: str, wanted: Sequence[str], left_out: Sequence[str] = ()) -> Path:
    """Return the local folder of a hub id whose files of the `wanted` patterns are there, from the cache or the network.

    Raises ModelError for an id, revision or file that is not there, and where there is no network.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = constants.HF_HUB_OFFLINE
    try:
        return Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=list(wanted), ignore_patterns=list(left_out) or None
            )
        )
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: there is neither such a folder nor such a Hugging Face model (or it is private: "
            "run 'hf auth login')"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name}: has no branch, tag or commit called {revision!r}") from error
    except HFValidationError as error:
        raise ModelError(f"{name}: is neither an existing file or folder nor a Hugging Face id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise ModelError(f"{name}: the disk is full; free some room in {constants.HF_HUB_CACHE}") from error
        reason = "HF_HUB_OFFLINE is set" if offline else "huggingface.co cannot be reached"
        raise ModelError(
            f"{name}: there is no such folder, it is not in the Hugging Face cache, and {reason}; "
            "go online once to download it, or name a local folder or file"
        ) from error


def folder_tokenizers(folder: Path, family: ModelFamily) -> dict[str, Any]:
    """Return the tokenizers of a diffusers folder, by text encoder. Raises ModelError where one is missing."""
    return {encoder: _load(folder / tokenizer_folder(encoder), folder) for encoder in family.text_encoders}


def _load(place: Path, folder: Path) -> Any:
    from transformers import CLIPTokenizer

    if not _holds_tokenizer(place):
        raise ModelError(f"{folder}: its folder {place.name!r} is missing or incomplete; download or export it again")
    return CLIPTokenizer.from_pretrained(place)


def checkpoint_tokenizers(section: BaseSection, family: ModelFamily, file: Path, configs: Path) -> dict[str, Any]:
    """Return the tokenizers for a checkpoint, which holds none, by text encoder.

    They are those that the user names; else those beside the file, in `configs`, or in the hub's cache.
    All families split text alike and differ only in the token that fills up the rest.
    """
    from transformers import CLIPTokenizer

    if section.tokenizer:
        named = Path(section.tokenizer).expanduser()
        places = [named if named.exists() else _hub_folder(section.tokenizer, local_only=False)]
        advice = f"base.tokenizer: {section.tokenizer} holds no tokenizer (vocab.json and merges.txt) or is not there"
    else:
        places = [file.parent / "tokenizer", configs / "tokenizer", _hub_folder(_CLIP_TOKENIZER, local_only=True)]
        advice = (
            f"{file}: a checkpoint holds no tokenizer and none was found beside it; put the 'tokenizer' folder of "
            "any Stable Diffusion model next to the file, "
            f"or set base.tokenizer to a folder or to {_CLIP_TOKENIZER}"
        )
    place = next((place for place in places if place is not None and _holds_tokenizer(place)), None)
    if place is None:
        raise ModelError(advice)
    tokenizers = {}
    for encoder, part in family.text_encoders.items():
        tokenizer = CLIPTokenizer.from_pretrained(place)
        fills_up = part.pad_token or tokenizer.eos_token
        tokenizers[encoder] = CLIPTokenizer.from_pretrained(place, pad_token=fills_up)
    return tokenizers


def _holds_tokenizer(folder: Path) -> bool:
    pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return pair or (folder / "tokenizer.json").is_file()


def cached_folder(name: str, wanted: Sequence[str]) -> Path | None:
    """Return the local folder of a Hugging Face id whose files of these patterns were downloaded before, else None."""
    return _hub_folder(name, local_only=True, wanted=wanted)


def _hub_folder(name: str, *, local_only: bool, wanted: Sequence[str] = _TOKENIZER_FILES) -> Path | None:
    """Return the folder of a Hugging Face id's files, the tokenizer's unless others are wanted; None where there are none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if not is_hub_id(name):
        return None
    try:
        return Path(snapshot_download(name, allow_patterns=list(wanted), local_files_only=local_only))
    except (HfHubHTTPError, OSError, ValueError):
        return None


def is_hub_id(name: str) -> bool:
    """Return whether `name` has the form owner/name."""
    return bool(re.fullmatch(r"(?!\.)[\w.-]+/[\w.-]+", name, re.ASCII))

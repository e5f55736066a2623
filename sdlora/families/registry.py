"""From what a user calls a base to the loaded base: folder, hub id, single file, or "tiny"."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sdlora.assets import CONFIGS, TINY_SD
from sdlora.config import BaseSection
from sdlora.errors import ModelError
from sdlora.families.base import BaseSource, LoadedBase, ModelFamily
from sdlora.families.sd import SD1, SD2
from sdlora.storage import SafetensorsHeader, read_header, sha256_of_file

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHT_FOLDERS = ("unet", "vae", "text_encoder")
_TOKENIZER_FILES = ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
_SD1_TOKENIZER = "openai/clip-vit-large-patch14"


def load_base(section: BaseSection, device: torch.device | str | None = None) -> LoadedBase:
    """Return the base that `section` names, on `device` (default: the GPU where there is one).

    Raises ModelError or FormatError, with one sentence, for anything that is no usable base.
    """
    _quiet_progress_bars()
    target = torch.device(device) if device is not None else default_device()
    dtype = _choose_dtype(section.precision, target)
    path = find_base(section)
    family = detect_family(path)
    if path.is_file():
        source = BaseSource(section.path, path, sha256_of_file(path))
        return _load_single_file(section, family, source, target, dtype)
    source = BaseSource(section.path, path, _folder_sha256(path, _weight_files(path, section.variant)))
    if not _holds_tokenizer(path / "tokenizer"):
        raise ModelError(f"{path}: its folder 'tokenizer' is missing or incomplete; download or export it again")
    return family.load(source, target, dtype, variant=section.variant or None)


def _quiet_progress_bars() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def default_device() -> torch.device:
    """Return the CUDA device where there is one, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


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
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(
            f"{name}: there is no such file or folder; --base takes tiny, a diffusers folder, "
            "a .safetensors checkpoint, or a Hugging Face id such as owner/name"
        )
    if path.suffix in {".safetensors", ".ckpt", ".pt"}:
        raise ModelError(f"{name}: there is no such file")
    return _download(name, section)


def detect_family(path: Path) -> ModelFamily:
    """Return the family of a diffusers folder or a single-file checkpoint, told from its contents.

    Raises ModelError when it is no Stable Diffusion base that sdlora knows, saying what it is instead.
    """
    return _family_of_file(path) if path.is_file() else _family_of_folder(path)


def _family_of_folder(folder: Path) -> ModelFamily:
    config_path = folder / "unet" / "config.json"
    if not config_path.is_file():
        inside = sorted(item.name for item in folder.iterdir())[:4]
        raise ModelError(
            f"{folder}: is not a diffusers model folder (it has no unet/config.json"
            + (f"; it holds {', '.join(inside)}" if inside else "; it is empty")
            + "); name the folder that holds model_index.json, or a .safetensors checkpoint"
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{config_path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{config_path}: does not describe a UNet; download or export it again")
    if config.get("addition_embed_type") == "text_time":
        raise ModelError(f"{folder}: is a Stable Diffusion XL base, which this version does not support yet")
    return SD2 if config.get("use_linear_projection") else SD1


def _family_of_file(path: Path) -> ModelFamily:
    if path.suffix in {".ckpt", ".pt", ".pth", ".bin"}:
        raise ModelError(
            f"{path}: is a pickle checkpoint, which could run code when opened; get the .safetensors version"
        )
    header = read_header(path)
    keys = header.tensors
    if any(".lora_" in key or key.startswith(("lora_", "lycoris_")) for key in keys):
        raise ModelError(f"{path}: is an adapter (LoRA), not a base; give it as --adapter, with a base beside it")
    if "conditioner.embedders.1.model.ln_final.weight" in keys:
        raise ModelError(f"{path}: is a Stable Diffusion XL checkpoint, which this version does not support yet")
    if any(key.startswith("cond_stage_model.model.") for key in keys):
        raise ModelError(f"{path}: is a Stable Diffusion 2.x checkpoint; as a single file it is not supported yet")
    if "model.diffusion_model.input_blocks.0.0.weight" in keys:
        return _checked_sd1(path, header)
    raise ModelError(
        f"{path}: holds no Stable Diffusion checkpoint ({len(keys)} tensors, "
        f"such as {next(iter(sorted(keys)), 'none')!r}); a base has UNet, VAE and text encoder in one file"
    )


def _checked_sd1(path: Path, header: SafetensorsHeader) -> ModelFamily:
    for prefix, what in (("first_stage_model.", "VAE"), ("cond_stage_model.transformer.", "text encoder")):
        if not any(key.startswith(prefix) for key in header.tensors):
            raise ModelError(f"{path}: holds no {what}; use the full checkpoint, not the UNet alone")
    return SD1


def _load_single_file(
    section: BaseSection, family: ModelFamily, source: BaseSource, device: torch.device, dtype: torch.dtype
) -> LoadedBase:
    from diffusers import StableDiffusionPipeline

    config = Path(section.config).expanduser() if section.config else CONFIGS / family.name
    if not (config / "model_index.json").is_file():
        raise ModelError(f"{config}: base.config must be a diffusers folder with model_index.json")
    try:
        pipeline = StableDiffusionPipeline.from_single_file(
            str(source.path),
            config=str(config),
            tokenizer=_find_tokenizer(section, source.path, config),
            torch_dtype=dtype,
            local_files_only=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return family.from_pipeline(pipeline, source, device)
    except NotImplementedError as error:  # torch's complaint about weights that the file did not hold
        raise ModelError(f"{source.path}: lacks some of the model's weights; download or export it again") from error
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(
            f"{source.path}: cannot be loaded as {family.title} ({detail}); "
            "a checkpoint of another size needs base.config, a diffusers folder that describes it"
        ) from error


def _find_tokenizer(section: BaseSection, file: Path, config: Path) -> Any:
    """Return the tokenizer that the user names; else the one beside the file, in `config`, or in the hub's cache."""
    from transformers import CLIPTokenizer

    if section.tokenizer:
        named = Path(section.tokenizer).expanduser()
        places = [named if named.exists() else _hub_folder(section.tokenizer, local_only=False)]
        advice = f"base.tokenizer: {section.tokenizer} holds no tokenizer (vocab.json and merges.txt) or is not there"
    else:
        places = [file.parent / "tokenizer", config / "tokenizer", _hub_folder(_SD1_TOKENIZER, local_only=True)]
        advice = (
            f"{file}: a checkpoint holds no tokenizer and none was found beside it; put the 'tokenizer' folder of "
            "any Stable Diffusion 1.x model next to the file, "
            f"or set base.tokenizer to a folder or to {_SD1_TOKENIZER}"
        )
    for place in places:
        if place is not None and _holds_tokenizer(place):
            return CLIPTokenizer.from_pretrained(place)
    raise ModelError(advice)


def _hub_folder(name: str, *, local_only: bool) -> Path | None:
    """Return the folder of a Hugging Face id's tokenizer files, or None where they cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if not _HUB_ID.fullmatch(name):
        return None
    try:
        return Path(snapshot_download(name, allow_patterns=_TOKENIZER_FILES, local_files_only=local_only))
    except (HfHubHTTPError, OSError, ValueError):
        return None


def _download(name: str, section: BaseSection) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = [f"{part}/{weights}" for part in _WEIGHT_FOLDERS for weights in _weight_patterns(section.variant)]
    wanted += ["*/*.index.json", "model_index.json", "*/config.json", "scheduler/*", "tokenizer/*"]
    offline = constants.HF_HUB_OFFLINE
    try:
        return Path(snapshot_download(name, revision=section.revision or None, allow_patterns=wanted))
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: there is neither such a folder nor such a Hugging Face model (or it is private: "
            "run 'hf auth login')"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name}: has no branch, tag or commit called {section.revision!r}") from error
    except HFValidationError as error:
        raise ModelError(f"{name}: is neither an existing file or folder nor a Hugging Face id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = "HF_HUB_OFFLINE is set" if offline else "huggingface.co cannot be reached"
        raise ModelError(
            f"{name}: there is no such folder, it is not in the Hugging Face cache, and {reason}; "
            "go online once to download it, or name a local folder or file"
        ) from error


def _choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision != "auto":
        return _DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def _weight_patterns(variant: str) -> tuple[str, str]:
    """Return the patterns of a model's weight files: whole, and in parts. Other variants do not match."""
    name = f"*model.{variant}" if variant else "*model"
    return f"{name}.safetensors", f"{name}-?????-of-?????.safetensors"


def _weight_files(folder: Path, variant: str) -> list[Path]:
    """Return the sound safetensors files that a diffusers folder is loaded from. Raises ModelError or FormatError."""
    files: list[Path] = []
    for part in _WEIGHT_FOLDERS:
        found = [file for pattern in _weight_patterns(variant) for file in sorted((folder / part).glob(pattern))]
        if not found:
            others = sorted(file.name for file in (folder / part).glob("*.*"))
            raise ModelError(
                f"{folder}: holds no {part}/{_weight_patterns(variant)[0]} (there: {', '.join(others) or 'nothing'}); "
                "sdlora reads only safetensors, since pickles could run code when opened"
            )
        files += found
    for file in files:
        read_header(file)
    return files


def _holds_tokenizer(folder: Path) -> bool:
    pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return pair or (folder / "tokenizer.json").is_file()


def _folder_sha256(folder: Path, files: Sequence[Path]) -> str:
    """Return the SHA-256 of the weight files' names and SHA-256s."""
    digests = {file.relative_to(folder).as_posix(): sha256_of_file(file) for file in files}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

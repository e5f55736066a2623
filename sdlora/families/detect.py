"""What a base is, told from configuration files and headers alone, without reading a weight."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.errors import ModelError
from sdlora.families.traits import (
    ALL_TRAITS,
    INPAINTING_CHANNELS,
    LATENT_CHANNELS,
    PREDICTION_NAMES,
    PREDICTION_TYPES,
    SDXL_TRAITS,
    UNET_PREFIX,
    VAE_PREFIX,
    FamilyTraits,
    describe_channels,
    tokenizer_folder,
)
from sdlora.headers import SafetensorsHeader, TensorEntry, read_header

if TYPE_CHECKING:
    from sdlora.diffusion import Prediction

_PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
FIRST_LAYER = UNET_PREFIX + "input_blocks.0.0.weight"
_EMA_PREFIX = "model_ema."
# Entries of original checkpoints beside the components: the noise schedule's tables, counters, markers.
_BOOKKEEPING = {
    "alphas_cumprod", "alphas_cumprod_prev", "betas", "denoiser.sigmas", "global_step", "iteration", "log_one_minus_alphas_cumprod",
    "logvar", "model_ema.decay", "model_ema.num_updates", "posterior_log_variance_clipped", "posterior_mean_coef1",
    "posterior_mean_coef2", "posterior_variance", "scale_factor", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "v_pred", "ztsnr",
}  # fmt: skip
# What other models have in their files: a part of some key, and what such a file is.
_FOREIGN = {
    ".lora_": "is an adapter (LoRA), not a base; give it as --adapter, with a base beside it",
    "lora_unet_": "is an adapter (LoRA), not a base; give it as --adapter, with a base beside it",
    "lycoris_": "is an adapter (LyCORIS), not a base; give it as --adapter, with a base beside it",
    "joint_blocks.": "is a Stable Diffusion 3 checkpoint, which sdlora does not support",
    "double_blocks.": "is a Flux checkpoint, which sdlora does not support",
    "edm_mean": "is a Playground 2.5 checkpoint (EDM), which sdlora does not support",
    "edm_vpred.sigma_max": "is a CosXL checkpoint (EDM), which sdlora does not support",
    "control_model.": "is a ControlNet, not a base; give it as --control, with a base beside it",
    "zero_convs.": "is a ControlNet, not a base; give it as --control, with a base beside it",
    "controlnet_cond_embedding.": "is a ControlNet, not a base; give it as --control, with a base beside it",
    "noise_augmentor.": "is an unCLIP model, which makes pictures of pictures, and no text-to-image base",
    ".scale_weight": "is stored in scaled fp8, which sdlora does not read; get it in fp16 or bf16",
    ".scale_input": "is stored in scaled fp8, which sdlora does not read; get it in fp16 or bf16",
    "scaled_fp8": "is stored in scaled fp8, which sdlora does not read; get it in fp16 or bf16",
    "conditioner.embedders.0.model.": "is the refiner of Stable Diffusion XL, not its base",
}
# Those of them that a file has beside all components of a family.
_FOREIGN_INSIDE = ("edm_mean", "edm_vpred.sigma_max", "noise_augmentor.", ".scale_weight", ".scale_input", "scaled_fp8")
_FOREIGN_NOISE = ("EDM", "FlowMatch")
_CLASS_CONDITIONED = (
    "its UNet is also told a class or a picture (an unCLIP or upscaling model); use a text-to-image base"
)
_FOREIGN_PIPELINES = {
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "Flux",
    "StableCascade": "Stable Cascade",
    "Wuerstchen": "Stable Cascade",
    "PixArt": "PixArt",
    "Kandinsky": "Kandinsky",
}


@dataclass(frozen=True)
class BaseFacts:
    """What is known of a base before it is loaded."""

    path: Path
    family: FamilyTraits
    prediction: Prediction | None
    """What it declares to predict; None where it declares nothing."""
    declared_by: str
    """Where it declares that, for people; "" where it does not."""
    zero_terminal_snr: bool
    components: dict[str, tuple[int, str]]
    """Component -> its number of parameters and their precision, such as "fp16" or "fp16 and fp32"."""
    files: dict[str, tuple[Path, ...]]
    """Component -> its weight files; a checkpoint is one file for all."""
    odd: tuple[str, ...]
    """What a user might want to know, a sentence each."""
    inpaints: bool = False
    """Whether its UNet is also shown a mask, and the picture around it."""


def detect_base(path: Path, variant: str = "") -> BaseFacts:
    """Return the facts of a diffusers folder or a single-file checkpoint. Raises ModelError or FormatError."""
    return _facts_of_file(path) if path.is_file() else _facts_of_folder(path, variant)


def family_of(path: Path) -> FamilyTraits:
    """Return the family of a folder or checkpoint; the folder's weights are not asked for. Raises as `detect_base`."""
    return detect_base(path).family if path.is_file() else _family_of_folder(path)


# --- folders -----------------------------------------------------------------------------------------


def _family_of_folder(folder: Path) -> FamilyTraits:
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    pipeline = str(index.get("_class_name", ""))
    for start, name in _FOREIGN_PIPELINES.items():
        if pipeline.startswith(start):
            raise ModelError(f"{folder}: is a {name} model ({pipeline}), which sdlora does not support")
    if not (folder / "unet" / "config.json").is_file():
        inside = _names_in(folder)
        raise ModelError(
            f"{folder}: is not a diffusers model folder (it has no unet/config.json"
            + (f"; it holds {', '.join(inside)}" if inside else "; it is empty")
            + "); name the folder that holds model_index.json, or a .safetensors checkpoint"
        )
    config = read_json(folder / "unet" / "config.json")
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        raise ModelError(f"{folder}: {_CLASS_CONDITIONED}")
    family = next((family for family in ALL_TRAITS if family.recognises_unet(config)), None)
    if family is None:
        raise ModelError(f"{folder}: has a UNet of an unknown kind ({config.get('addition_embed_type')!r} embedding)")
    if family is SDXL_TRAITS and not (folder / "text_encoder").is_dir() and (folder / "text_encoder_2").is_dir():
        raise ModelError(f"{folder}: is the refiner of Stable Diffusion XL, not its base")
    _check_channels(folder, config.get("in_channels", LATENT_CHANNELS))
    return family


def _check_channels(place: Path, channels: int) -> None:
    if channels not in (LATENT_CHANNELS, INPAINTING_CHANNELS):
        raise ModelError(f"{place}: {describe_channels(channels)}")


def _names_in(folder: Path) -> list[str]:
    """Return the first few names in a folder. Raises ModelError where it is none, or cannot be read."""
    try:
        return sorted(item.name for item in folder.iterdir())[:4]
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read as a file or folder ({error.strerror})") from error


def _facts_of_folder(folder: Path, variant: str) -> BaseFacts:
    family = _family_of_folder(folder)
    parts = ("unet", "vae", *family.encoder_prefixes)
    files = {part: _weight_files(folder, part, variant) for part in parts}
    components = {
        part: _summary(entry for file in files[part] for entry in read_header(file).tensors.values()) for part in parts
    }
    scheduler = folder / "scheduler" / "scheduler_config.json"
    settings = read_json(scheduler) if scheduler.is_file() else {}
    noise = str(settings.get("_class_name", ""))
    if noise.startswith(_FOREIGN_NOISE):
        raise ModelError(f"{folder}: was trained with another kind of noise ({noise}), which sdlora does not support")
    declared = settings.get("prediction_type", "epsilon")  # the format's own default
    prediction = PREDICTION_NAMES.get(str(declared))
    if not prediction:
        raise ModelError(f"{scheduler}: prediction_type is {declared!r}; sdlora knows epsilon and v_prediction")
    odd = _odd_folder(folder, family, files)
    return BaseFacts(
        path=folder,
        family=family,
        prediction=prediction,
        declared_by="scheduler/scheduler_config.json"
        + ("" if "prediction_type" in settings else ", by leaving it out"),
        zero_terminal_snr=bool(settings.get("rescale_betas_zero_snr")),
        components=components,
        files=files,
        odd=(*odd, *_odd_precisions(components)),
        inpaints=read_json(folder / "unet" / "config.json").get("in_channels") == INPAINTING_CHANNELS,
    )


def _weight_files(folder: Path, part: str, variant: str) -> tuple[Path, ...]:
    """Return the safetensors files of one component. Raises ModelError where there are none."""
    patterns = weight_patterns(variant)
    found = tuple(file for pattern in patterns for file in sorted((folder / part).glob(pattern)))
    if not found:
        others = sorted(file.name for file in (folder / part).glob("*.*"))
        raise ModelError(
            f"{folder}: holds no {part}/{patterns[0]} (there: {', '.join(others) or 'nothing'}); "
            "sdlora reads only safetensors, since pickles could run code when opened; base.variant picks "
            "files such as *.fp16.safetensors"
        )
    return found


def weight_patterns(variant: str) -> tuple[str, str]:
    """Return the patterns of a component's weight files: whole, and in parts. Other variants do not match."""
    name = f"*model.{variant}" if variant else "*model"
    return f"{name}.safetensors", f"{name}-?????-of-?????.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ModelError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: does not describe a model; download or export it again")
    return value


# --- single files ------------------------------------------------------------------------------------


def _facts_of_file(path: Path) -> BaseFacts:
    if path.suffix in {".ckpt", ".pt", ".pth", ".bin"}:
        raise ModelError(
            f"{path}: is a pickle checkpoint, which could run code when opened; get the .safetensors version, or "
            "convert it with a program that you trust it to"
        )
    header = read_header(path)
    family = _family_of_keys(path, header)
    prefixes = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, **family.encoder_prefixes}
    components = {
        name: _summary(entry for key, entry in header.tensors.items() if key.startswith(prefix))
        for name, prefix in prefixes.items()
    }
    prediction, declared_by = _declared(header)
    return BaseFacts(
        path=path,
        family=family,
        prediction=prediction,
        declared_by=declared_by,
        zero_terminal_snr="ztsnr" in header.tensors,
        components=components,
        files=dict.fromkeys(prefixes, (path,)),
        odd=(
            *_odd_tensors(header, tuple(prefixes.values())),
            *_odd_precisions(components),
            *_undeclared(prediction),
        ),
        inpaints=header.tensors[FIRST_LAYER].shape[1] == INPAINTING_CHANNELS,
    )


def _family_of_keys(path: Path, header: SafetensorsHeader) -> FamilyTraits:
    keys = header.tensors
    for family in ALL_TRAITS:
        prefixes = family.encoder_prefixes.values()
        if FIRST_LAYER in keys and all(any(key.startswith(prefix) for key in keys) for prefix in prefixes):
            break
    else:
        raise ModelError(f"{path}: {_describe_foreign(keys)}")
    if not any(key.startswith(VAE_PREFIX) for key in keys):
        raise ModelError(f"{path}: holds no VAE; use the full checkpoint, not a part of it")
    for mark in _FOREIGN_INSIDE:
        if any(mark in key for key in keys):
            raise ModelError(f"{path}: {_FOREIGN[mark]}")
    if not family.takes_sizes and any(key.startswith(UNET_PREFIX + "label_emb.") for key in keys):
        raise ModelError(f"{path}: {_CLASS_CONDITIONED}")
    shape = keys[FIRST_LAYER].shape
    _check_channels(path, shape[1] if len(shape) == 4 else 0)
    return family


def _describe_foreign(keys: Mapping[str, TensorEntry]) -> str:
    for mark, sentence in _FOREIGN.items():
        if any(mark in key for key in keys):
            return sentence
    if any(key.startswith(("decoder.conv_in.", VAE_PREFIX)) for key in keys) and FIRST_LAYER not in keys:
        return "is a VAE alone; use a full checkpoint"
    if FIRST_LAYER in keys:
        return "holds no text encoder; use the full checkpoint, not the UNet alone"
    if any(key.startswith("down_blocks.") for key in keys):
        return "is a single component of a diffusers folder; name the folder that holds model_index.json"
    return (
        f"holds no Stable Diffusion checkpoint ({len(keys)} tensors, such as {next(iter(sorted(keys)), 'none')!r}); "
        "a base has UNet, VAE and text encoder in one file"
    )


def _declared(header: SafetensorsHeader) -> tuple[Prediction | None, str]:
    """Return what a checkpoint declares to predict, and where."""
    for marker in ("v_pred", "ztsnr"):  # predicting epsilon from noise without signal would be empty
        if marker in header.tensors:
            return "v", f"its marker tensor {marker}"
    stated = header.metadata.get("modelspec.prediction_type", "").lower()
    for name, theirs in PREDICTION_TYPES.items():
        if stated in (name, theirs):
            return name, "its metadata modelspec.prediction_type"
    architecture = header.metadata.get("modelspec.architecture", "")
    if architecture in ("stable-diffusion-v2-512", "stable-diffusion-v2-768-v"):
        return ("v" if architecture.endswith("-v") else "epsilon"), "its metadata modelspec.architecture"
    return None, ""


# --- what is odd -------------------------------------------------------------------------------------


def _summary(entries: Iterable[TensorEntry]) -> tuple[int, str]:
    """Return the number of parameters and their precision, the most frequent first."""
    counts: dict[str, int] = {}
    for entry in entries:
        if entry.dtype.startswith(("F", "BF")):
            size = 1
            for side in entry.shape:
                size *= side
            name = _PRECISIONS.get(entry.dtype, entry.dtype)
            counts[name] = counts.get(name, 0) + size
    return sum(counts.values()), " and ".join(sorted(counts, key=lambda name: -counts[name]))


def _odd_folder(folder: Path, family: FamilyTraits, files: Mapping[str, Sequence[Path]]) -> list[str]:
    odd = []
    if not (folder / "model_index.json").is_file():
        odd.append("there is no model_index.json: other programs will not take it for a model folder")
    tokenizers = [tokenizer_folder(encoder) for encoder in family.encoder_prefixes]
    needed = [f"{part}/config.json" for part in files] + ["scheduler/scheduler_config.json", *tokenizers]
    odd += [f"it cannot be loaded: {name} is missing" for name in needed if not (folder / name).exists()]
    for part, found in files.items():
        count = re.search(r"-of-(\d{5})\.safetensors$", found[-1].name)
        if count and len(found) != int(count[1]):
            odd.append(f"it cannot be loaded: its {part} is in {int(count[1])} files, of which {len(found)} are there")
    pickles = [f"{part}/{file.name}" for part in files for file in sorted((folder / part).glob("*.bin"))]
    if pickles:
        odd.append(f"pickle files lie in it and are never opened ({', '.join(pickles)})")
    return odd


def _odd_precisions(components: Mapping[str, tuple[int, str]]) -> list[str]:
    odd = [f"its {part} mixes {precision}" for part, (_, precision) in components.items() if " and " in precision]
    for part, (_, precision) in components.items():
        if "fp8" in precision:
            odd.append(f"its {part} is stored in fp8, which has lost detail that no precision brings back")
    return odd


def _odd_tensors(header: SafetensorsHeader, prefixes: tuple[str, ...]) -> list[str]:
    odd = []
    ema = [key for key in header.tensors if key.startswith(_EMA_PREFIX)]
    if len(ema) > len(_BOOKKEEPING):
        size = sum(header.tensors[key].end - header.tensors[key].start for key in ema)
        odd.append(f"it also holds averaged (EMA) weights, {size / 1e9:.2f} GB that sdlora does not use")
    positions = [key for key in header.tensors if key.endswith("position_ids")]
    if any(header.tensors[key].dtype.startswith(("F", "BF")) for key in positions):
        odd.append("its text encoder's position_ids are stored as fractions, a trace of a careless merge; unused here")
    known = (*prefixes, _EMA_PREFIX)
    others = sorted(key for key in header.tensors if not key.startswith(known) and key not in _BOOKKEEPING)
    if others:
        odd.append(f"it holds {len(others)} tensors besides its components, such as {others[0]}; unused here")
    return odd


def _undeclared(prediction: Prediction | None) -> list[str]:
    if prediction:
        return []
    return ["it does not say whether it predicts epsilon or v; sdlora measures that when it loads it"]

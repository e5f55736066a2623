"""From what a user calls a base to the loaded base: folder, hub id, single file, or "tiny"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError

from sdlora.assets import CONFIGS
from sdlora.config import BaseSection
from sdlora.diffusion import Prediction
from sdlora.errors import ConfigError, ModelError
from sdlora.families.base import BaseParts, BaseSource, LoadedBase, ModelFamily
from sdlora.families.detect import BaseFacts, detect_base, family_of, read_json
from sdlora.families.latent import sampler_class
from sdlora.families.prediction import all_masked, measure_prediction
from sdlora.families.quantize import quantize_linears
from sdlora.families.sd import SD1, SD2
from sdlora.families.sdxl import SDXL
from sdlora.families.sources import checkpoint_tokenizers, find_base, folder_tokenizers
from sdlora.families.traits import PREDICTION_TYPES, FamilyTraits
from sdlora.families.weights import CheckpointWeights, FolderWeights, Weights, fill, skeleton
from sdlora.headers import read_header
from sdlora.storage import cached_sha256, folder_sha256

FAMILIES: dict[str, ModelFamily] = {family.name: family for family in (SD1, SD2, SDXL)}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_base(section: BaseSection, device: torch.device | str | None = None, *, unet: bool = True) -> LoadedBase:
    """Return the base that `section` names, on `device` (default: the GPU where there is one).

    Without `unet` its weights come later, with `fetch_unet`, when those of the encoders can be gone.
    Raises ModelError or FormatError, with one sentence, for anything that is no usable base.
    """
    _quiet_progress_bars()
    target = find_device(device)
    path = find_base(section)
    if path.is_dir() and (section.config or section.tokenizer):
        raise ConfigError(
            f"{path}: is a folder, which describes itself; base.config and base.tokenizer are for checkpoints"
        )
    facts = detect_base(path, section.variant)
    with explained(facts.path, facts.family):
        base = _assemble(section, facts, target, choose_dtype(section.precision, target))
        undeclared = section.prediction == "auto" and facts.prediction is None and not _config_declares(section)
        if undeclared:
            _measure_when_fetched(base)
        if unet or (undeclared and _size_depends_on_prediction(base)):
            base.fetch_unet()
    return base


@contextmanager
def explained(path: Path, family: FamilyTraits) -> Iterator[None]:
    """Inside, what the libraries raise for files and models that do not go together becomes a ModelError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{path}: does not fit into the GPU's memory; set base.precision to bf16 or fp16, or base.quantize to nf4"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        lines = [*str(error).strip().splitlines(), type(error).__name__]
        detail = (lines[1] if lines[0].endswith(":") else lines[0]).strip()[:200]
        advice = (
            "a checkpoint of another size needs base.config, a diffusers folder that describes it"
            if path.is_file()
            else "its weights and its settings must belong together; download or export it again"
        )
        raise ModelError(f"{path}: cannot be loaded as {family.title} ({detail}); {advice}") from error


def _assemble(section: BaseSection, facts: BaseFacts, device: torch.device, dtype: torch.dtype) -> LoadedBase:
    family = FAMILIES[facts.family.name]
    weights = stored_weights(section, facts)
    if facts.path.is_file():
        tokenizers = checkpoint_tokenizers(section, family, facts.path, weights.configs)
    else:
        tokenizers = folder_tokenizers(facts.path, family)
    unet = skeleton(UNet2DConditionModel, weights, "unet")

    def fill_unet() -> None:
        with explained(facts.path, family.traits):
            if left_out := sorted(weights.without_place("unet", unet)):
                base.notes += (
                    f"its UNet's file holds {len(left_out)} tensors for which {family.title} has no place, such as "
                    f"{left_out[0]}; they are left out, so pictures may differ from those of other programs",
                )
            if section.quantize == "none":
                fill(unet, weights, "unet", device, dtype)
            else:  # as they come from the file, so that the UNet is never there whole in `dtype`
                quantize = partial(quantize_linears, unet, section.quantize, device, dtype)
                fill(unet, weights, "unet", torch.device("cpu"), dtype, after_some=quantize)
            unet.to(device)

    index = weights.configs / "model_index.json"
    parts = BaseParts(
        source=BaseSource(section.path, facts.path, base_sha256(facts)),
        unet=unet,
        fill_unet=fill_unet,
        vae=_load_vae(family, weights, device, dtype),
        text_encoders={
            name: _load_part(part.kind, weights, name, device, dtype) for name, part in family.text_encoders.items()
        },
        tokenizers=tokenizers,
        scheduler_config=_scheduler_config(section, facts, weights),
        index=read_json(index) if index.is_file() else {},
    )
    base = family.assemble(parts, device, dtype)
    base.quantize = section.quantize
    return base


def stored_weights(section: BaseSection, facts: BaseFacts) -> Weights:
    """Return where the weights of the base that `facts` are of lie. Raises ModelError where its description is missing."""
    if facts.path.is_dir():
        return FolderWeights(facts.path, facts.files)
    configs = Path(section.config).expanduser() if section.config else CONFIGS / facts.family.name
    if not (configs / "model_index.json").is_file():
        raise ModelError(f"{configs}: base.config must be a diffusers folder with model_index.json")
    return CheckpointWeights(facts.path, read_header(facts.path), configs, facts.family.encoder_prefixes)


def _load_part(kind: Any, weights: Weights, part: str, device: torch.device, dtype: torch.dtype) -> Any:
    model = skeleton(kind, weights, part)
    fill(model, weights, part, device, dtype)
    return model


def _load_vae(family: ModelFamily, weights: Weights, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the VAE, in float32 instead of float16 where it would overflow."""
    vae = skeleton(AutoencoderKL, weights, "vae")
    overflows = dtype == torch.float16 and family.vae_overflows and vae.config.force_upcast
    fill(vae, weights, "vae", device, torch.float32 if overflows else dtype)
    return vae


def _scheduler_config(section: BaseSection, facts: BaseFacts, weights: Weights) -> dict[str, Any]:
    """Return the base's own scheduler settings, with the prediction and the end of the noise that it was trained with."""
    if not (weights.configs / "scheduler" / "scheduler_config.json").is_file():
        raise ModelError(f"{weights.configs}: holds no scheduler/scheduler_config.json; download or export it again")
    config: dict[str, Any] = dict(DDPMScheduler.load_config(weights.configs / "scheduler"))
    prediction = facts.prediction if section.prediction == "auto" else section.prediction
    if prediction is not None:
        config["prediction_type"] = PREDICTION_TYPES[prediction]
    if facts.zero_terminal_snr:
        if prediction == "epsilon":
            raise ModelError(
                f"{facts.path}: its noise ends at zero signal, where predicting epsilon says nothing; "
                'set base.prediction to "v"'
            )
        if facts.path.is_file():
            # Sampling must begin at the last timestep, the only one without signal (Lin et al. 2023, sec. 3.3).
            config |= {
                "_class_name": "EulerDiscreteScheduler",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            }
    return config


def _config_declares(section: BaseSection) -> bool:
    """Return whether the folder that the user names to describe a checkpoint says what it predicts."""
    scheduler = Path(section.config).expanduser() / "scheduler" / "scheduler_config.json"
    return bool(section.config) and scheduler.is_file() and "prediction_type" in read_json(scheduler)


def _size_depends_on_prediction(base: LoadedBase) -> bool:
    """Return whether what the base predicts decides the size of its pictures, as in SD 2.x."""
    return base.unet.config.sample_size is None and len(set(base.family.resolutions.values())) > 1


def _measure_when_fetched(base: LoadedBase) -> None:
    """Once the UNet is fetched the base predicts what it was found to predict; what that was is in its notes."""
    with torch.no_grad():  # now, because text encoders and VAE may be gone then
        no_prompt = base.family.encode_prompts(base, [None]).to(torch.device("cpu"))
        shown = all_masked(base) if base.inpaints else None
    fetch = base.unet_loader

    def fetch_and_measure() -> None:
        if fetch is not None:
            fetch()
        _adopt(base, measure_prediction(base, no_prompt, shown))

    base.unet_loader = fetch_and_measure


def _adopt(base: LoadedBase, measured: Prediction | None) -> None:
    """The base predicts `measured`, or what it was taken to where that is None."""
    if measured is None:
        base.notes += (
            f"the base does not say what it predicts, and measuring it gave no clear answer; taken as {base.prediction}",
        )
        return
    if measured != base.prediction:
        theirs = PREDICTION_TYPES[measured]
        base.scheduler.register_to_config(prediction_type=theirs)
        base.sampler_config["prediction_type"] = theirs
        if base.unet.config.sample_size is None:
            base.resolution = base.family.resolutions[measured]
    base.notes += (f"the base does not say what it predicts; measured: {measured}",)


def detect_family(path: Path) -> ModelFamily:
    """Return the family of a diffusers folder or a single-file checkpoint, told from its contents.

    Raises ModelError when it is no Stable Diffusion base that sdlora knows, saying what it is instead.
    """
    return FAMILIES[family_of(path).name]


def _quiet_progress_bars() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def find_device(name: torch.device | str | None) -> torch.device:
    """Return the device called `name`, or the default one. Raises ConfigError for one that is not there."""
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {str(name)!r}; expected cpu, cuda, cuda:1 or mps") from error
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing or (device.index or 0) >= max(1, torch.cuda.device_count() if device.type == "cuda" else 1):
        raise ConfigError(f"device is {str(name)!r}, which torch does not see here; 'sdlora doctor' tells more")
    return device


def default_device() -> torch.device:
    """Return the CUDA device where there is one, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the number format that `precision` names; of "auto" the one that the device does best."""
    if precision != "auto":
        return _DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


@dataclass(frozen=True)
class BaseDescription:
    """What the files of a base say of it, which are read once and not loaded."""

    section: BaseSection
    facts: BaseFacts

    @cached_property
    def sha256(self) -> str:
        """By which recipes know it."""
        return base_sha256(self.facts)

    @property
    def prediction(self) -> Prediction | None:
        """What it predicts; None where nobody says."""
        return self.facts.prediction if self.section.prediction == "auto" else self.section.prediction

    @cached_property
    def sampler(self) -> str:
        """The class of the sampler that it ships with. Raises ModelError where it names none."""
        return sampler_class(_scheduler_config(self.section, self.facts, stored_weights(self.section, self.facts)))

    @cached_property
    def side(self) -> int:
        """Of the pictures that it makes, in pixels."""
        configs = stored_weights(self.section, self.facts).configs
        unet, vae = (configs / part / "config.json" for part in ("unet", "vae"))
        size = read_json(unet).get("sample_size") if unet.is_file() else None
        if isinstance(size, int) and vae.is_file():
            factor: int = 2 ** (len(read_json(vae).get("block_out_channels", "1234")) - 1)
            return size * factor
        return FAMILIES[self.facts.family.name].resolutions[self.prediction or "epsilon"]


def describe_base(section: BaseSection) -> BaseDescription:
    """Return what the base that `section` names is. Raises ModelError or FormatError for anything that is no usable one."""
    return BaseDescription(section, detect_base(find_base(section), section.variant))


def base_sha256(facts: BaseFacts) -> str:
    """Return the SHA-256 by which recipes name a base: of a checkpoint's file, or of a folder's weight files."""
    if facts.path.is_file():
        return cached_sha256(facts.path)
    return folder_sha256(facts.path, [file for files in facts.files.values() for file in files])

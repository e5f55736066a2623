"""One description of a training run, for TOML files, command-line flags, the page and the metadata.

Field descriptions are the documentation: `sdlora train --help` and docs/training.md show them.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdlora.errors import ConfigError
from sdlora.storage import write_text

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Quantization = Literal["none", "int8", "nf4"]
TARGET_PRESETS = ("cross-attention", "attention", "transformer", "resnet")
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the configuration: typed, frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BaseSection(Section):
    """The Stable Diffusion model to train on."""

    path: str = ""
    """"tiny" (the base that ships with sdlora), a diffusers folder, a .safetensors checkpoint or a Hugging Face id."""
    revision: str = ""
    """Branch, tag or commit of a Hugging Face id; empty: its main branch."""
    variant: str = ""
    """File variant of a Hugging Face id or folder, such as "fp16"."""
    config: str = ""
    """For a .safetensors checkpoint of an unusual architecture: a diffusers folder that describes it."""
    tokenizer: str = ""
    """For a .safetensors checkpoint: folder or Hugging Face id of the tokenizer, when none is found."""
    precision: Precision = "auto"
    """Number format of the frozen base; auto: bf16 where the GPU has it, else fp16 on a GPU and fp32 on a CPU. The adapter is always fp32."""
    quantize: Quantization = "none"
    """Hold the linear layers of the UNet's attention blocks in fewer bits: int8, or nf4 with double quantisation (QLoRA)."""
    prediction: Literal["auto", "epsilon", "v"] = "auto"
    """What the UNet predicts; auto: as the base declares, measured where it declares nothing."""


class DataSection(Section):
    """The pictures and their captions."""

    folder: str = ""
    """Folder of pictures, searched with its subfolders; a .txt or .caption file of the same name holds the caption."""
    caption: str = ""
    """Caption of every picture that has no caption file; empty: such pictures are an error."""
    trigger: str = ""
    """The new word that calls the concept; replaces "[trigger]" in captions and goes into the file's metadata."""
    prior_folder: str = ""
    """Folder of captioned pictures of other things, on which the adapter is held to what the base alone predicts (prior preservation); empty: none."""
    resolution: Count = 0
    """Side in pixels of the square whose area every training picture gets; 0: the base's own."""
    buckets: bool = True
    """Group pictures by aspect ratio; false: crop all to squares."""
    repeats: Positive = 1
    """How often each picture comes in one epoch."""
    flip: bool = False
    """Mirror each picture at random; not for subjects with a left and a right."""
    caption_dropout: Share = 0.0
    """Share of examples trained with an empty caption."""


class AdapterSection(Section):
    """What is trained."""

    rank: Positive = 16
    """Width of the low-rank update of each layer."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
    """Scale of the update is alpha / rank."""
    targets: tuple[str, ...] = ("attention",)
    """Presets (cross-attention, attention, transformer, resnet) or patterns of module paths such as "attn2.to_*"."""
    text_encoder: bool = False
    """Also train LoRA in the text encoders."""
    text_encoder_targets: tuple[str, ...] = ("attention",)
    """Presets (attention, transformer) or patterns, when text_encoder is set."""
    dropout: ShareBelowOne = 0.0
    """Share of adapter inputs set to zero while training."""


class OptimizerSection(Section):
    """How weights change."""

    kind: Literal["adamw8bit", "adamw"] = "adamw8bit"
    """adamw8bit keeps its state in 8 bits (bitsandbytes); where that cannot load, adamw is used and said so."""
    learning_rate: Rate = 2e-4
    """Learning rate of the UNet's adapter."""
    text_encoder_learning_rate: Rate = 5e-5
    """Learning rate of the text encoder's adapter."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.99)
    """Decay rates of Adam's moments."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Decoupled weight decay."""
    epsilon: Rate = 1e-8
    """Adam's epsilon."""
    clip_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Largest norm of the gradient over all trained weights; 0: no clipping."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_steps: Count = 10
    """Optimizer steps over which the learning rate rises from zero."""


class TrainingSection(Section):
    """The run."""

    steps: Positive = 1000
    """Optimizer steps."""
    batch_size: Positive = 1
    """Pictures per batch and process."""
    accumulate_batches: Positive = 1
    """Batches per optimizer step."""
    seed: Count = 0
    """Same seed, data and machine: same adapter."""
    min_snr_gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    """Weighs timesteps by signal-to-noise ratio, capped here (Hang et al. 2023); 0: plain loss."""
    prior_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Weight of the pictures of data.prior_folder in the loss."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    checkpoint_every_steps: Count = 0
    """Save the whole training state this often, to resume from; 0: only at Ctrl-C."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""


class ValidationSection(Section):
    """A loss that can be compared between steps and runs: fixed noise on pictures never trained on."""

    folder: str = ""
    """Folder of held-out pictures with captions; empty: no validation."""
    every_steps: Count = 100
    """How often it is measured; it is always measured before the first and after the last step. 0: only then."""
    timesteps: Positive = 8
    """Noise levels per picture, evenly spread over the schedule."""


class SamplesSection(Section):
    """Pictures made while training, same seeds each time."""

    prompts: tuple[str, ...] = ()
    """One picture per prompt; "[trigger]" is replaced."""
    every_steps: Count = 250
    """How often; 0: only at the end."""
    steps: Positive = 25
    """Denoising steps."""
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    """Strength of the prompt."""
    seed: Count = 0
    """Seed of the first prompt's picture, the next prompts' follow."""


class OutputSection(Section):
    """Where results go."""

    folder: str = ""
    """The run folder: adapter, config.toml, events.jsonl, samples, checkpoints."""
    name: str = "adapter"
    """File name of the adapter, without .safetensors."""
    overwrite: bool = False
    """Replace an earlier run in the same folder."""
    save_every_steps: Count = 0
    """Also save NAME-STEP.safetensors this often."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Also log loss and learning rate there; needs that program installed (pip install "sdlora[trackers]")."""


class TrainConfig(Section):
    """A whole training run."""

    base: BaseSection = BaseSection()
    data: DataSection = DataSection()
    adapter: AdapterSection = AdapterSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    validation: ValidationSection = ValidationSection()
    samples: SamplesSection = SamplesSection()
    output: OutputSection = OutputSection()


SectionType = TypeVar("SectionType", bound=Section)


def validated(kind: type[SectionType], values: Mapping[str, Any], where: str) -> SectionType:
    """Return `kind` made of `values`. Raises one ConfigError that names every wrong key and value."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_problem(kind, dict(item)) for item in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(problems)) from error


def parse_config(values: Mapping[str, Any], where: str = "configuration") -> TrainConfig:
    """Return the checked configuration of a training run. Raises ConfigError."""
    return validated(TrainConfig, values, where)


def load_config(path: Path) -> dict[str, Any]:
    """Return the nested values of a TOML file, unchecked. Raises ConfigError when it does not parse."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such configuration file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML ({error})") from error


def require_complete(config: TrainConfig) -> None:
    """Raise one ConfigError for everything that only a whole configuration shows to be missing or at odds."""
    problems = []
    if not config.base.path:
        problems.append('base.path is not set (for example "tiny", a folder, or a .safetensors file)')
    if not config.data.folder:
        problems.append("data.folder is not set (the folder of training pictures)")
    if not config.output.folder:
        problems.append("output.folder is not set (where the adapter goes)")
    if not re.fullmatch(r"[\w. -]+", config.output.name) or config.output.name.startswith("."):
        problems.append(f"output.name is {config.output.name!r}; use letters, digits, '-', '_' and '.'")
    if config.data.resolution % 8:
        problems.append(f"data.resolution is {config.data.resolution}; it must be a multiple of 8")
    if not config.adapter.targets:
        problems.append(f"adapter.targets is empty; name one of {', '.join(TARGET_PRESETS)} or module patterns")
    if config.optimizer.warmup_steps > config.training.steps:
        problems.append(
            f"optimizer.warmup_steps is {config.optimizer.warmup_steps}, more than "
            f"training.steps = {config.training.steps}"
        )
    if problems:
        raise ConfigError("configuration: " + "; ".join(problems))


def write_config(config: TrainConfig, path: Path) -> None:
    """`path` holds the resolved configuration as TOML that `load_config` reads back to the same values."""
    write_text(path, tomli_w.dumps(config.model_dump(mode="json")))


def field_descriptions(kind: type[Section] = TrainConfig) -> dict[str, str]:
    """Return {"section.field": description} in order, for help texts and the documentation."""
    found: dict[str, str] = {}
    for name, info in kind.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            inside = field_descriptions(info.annotation)
            found |= {f"{name}.{key}": text for key, text in inside.items()}
        else:
            found[name] = info.description or ""
    return found


def _problem(kind: type[Section], item: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(kind, key)}"
    if item["type"] == "missing":
        return f"{key} is not given"
    expectation = item["msg"].removeprefix("Value error, ")
    if not key:
        return expectation
    return f"{key} is {reprlib.repr(item['input'])}; {expectation[0].lower() + expectation[1:]}"


def _nearest(kind: type[Section], key: str) -> str:
    """Return "; did you mean ...?": the same name in another section, the nearest key, the nearest name."""
    known = list(field_descriptions(kind))
    last_names = {path.rpartition(".")[2]: path for path in reversed(known)}  # the first section wins
    sections = {path.split(".")[0]: path.split(".")[0] for path in known if "." in path}
    last = key.rpartition(".")[2]
    if last in last_names:
        return f"; did you mean {last_names[last]}?"
    for word, names, cutoff in ((key, {path: path for path in known} | sections, 0.75), (last, last_names, 0.7)):
        if close := difflib.get_close_matches(word, names, n=1, cutoff=cutoff):
            return f"; did you mean {names[close[0]]}?"
    return f"; known are {', '.join(sections or known)}"

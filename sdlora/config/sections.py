"""The tables of a training run but its data; the page, the flags and the metadata use them too."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sdlora.config.data import DataSection
from sdlora.config.section import Count, NotNegative, Positive, Rate, Section, ShareBelowOne

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Quantization = Literal["none", "int8", "nf4"]
TARGET_PRESETS = ("cross-attention", "attention", "transformer", "resnet")


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


class AdapterSection(Section):
    """What is trained."""

    rank: Positive = 16
    """Width of the low-rank update of each layer."""
    alpha: Rate = 16.0
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
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay."""
    epsilon: Rate = 1e-8
    """Adam's epsilon."""
    clip_norm: NotNegative = 1.0
    """Largest norm of the gradient over all trained weights; 0: no clipping."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_steps: Count = 10
    """Optimizer steps over which the learning rate rises from zero."""


class TrainingSection(Section):
    """The run."""

    steps: Positive = 1000
    """Optimizer steps."""
    batch_size: Annotated[int, Field(gt=0, le=10_000)] = 1
    """Pictures per batch and process."""
    accumulate_batches: Positive = 1
    """Batches per optimizer step."""
    seed: Count = 0
    """Same seed, data and machine: same adapter."""
    min_snr_gamma: NotNegative = 5.0
    """Weighs timesteps by signal-to-noise ratio, capped here (Hang et al. 2023); 0: plain loss."""
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
    guidance_scale: NotNegative = 5.0
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

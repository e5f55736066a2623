"""The tables of a training run but its data; the page, the flags and the metadata use them too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sdlora.config.data import DataSection
from sdlora.config.section import Count, NotNegative, Positive, Rate, Section, Share, ShareBelowOne

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Quantization = Literal["none", "int8", "nf4"]
OPTIMIZERS = (
    "adamw8bit", "adamw", "paged-adamw8bit", "lion", "lion8bit", "adafactor", "prodigy", "schedule-free",
)  # fmt: skip
_OPTIMIZER = rf"^({'|'.join(OPTIMIZERS)}|[A-Za-z_]\w*(\.[A-Za-z_]\w*)+)$"
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

    kind: Literal["lora", "loha", "lokr", "full"] = "lora"
    """lora: a product of two narrow matrices; loha, lokr (LyCORIS): their elementwise or Kronecker product, smaller at equal rank; full: the layers' whole weights, saved as the difference."""
    rank: Annotated[int, Field(gt=0, le=4096)] = 16
    """Width of the update of each layer."""
    alpha: Rate = 16.0
    """Scale of the update is alpha / rank."""
    conv_rank: Count = 0
    """Rank of convolutions larger than 1 x 1; 0: as the others."""
    conv_alpha: NotNegative = 0.0
    """alpha of those; 0: in proportion to their rank."""
    ranks: dict[str, Positive] = Field(default={})
    """Ranks by pattern of layers, such as "up_blocks.*" = 8; of several that match the last one counts, alpha is in proportion. In TOML only: the table [adapter.ranks]."""
    targets: tuple[str, ...] = ("attention",)
    """Presets (cross-attention, attention, transformer, resnet) or patterns of module paths such as "attn2.to_*"."""
    text_encoder: bool = False
    """Also train the text encoders."""
    text_encoder_parts: tuple[Literal["text_encoder", "text_encoder_2"], ...] = ("text_encoder", "text_encoder_2")
    """Which of SDXL's two text encoders are trained."""
    text_encoder_targets: tuple[str, ...] = ("attention",)
    """Presets (attention, transformer) or patterns, when text_encoder is set."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA), so that higher ranks learn as fast as low ones."""
    dora: bool = False
    """Train the length of each row of a layer's weight apart from its direction (DoRA)."""
    start: Literal["zero", "pissa", "olora"] = "zero"
    """Where LoRA starts: no update; or the layer's own largest singular vectors (PiSSA) or orthonormal ones (OLoRA), of which only the change is saved."""
    lokr_factor: Count = 0
    """For lokr: size of the left matrix; 0: as nearly square as the layer allows."""
    dropout: ShareBelowOne = 0.0
    """Share of adapter inputs set to zero while training."""
    rank_dropout: ShareBelowOne = 0.0
    """Share of the rank left out in each step."""
    module_dropout: ShareBelowOne = 0.0
    """Share of layers whose update is left out in each step."""
    max_norm: NotNegative = 0.0
    """After each step the update of a layer is scaled down to at most this Frobenius norm; 0: free."""


class TokensSection(Section):
    """New words of the prompt language (textual inversion), alone or with an adapter (pivotal tuning)."""

    train: Literal["none", "alone", "first", "together"] = "none"
    """alone: only new words; first: the words, then the adapter; together: both at once. Each trigger becomes a new word."""
    vectors: Annotated[int, Field(ge=0, le=75)] = 0
    """How many vectors a word stands for; 0: as many as the text it starts from has tokens."""
    start: Literal["trigger", "class", "words", "random"] = "trigger"
    """What a word starts as: the tokens its letters are made of (nothing changes at first), its class_prompt, tokens.words, or random vectors."""
    words: str = ""
    """What the new thing looks like, in words that the base knows, to start from: "small blue robot with one eye"."""
    learning_rate: Rate = 1e-3
    """Learning rate of the words' vectors."""
    handover: Share = 0.5
    """Share of the steps after which the words stay as they are; with "first" the adapter's training begins there."""
    keep_norm: bool = True
    """Keep each vector's length within that of the base's own words."""
    save: Literal["beside", "bundled"] = "beside"
    """beside: each word as an embedding file of its own, which every program reads; bundled: inside the adapter file, which diffusers refuses."""


class OptimizerSection(Section):
    """How weights change."""

    kind: Annotated[str, Field(pattern=_OPTIMIZER)] = "adamw8bit"
    """adamw8bit (32 bits where that cannot load), adamw, paged-adamw8bit, lion, lion8bit, adafactor, prodigy, schedule-free, or a class as "package.module.Class"."""
    arguments: dict[str, Any] = Field(default={})
    """More arguments of the optimizer's class. In TOML only: the table [optimizer.arguments]."""
    learning_rate: Rate = 2e-4
    """Learning rate of the UNet's adapter."""
    text_encoder_learning_rate: Rate = 5e-5
    """Learning rate of the text encoder's adapter."""
    text_encoder_2_learning_rate: NotNegative = 0.0
    """That of SDXL's second text encoder; 0: as the first."""
    learning_rates: dict[str, NotNegative] = Field(default={})
    """Learning rates by pattern of layers, such as "unet.down_blocks.*" = 1e-4; 0: not trained; of several that match the last one counts. In TOML only: the table [optimizer.learning_rates]."""
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1000)] = 1.0
    """The up matrix of LoRA learns so many times faster than down (LoRA+); 1: equally fast."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.99)
    """Decay rates of the moments."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay; new words, DoRA's magnitudes and factors that start as pissa or olora have none."""
    epsilon: Rate = 1e-8
    """Adam's epsilon."""
    clip_norm: NotNegative = 1.0
    """Largest norm of the gradient over all trained weights; 0: no clipping."""
    schedule: Literal["constant", "linear", "cosine", "restarts", "polynomial"] = "cosine"
    """Course of the learning rate after warm-up; restarts: several cosines."""
    warmup_steps: Count = 10
    """Optimizer steps over which the learning rate rises from zero."""
    cycles: Positive = 3
    """Number of cosines with schedule = "restarts"."""
    power: Rate = 2.0
    """Exponent of schedule = "polynomial"."""
    final_share: Share = 0.0
    """Share of the learning rate that is left at the end."""


class ObjectiveSection(Section):
    """What the model learns from each example: noise, timesteps, and how errors count."""

    loss: Literal["mse", "l1", "huber"] = "mse"
    """How an error counts: squared, absolute, or squared near zero and absolute beyond huber_c."""
    huber_c: Rate = 0.1
    """Where the Huber loss turns."""
    huber_schedule: Literal["constant", "snr"] = "snr"
    """snr: huber_c falls from 1 at noise-free timesteps to its value at pure noise, exactly: (1 - c) / (1 + sigma)^2 + c."""
    weighting: Literal["none", "min-snr", "debiased", "p2"] = "min-snr"
    """How timesteps are weighed by their signal-to-noise ratio."""
    min_snr_gamma: Rate = 5.0
    """The cap of min-snr (Hang et al. 2023)."""
    p2_gamma: Rate = 1.0
    """The exponent of p2 (Choi et al. 2022)."""
    noise_offset: Share = 0.0
    """Strength of noise that is equal over each channel, for darker and brighter pictures; 0.05 to 0.1 is usual."""
    pyramid_discount: ShareBelowOne = 0.0
    """Strength, from level to level, of noise at coarser and coarser scales; 0: none, 0.3 is mild."""
    input_perturbation: Share = 0.0
    """Strength of noise added to the model's input alone; 0.1 is usual."""
    timesteps: Literal["uniform", "logit-normal", "snr"] = "uniform"
    """How often each timestep is drawn; snr: in proportion to the weights of `weighting`, which then are 1."""
    logit_mean: Annotated[float, Field(ge=-10, le=10)] = 0.0
    """For logit-normal: which part of the schedule; 0 the middle, above 0 noisier."""
    logit_std: Annotated[float, Field(gt=0, le=10)] = 1.0
    """For logit-normal: how wide."""
    antithetic: bool = False
    """Draw noise in pairs of opposite sign within a batch, which lowers the variance of its gradient."""
    min_timestep: Count = 0
    """First timestep that is trained."""
    max_timestep: Count = 0
    """First timestep that is no longer trained; 0: all to the end of the schedule."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise (Lin et al. 2023); for bases that predict v."""


class TrainingSection(Section):
    """The run."""

    steps: Count = 0
    """Optimizer steps; 0: as many as steps_per_picture gives."""
    steps_per_picture: Positive = 100
    """How many epochs are trained where steps is 0: so often is each picture seen, times its repeats."""
    batch_size: Annotated[int, Field(gt=0, le=10_000)] = 1
    """Pictures per batch and process."""
    micro_batch: Count = 0
    """So many pictures of a batch are computed at once, which changes nothing but what an adapter's dropout draws; 0: all, and fewer where memory runs out."""
    accumulate_batches: Positive = 1
    """Batches per optimizer step."""
    seed: Count = 0
    """Same seed, data and machine: same adapter."""
    ema_decay: ShareBelowOne = 0.0
    """Save, sample and validate the exponential moving average of the trained weights; 0: the weights themselves, 0.99 to 0.999 is usual."""
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
    formats: tuple[Literal["kohya", "diffusers", "peft"], ...] = ("kohya",)
    """The finished adapter is written in each of them: NAME.safetensors, NAME-diffusers.safetensors, the folder NAME-peft."""
    metadata: Literal["full", "minimal", "none"] = "full"
    """Text in what is saved: how it was trained, what programs need to use it rightly, or none."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Also log loss and learning rate there; needs that program installed (pip install "sdlora[trackers]")."""


class TrainConfig(Section):
    """A whole training run."""

    preset: Literal["none", "subject", "style", "character", "fast"] = "none"
    """A starting point for settings that are not given: one thing, a style, a person or figure, or a first look in little time."""
    base: BaseSection = BaseSection()
    data: DataSection = DataSection()
    adapter: AdapterSection = AdapterSection()
    tokens: TokensSection = TokensSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    validation: ValidationSection = ValidationSection()
    samples: SamplesSection = SamplesSection()
    output: OutputSection = OutputSection()

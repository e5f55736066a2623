"""What a family of Stable Diffusion models must be able to do, and what a loaded base is.

Everything outside `sdlora.families` talks to models through `ModelFamily`; a difference between
families is data or one method here, never a question asked elsewhere.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch

from sdlora.config import Quantization
from sdlora.diffusion import Prediction
from sdlora.errors import ConfigError
from sdlora.families.traits import INPAINTING_CHANNELS, PREDICTION_NAMES, FamilyTraits

_ADAPTER_MARKS = (".lora_", ".hada_", ".lokr_")
"""In the names of an adapter's weights, whatever its kind; no base weight's name has them."""


Segments = Sequence[tuple[str, float]]
"""A prompt's texts with their weights; `traits.BREAK_SEGMENT` ends a chunk of tokens."""
Emphasis = Literal["original", "no norm", "comfy"]


@dataclass(frozen=True)
class PromptStyle:
    """How weighted prompts are understood."""

    emphasis: Emphasis = "original"
    """"original" multiplies states and keeps the mean of each chunk as it was, "no norm" does not keep it; "comfy" moves
    them away from what an empty prompt gives."""
    clip_skip: int = 1
    """Which of a text encoder's layers is taken, 1 the last, 2 the one before; of SDXL, which takes 2, never the last."""


PLAIN = PromptStyle()


Words = Mapping[str, Mapping[str, torch.Tensor]]
"""New words of the prompt language: {word: {text encoder: vectors [n,D]}}."""


@dataclass(frozen=True)
class BaseSource:
    """Where base weights came from, and their content's name."""

    name: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: hidden states [B,L,D] and, where a family has one, the pooled embedding [B,P]."""

    states: torch.Tensor
    pooled: torch.Tensor | None = None

    def rows(self, index: Sequence[int]) -> Conditioning:
        """Return the chosen rows, in that order."""
        chosen = torch.as_tensor(list(index), device=self.states.device)
        return Conditioning(self.states[chosen], None if self.pooled is None else self.pooled[chosen])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Conditioning:
        """Return it on `device`, in `dtype`."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Conditioning(self.states.to(device, dtype), pooled)

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """Return all rows of `parts` as one."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        states = torch.cat([part.states for part in parts])
        return Conditioning(states, torch.cat(pooled) if pooled else None)


@dataclass(frozen=True)
class Residuals:
    """What ControlNets add to what the first half of a UNet hands to its second half, for each row of a batch."""

    down: tuple[torch.Tensor, ...]
    mid: torch.Tensor

    def scaled(self, strengths: torch.Tensor) -> Residuals:
        """Return them times a strength for each row, [R]."""
        rows = strengths.to(self.mid)[:, None, None, None]
        return Residuals(tuple(one * rows for one in self.down), self.mid * rows)

    def __add__(self, other: Residuals) -> Residuals:
        """Return what both add together."""
        down = tuple(one + another for one, another in zip(self.down, other.down, strict=True))
        return Residuals(down, self.mid + other.mid)


@dataclass(frozen=True)
class PictureSize:
    """What SDXL is told about a training or target picture, in pixels; others ignore it."""

    original: tuple[int, int]
    crop_top_left: tuple[int, int]
    target: tuple[int, int]


@dataclass
class LoadedBase:
    """The components of one base on one device.

    So that they need not be in memory all at once, VAE and text encoders can be dropped, and the UNet's
    weights can come later: until `fetch_unet` it has its structure alone.
    """

    family: ModelFamily
    source: BaseSource
    unet: Any
    vae: Any
    text_encoders: dict[str, Any]
    tokenizers: dict[str, Any]
    scheduler: Any
    device: torch.device
    dtype: torch.dtype
    resolution: int
    sampler_config: dict[str, Any] = field(default_factory=dict)
    """The scheduler that the base ships with, as its folder describes it; `scheduler` is for training."""
    zero_without_prompt: bool = False
    """Where there is no prompt, the conditioning is zero instead of that of an empty text."""
    notes: tuple[str, ...] = ()
    """What the user should know about how this base was understood."""
    quantize: Quantization = "none"
    """The form that the UNet's linear layers are held in."""
    unet_loader: Callable[[], None] | None = None
    words: Words = field(default_factory=dict)
    """New words, which prompts may use: each occurrence stands for its vectors. They may be parameters in training."""

    @property
    def prediction(self) -> Prediction:
        """What the UNet was trained to predict."""
        return PREDICTION_NAMES[self.scheduler.config.prediction_type]

    @property
    def inpaints(self) -> bool:
        """Whether the UNet takes, behind the latents, a mask and the latents of the picture with grey under it."""
        return bool(self.unet.config.in_channels == INPAINTING_CHANNELS)

    def fetch_unet(self) -> None:
        """The UNet's weights are on the device. Raises ModelError where they are not what they should be."""
        if self.unet_loader is not None:
            self.unet_loader()
            self.unet_loader = None

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """The noise schedule, [T] float32."""
        table: torch.Tensor = self.scheduler.alphas_cumprod
        return table.float()

    def components(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Yield ("unet", module), then the text encoders, then the VAE, as far as they are loaded."""
        if self.unet is not None:
            yield "unet", self.unet
        yield from self.text_encoders.items()
        if self.vae is not None:
            yield "vae", self.vae

    def drop_encoders(self, *, keep_text: bool = False) -> None:
        """VAE and text encoders are freed; pictures and prompts can no longer be encoded."""
        self.vae = None
        if not keep_text:
            self.text_encoders = {}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def weights_sha256(self) -> str:
        """SHA-256 over every base weight as it is in memory now, adapters left out.

        It is the proof that nothing wrote to the base: equal before and after.
        """
        return hashlib.sha256(
            "".join(f"{name}:{module_sha256(module)} " for name, module in self.components()).encode()
        ).hexdigest()


def module_sha256(module: torch.nn.Module) -> str:
    """SHA-256 over the names and bytes of a module's weights as they are in memory, adapters left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        if not any(mark in name for mark in _ADAPTER_MARKS):
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class ModelFamily(Protocol):
    """One family: how its bases are recognised, loaded and run."""

    traits: FamilyTraits
    name: str
    title: str
    resolutions: Mapping[Prediction, int]
    """Side of the pictures it was trained on, in pixels, where a base does not say so itself."""
    text_encoders: Mapping[str, EncoderPart]
    vae_overflows: bool
    """Whether the VAE gives NaN in float16, unless its own settings say otherwise."""
    metadata: Mapping[Prediction, Mapping[str, str]]
    """Per prediction type, the fixed ss_* and modelspec.* entries by which other programs tell the family."""
    target_presets: Mapping[str, tuple[str, ...]]
    """Preset name -> patterns of UNet module paths."""
    text_encoder_presets: Mapping[str, tuple[str, ...]]
    """Preset name -> patterns of text-encoder module paths."""

    def assemble(self, parts: BaseParts, device: torch.device, dtype: torch.dtype) -> LoadedBase:
        """Return the base made of `parts`, frozen; the UNet's weights come with `fetch_unet`. Raises ModelError."""
        ...

    def encode_images(self, base: LoadedBase, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and std of the scaled latents, each [B,4,H/8,W/8] float32, of pixels [B,3,H,W] in [-1,1]."""
        ...

    def decode_latents(self, base: LoadedBase, latents: torch.Tensor) -> torch.Tensor:
        """Return pixels [B,3,H,W] float32 in [0,1] of scaled latents [B,4,H/8,W/8]; where the VAE overflowed, NaN."""
        ...

    def encode_prompts(self, base: LoadedBase, prompts: Sequence[str | None]) -> Conditioning:
        """Return the conditioning of `prompts`, where None is no prompt at all, as in the unguided half of guidance.

        Gradients flow where a text encoder has trained weights, and to the vectors of the base's new words.
        """
        ...

    def encode_segments(
        self, base: LoadedBase, prompts: Sequence[Segments | None], style: PromptStyle = PLAIN
    ) -> Conditioning:
        """Return the conditioning of weighted prompts of any length, [B,77n,D] with n the chunks of the longest one."""
        ...

    def excess_tokens(self, base: LoadedBase, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens of each prompt, new words' vectors counted, the encoders do not see; 0 where it fits."""
        ...

    def predict(
        self,
        base: LoadedBase,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        sizes: Sequence[PictureSize],
        residuals: Residuals | None = None,
    ) -> torch.Tensor:
        """Return the UNet's output [B,4,h,w] for noisy latents of one size, [B,9,h,w] where the base inpaints.

        `residuals` is what ControlNets add.
        """
        ...

    def control(
        self,
        net: Any,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        sizes: Sequence[PictureSize],
        maps: torch.Tensor,
    ) -> Residuals:
        """Return what a ControlNet adds for noisy latents [B,4,h,w], led by maps [B,3,H,W] in [0,1]."""
        ...

    def make_pipeline(self, base: LoadedBase) -> Any:
        """Return the diffusers text-to-image pipeline over these very components."""
        ...


@dataclass(frozen=True)
class EncoderPart:
    """One text encoder of a family."""

    kind: Any
    """Its class in transformers."""
    pad_token: str = ""
    """What fills up the tokens of a short prompt; empty: the end token."""


@dataclass(frozen=True)
class BaseParts:
    """What a base is assembled of, wherever it was found."""

    source: BaseSource
    unet: Any
    """Its structure, as yet without weights."""
    fill_unet: Callable[[], None]
    vae: Any
    text_encoders: dict[str, Any]
    tokenizers: dict[str, Any]
    scheduler_config: dict[str, Any]
    index: dict[str, Any] = field(default_factory=dict)
    """The folder's model_index.json."""


def autocast(base: LoadedBase) -> AbstractContextManager[Any]:
    """Matrix products run in the base's precision, also those with an adapter's float32 weights."""
    if base.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(base.device.type, dtype=base.dtype)


def match_targets(
    module: torch.nn.Module,
    targets: Sequence[str],
    presets: Mapping[str, Sequence[str]] = MappingProxyType({}),
    setting: str = "adapter.targets",
) -> list[str]:
    """Return the sorted paths of the linear and convolution layers that any target matches.

    A target is the name of a preset, or a pattern that matches the end of a path, from a dot on, with shell
    wildcards: "attn2.to_k", "attn*.to_*", "ff.net.0.proj". Raises ConfigError, naming `setting`, for a target
    that matches nothing.
    """
    paths = [name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    chosen: set[str] = set()
    for target in targets:
        patterns = presets.get(target, (target,))
        expression = re.compile("|".join(rf"(?:.*\.)?{fnmatch.translate(pattern)}" for pattern in patterns))
        found = [path for path in paths if expression.match(path)]
        if not found:
            known = f"{', '.join(presets)}, or " if presets else ""
            raise ConfigError(
                f"{setting}: {target!r} matches no layer of this base; name {known}a pattern such as 'attn2.to_k'"
            )
        chosen.update(found)
    return sorted(chosen)

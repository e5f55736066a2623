"""`GenerationRequest`: what was asked."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sdlora.adapters.blocks import parse_block_weights
from sdlora.config import Section, validated
from sdlora.families.samplers.names import DDIM_MOST_STEPS, SAMPLERS, sampler_and_schedule
from sdlora.generation.prompts.plan import Emphases
from sdlora.generation.step_weights import parse_step_weights

SEED_LIMIT = 2**32
NoiseSource = Literal["cpu", "cuda"]
"""As which device noise is drawn."""
ZeroSnr = Literal["auto", "on", "off"]
_Side = Annotated[int, Field(ge=0, le=4096, multiple_of=8)]
_Strength = Annotated[float, Field(ge=0, le=1)]
ResizeMode = Literal["just resize", "crop and resize", "resize and fill"]
"""What a picture of another shape becomes: stretched, cut at its sides, or its edges drawn out."""
InpaintArea = Literal["whole picture", "only masked"]
MaskedContent = Literal["original", "fill", "latent noise", "latent nothing"]
LATENT_UPSCALERS = ("latent", "latent (nearest-exact)", "latent (bicubic)")
PIXEL_UPSCALERS = ("lanczos", "nearest")
Tiling = Literal["auto", "on", "off"]


class Need(NamedTuple):
    """Settings that do nothing where none of the others is there."""

    settings: tuple[str, ...]
    others: tuple[str, ...]
    value: str = ""
    """Of the first of the others, where not any will do."""

    def __str__(self) -> str:
        return f"{self.others[0]} {self.value!r}" if self.value else self.others[0]


_NEEDS = (
    Need(("strength",), ("image",)),
    Need(("resize",), ("image", "control")),
    Need(("mask_blur", "inpaint_area", "masked_padding", "masked_content"), ("mask",)),
    Need(("masked_padding",), ("inpaint_area",), "only masked"),
    Need(("hires_steps", "hires_strength", "hires_upscaler"), ("hires_scale",)),
)


class AdapterChoice(Section):
    """One adapter file and how strongly it acts."""

    path: str
    """The .safetensors file: an adapter, with its new words beside or in it, or an embedding."""
    weight: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] = 1.0
    """1 is as trained, 0 is not at all. New words act whole, but at 0."""
    text_encoder_weight: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] | None = None
    """How strongly it acts on the text encoders; not given: as on the UNet."""
    blocks: str = ""
    """What the weight is multiplied by in each block: "MIDD", "1,0,0,1,...", "IN=0, MID=1, OUT04=0.5"; empty: 1."""
    steps: str = ""
    """When it acts on the UNet: "5-20", "0.2-0.8" of the steps, or factors, "1@0, 0.5@8"; empty: always."""

    @field_validator("blocks")
    @classmethod
    def _known_blocks(cls, blocks: str) -> str:
        return _parsed(parse_block_weights, blocks)

    @field_validator("steps")
    @classmethod
    def _known_steps(cls, steps: str) -> str:
        return _parsed(parse_step_weights, steps)


def _parsed(parse: Callable[[str], object], text: str) -> str:
    """Return the text; raises ValueError where `parse` does not understand it."""
    if text:
        parse(text)
    return text


class ControlChoice(Section):
    """One ControlNet, the map that it follows, and how strongly and when."""

    model: str
    """A .safetensors file, a diffusers folder, or a Hugging Face id."""
    image: str
    """The map, ready made: edges, depth, a pose, as the ControlNet was trained on."""
    strength: Annotated[float, Field(ge=0, le=2)] = 1.0
    """1 is as trained, 0 is not at all."""
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of the steps after which it begins to act."""
    end: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The share of the steps after which it acts no more."""

    @field_validator("end")
    @classmethod
    def _after_its_start(cls, end: float, info: ValidationInfo) -> float:
        if end <= (start := info.data.get("start", -1)):
            raise ValueError(f"it must be more than start, which is {start:g}")
        return end


class GenerationRequest(Section):
    """Pictures asked for: `count` of them with seeds seed, seed + 1, ..."""

    prompt: str
    """What the picture shows."""
    negative_prompt: str = ""
    """What it should not show."""
    seed: Annotated[int, Field(ge=0, lt=SEED_LIMIT)] = 0
    """Seed of the first picture."""
    count: Annotated[int, Field(gt=0, le=10_000)] = 1
    """Number of pictures."""
    steps: Annotated[int, Field(gt=0, le=1000)] = 25
    """Denoising steps."""
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 7.5
    """How strongly the prompt steers; 1 and less: no negative prompt, half the time."""
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far the guided prediction's contrast is brought back to the unguided one's; 0.7 is usual for v-prediction."""
    sampler: str = ""
    """Such as "DPM++ 2M" or "Euler a"; left out: the base's own."""
    schedule: str = ""
    """How the steps are spaced, such as Karras; left out: the sampler's usual one."""
    zero_snr: ZeroSnr = "auto"
    """Whether noise ends in pure noise: auto where base or adapter were trained so; on; off: not for an adapter's sake."""
    noise: NoiseSource = "cpu"
    """cpu: a seed is the same picture on every device; cuda: the noise that programs drawing on a GPU have."""
    width: _Side = 0
    """Pixels, a multiple of 8; 0: the base's own size."""
    height: _Side = 0
    """Pixels, a multiple of 8; 0: the base's own size."""
    emphasis: Emphases = "original"
    """What (brackets:1.2) do: original and no norm as in AUTOMATIC1111, comfy as in ComfyUI, ignore: nothing, none: text."""
    wildcards: str = ""
    """Folder of .txt files, one choice a line: __colours__ in a prompt is a line of colours.txt."""
    clip_skip: Annotated[int, Field(ge=1, le=12)] = 1
    """Which layer of the text encoders counts: 1 the usual one, 2 the one before it."""
    adapters: tuple[AdapterChoice, ...] = ()
    """Adapters that act together."""
    control: tuple[ControlChoice, ...] = ()
    """ControlNets that act together, each with its map."""
    image: str = ""
    """A picture to start from instead of noise; where no width and height are given, the result has its size."""
    strength: _Strength = 0.75
    """How much of `image` is made anew: 0 nothing, 1 all; so much of the steps runs."""
    resize: ResizeMode = "just resize"
    """How an `image` or a map of another shape is brought to width and height."""
    mask: str = ""
    """A picture of the shape of `image`: what is white there is painted anew, the rest stays as it is."""
    mask_blur: Annotated[float, Field(ge=0, le=64)] = 4.0
    """How wide the mask's border is blurred, in pixels of `image`."""
    inpaint_area: InpaintArea = "whole picture"
    """What the model is shown: all of it, or the masked part alone, enlarged to width and height."""
    masked_padding: Annotated[int, Field(ge=0, le=1024)] = 32
    """With "only masked": how much around the mask is shown too, in pixels of `image`."""
    masked_content: MaskedContent = "original"
    """What is under the mask at first: the picture, its surroundings' colours, noise, or nothing."""
    hires_scale: Annotated[float, Field(ge=1, le=8)] = 1.0
    """So many times larger is the picture made in a second pass; 1: no second pass."""
    hires_steps: Annotated[int, Field(ge=0, le=1000)] = 0
    """Steps of the second pass; 0: as many as `steps`."""
    hires_strength: _Strength = 0.7
    """How much the second pass makes anew."""
    hires_upscaler: str = "latent"
    """What enlarges between the passes: latent, latent (nearest-exact), latent (bicubic), lanczos, nearest, or an ESRGAN file (.safetensors, .pth)."""
    vae_tiling: Tiling = "auto"
    """Whether the VAE works in tiles, which takes less memory; auto: above 1536 x 1536 pixels, or where memory runs out."""

    @model_validator(mode="after")
    def _pictures_go_together(self) -> GenerationRequest:
        if self.mask and not self.image:
            raise ValueError("mask is given without image; name the picture that it is a mask of")
        if self.image and self.hires_scale > 1:
            raise ValueError("hires_scale is for pictures made from noise; with image set width and height instead")
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> GenerationRequest:
        """Refuse what does nothing, but where the setting that it belongs to says so itself, as `hires_scale = 1`."""
        idle: dict[str, list[str]] = {}
        for name, need in idle_settings(self.model_dump(exclude_defaults=True)).items():
            if need.others[0] not in self.model_fields_set:
                idle.setdefault(str(need), []).append(name)
        if idle:
            told = [
                f"{' and '.join(names)} {'do' if len(names) > 1 else 'does'} nothing without {needed}"
                for needed, names in idle.items()
            ]
            raise ValueError(f"{', '.join(told)}; give that too, or leave it out")
        return self

    @model_validator(mode="before")
    @classmethod
    def _names_as_written_here(cls, values: Any) -> Any:
        """Put sampler and schedule as `sampler_names` has them; wrong ones stay, for their fields to refuse."""
        try:
            sampler, schedule = sampler_and_schedule(values.get("sampler", ""), values.get("schedule", ""))
        except (ValueError, AttributeError):
            return values
        return {**values, "sampler": sampler, "schedule": schedule}

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, sampler: str) -> str:
        sampler_and_schedule(sampler)
        return sampler

    @field_validator("schedule")
    @classmethod
    def _schedule_of_the_sampler(cls, schedule: str, info: ValidationInfo) -> str:
        if "sampler" in info.data:
            sampler_and_schedule(info.data["sampler"], schedule)
        return schedule

    @model_validator(mode="after")
    def _steps_for_the_sampler(self) -> GenerationRequest:
        if self.sampler and self.steps > (most := SAMPLERS[self.sampler].most_steps):
            raise ValueError(f"steps is {self.steps}; the sampler {self.sampler} takes at most {most}")
        if self.schedule == "DDIM" and self.steps > DDIM_MOST_STEPS:
            raise ValueError(
                f"steps is {self.steps}; the schedule DDIM, which counts from 1, has at most {DDIM_MOST_STEPS}"
            )
        return self

    @model_validator(mode="after")
    def _beginning_of_the_sampler(self) -> GenerationRequest:
        if self.zero_snr == "on" and self.sampler and not SAMPLERS[self.sampler].begins_at_pure_noise:
            raise ValueError(f"zero_snr is 'on'; the sampler {self.sampler} cannot begin at pure noise, use Euler")
        return self

    @model_validator(mode="after")
    def _every_seed_in_range(self) -> GenerationRequest:
        if self.seed + self.count > SEED_LIMIT:
            raise ValueError(f"seed + count must not exceed {SEED_LIMIT}")
        return self

    @field_validator("adapters")
    @classmethod
    def _no_file_twice(cls, adapters: tuple[AdapterChoice, ...]) -> tuple[AdapterChoice, ...]:
        paths = [adapter.path for adapter in adapters]
        if len(set(paths)) < len(paths):
            raise ValueError("the same adapter is named twice; give it once with the sum of the weights")
        return adapters


def idle_settings(given: Collection[str]) -> dict[str, Need]:
    """Return the given settings that do nothing, each with what it needs first."""
    found: dict[str, Need] = {}
    for need in _NEEDS:
        if not any(name in given for name in need.others):
            found |= {name: need for name in need.settings if name in given and name not in found}
    return found


def make_request(**values: Any) -> GenerationRequest:
    """Return the checked request. Raises one ConfigError for everything that is wrong."""
    return validated(GenerationRequest, values, "request")

"""The Engine: one resident base, adapters as side branches, requests in, pictures with recipes out."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdlora.adapters.file import adapter_family, read_adapter
from sdlora.adapters.fit import refuse_other_family
from sdlora.adapters.inject import add_adapter, has_float32_adapter, remove_adapter, set_adapter_weights
from sdlora.adapters.stored import adapter_hashes
from sdlora.config import BaseSection, validated
from sdlora.errors import ConfigError, FormatError, GenerationError
from sdlora.families.base import LoadedBase, PromptStyle, Words, autocast
from sdlora.families.detect import family_of
from sdlora.families.latent import sampler
from sdlora.families.prompts import chunk_count
from sdlora.families.registry import load_base
from sdlora.families.schedule import ends_in_pure_noise, zero_snr_sampler
from sdlora.families.sources import find_base
from sdlora.families.words import check_words, knowing, same_word
from sdlora.generation.denoise import denoise
from sdlora.generation.prompt_plan import PicturePrompts, PromptPlan, encoder_emphasis, picture_prompts, plan_prompt
from sdlora.generation.prompts import parse_tags
from sdlora.generation.request import AdapterChoice, GenerationRequest, Recipe, UsedAdapter
from sdlora.generation.wildcards import NO_WILDCARDS, Wildcards, read_wildcards
from sdlora.storage import user_path

_RESIDENT_ADAPTERS = 8
_ZERO_SNR = "ss_zero_terminal_snr"
"""In an adapter's metadata, here and of kohya's trainer: "True" where it was trained on the rescaled schedule."""
_PRECISION_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class StepProgress:
    """How far a request is: pictures already finished, and the denoising step of the current ones."""

    pictures_done: int
    pictures: int
    step: int
    steps: int


OnStep = Callable[[StepProgress], None]


@dataclass(frozen=True)
class _Resident:
    name: str
    words: Words
    used: UsedAdapter
    """How recipes name it; its weight is each request's."""
    zero_snr: bool
    """Whether it was trained on a schedule that ends in pure noise."""


@dataclass(frozen=True)
class _Asked:
    """One picture of a request, its choices made and its tags read."""

    seed: int
    texts: PicturePrompts
    adapters: tuple[AdapterChoice, ...]


@dataclass(frozen=True)
class _Acting:
    """What acts in a picture."""

    used: tuple[UsedAdapter, ...]
    words: Words
    zero_snr: bool


def refuse_foreign_adapters(base: BaseSection, adapters: Sequence[str]) -> None:
    """Raise ModelError or FormatError for an adapter that says it is for another family, before anything is loaded."""
    theirs = [adapter_family(path) for path in adapters]
    if not theirs:
        return
    family = family_of(find_base(base))
    for name in theirs:
        refuse_other_family(name, family, base.path)


class Engine:
    """Makes pictures with one base.

    `base` is "tiny", a folder, a .safetensors file, a hub id, a `BaseSection`, or a base already loaded.
    `live_adapters` are adapters that are in that loaded base already and act in every picture, such as
    the one being trained; new words that the base knows stay known too. `find_adapter` returns the file of the
    adapter that a prompt calls <lora:NAME>, or raises SdloraError. Base weights are never written.
    """

    def __init__(
        self,
        base: str | BaseSection | LoadedBase,
        *,
        device: str | None = None,
        live_adapters: Mapping[str, float] | None = None,
        find_adapter: Callable[[str], Path] | None = None,
    ) -> None:
        if isinstance(base, str):
            base = BaseSection(path=base)
        self.base = load_base(base, device) if isinstance(base, BaseSection) else base
        self._live = dict(live_adapters or {})
        self._find_adapter = find_adapter
        self._resident: OrderedDict[tuple[str, int, int], _Resident] = OrderedDict()
        self._sampler = sampler(self.base)
        self._names_given = 0

    def generate(
        self, request: GenerationRequest, *, batch_size: int = 1, on_step: OnStep | None = None
    ) -> Iterator[tuple[Image.Image, Recipe]]:
        """Yield the pictures of `request`, in the order of their seeds, each with its recipe.

        With the default `batch_size` of 1 a picture depends on nothing but its recipe, bit for bit; in
        larger batches it may differ in the last bits. `on_step` is called after every denoising step and
        ends the request by raising `GenerationCancelled`. Raises FormatError or ModelError for an adapter
        that cannot be used, GenerationError for a picture that came out as NaN or needs more memory than there is.
        """
        wildcards = read_wildcards(user_path(request.wildcards)) if request.wildcards else NO_WILDCARDS
        find = functools.cache(self._find)
        asked = [self._ask(request, request.seed + number, wildcards, find) for number in range(request.count)]
        done = 0
        for batch in _batches(asked, batch_size):
            # Nothing stays active across a yield: the caller may abandon this request or begin another.
            try:
                acting = self._activate(batch[0].adapters)
                with knowing(self.base, acting.words), self._sampling(acting.zero_snr):
                    pictures = self._make(request, batch, acting.used, done, on_step)
            except torch.OutOfMemoryError as error:
                raise GenerationError(
                    "the GPU's memory is too small for this; choose a smaller width or height, or fewer at a time"
                ) from error
            finally:
                set_adapter_weights(self.base, self._live)
            done += len(batch)
            yield from pictures

    def _find(self, name: str) -> str:
        """Return the file of the adapter that prompts call so. Raises SdloraError where there is none."""
        if self._find_adapter is None:
            raise ConfigError(f"the prompt asks for <lora:{name}>; name that adapter's file instead")
        return str(self._find_adapter(name))

    def _ask(self, request: GenerationRequest, seed: int, wildcards: Wildcards, find: Callable[[str], str]) -> _Asked:
        """Return what the picture with that seed is asked for. Raises ConfigError for a tag that names no adapter."""
        texts = picture_prompts(request.prompt, request.negative_prompt, seed, wildcards, request.emphasis)
        if request.emphasis == "none":
            return _Asked(seed, texts, request.adapters)
        tagged = parse_tags(texts.prompt)
        choices = {choice.path: choice for choice in request.adapters}
        for tag in tagged.tags:
            path = find(tag.name)
            if path in choices:
                raise ConfigError(f"the adapter {tag.name!r} is named twice; give it once with the sum of the weights")
            values = {"path": path, "weight": tag.unet, "text_encoder_weight": tag.text_encoder}
            choices[path] = validated(AdapterChoice, values, f"<lora:{tag.name}>")
        return _Asked(seed, replace(texts, prompt=tagged.text), tuple(choices.values()))

    def weights_sha256(self) -> str:
        """SHA-256 over the base weights as they are in memory now; equal before and after any request."""
        return self.base.weights_sha256()

    def _activate(self, adapters: Sequence[AdapterChoice]) -> _Acting:
        """Exactly these adapters act, beside the live ones; returns them and what goes with all."""
        used = []
        zero_snr = False
        words = dict(self.base.words)
        weights, text_weights = dict(self._live), dict[str, float]()
        for choice in adapters:
            resident = self._load(Path(choice.path).expanduser())
            if resident.name in weights:
                raise ConfigError(f"{choice.path}: the same adapter file is named twice; give it once")
            text = choice.weight if choice.text_encoder_weight is None else choice.text_encoder_weight
            weights[resident.name], text_weights[resident.name] = choice.weight, text
            if choice.weight != 0 or text != 0:
                _join(words, resident.words, choice.path)
                zero_snr |= resident.zero_snr
            own = None if text == choice.weight else text
            name = Path(choice.path).stem
            used.append(replace(resident.used, name=name, weight=choice.weight, text_encoder_weight=own))
        # The adapters of this picture were used last, so that only others are let go.
        while len(self._resident) > max(_RESIDENT_ADAPTERS, len(used)):
            _, oldest = self._resident.popitem(last=False)
            remove_adapter(self.base, oldest.name)
        set_adapter_weights(self.base, weights, text_weights)
        return _Acting(tuple(used), words, zero_snr)

    def _load(self, path: Path) -> _Resident:
        """Return the adapter of a file, read anew only when the file is another one than last time."""
        try:
            state = path.stat()
        except OSError as error:
            raise FormatError(f"{path}: there is no such adapter file") from error
        key = (str(path.resolve()), state.st_mtime_ns, state.st_size)
        if key in self._resident:
            self._resident.move_to_end(key)
            return self._resident[key]
        adapter = read_adapter(path)
        refuse_other_family(adapter.family, self.base.family.traits, self.base.source.name)
        check_words(self.base, adapter.tokens)
        sha256, tensor_sha256 = adapter_hashes(path)
        used = UsedAdapter(
            name=path.stem,
            sha256=sha256,
            tensor_sha256=tensor_sha256,
            weight=1.0,
            words=adapter.token_digests(),
            embedding=not adapter.layers,
        )
        self._names_given += 1
        zero_snr = adapter.metadata.get(_ZERO_SNR) == "True"
        resident = _Resident(f"file{self._names_given}", adapter.tokens, used, zero_snr)
        add_adapter(self.base, resident.name, adapter)
        self._resident[key] = resident
        return resident

    @contextmanager
    def _sampling(self, zero_snr: bool) -> Iterator[None]:
        """Inside, with `zero_snr`, pictures of a base that predicts v begin at pure noise, as in that training."""
        own = self._sampler
        if zero_snr and self.base.prediction == "v" and not ends_in_pure_noise(self.base):
            self._sampler = zero_snr_sampler(self.base)
        try:
            yield
        finally:
            self._sampler = own

    def _make(
        self,
        request: GenerationRequest,
        batch: Sequence[_Asked],
        used: tuple[UsedAdapter, ...],
        done: int,
        on_step: OnStep | None,
    ) -> list[tuple[Image.Image, Recipe]]:
        prompts = {asked.seed: asked.texts for asked in batch}
        plans = {
            seed: plan_prompt(texts.prompt, texts.negative_prompt, request.steps, request.emphasis)
            for seed, texts in prompts.items()
        }
        made: dict[int, tuple[Image.Image, Recipe]] = {}
        with torch.no_grad(), self._autocast():
            for alike in _of_one_length(self.base, plans):
                latents = self._denoise(request, alike, done + len(made), on_step)
                for seed, row in zip(alike, latents, strict=True):
                    made[seed] = self._decode(row, request), self._recipe(request, prompts[seed], seed, used)
        return [made[asked.seed] for asked in batch]

    def _denoise(
        self, request: GenerationRequest, plans: Mapping[int, PromptPlan], done: int, on_step: OnStep | None
    ) -> torch.Tensor:
        """Return the latents of pictures, by their seeds. Raises GenerationError for NaN."""
        width, height = self._size(request)

        def after_step(step: int, steps: int) -> None:
            if on_step:
                # Some samplers evaluate the UNet once more than the steps they are asked for.
                on_step(StepProgress(done, request.count, step, steps))

        latents = denoise(
            self.base,
            self._sampler,
            list(plans.values()),
            # Noise is drawn on the CPU, so that a seed means the same picture on every device.
            [torch.Generator().manual_seed(seed) for seed in plans],
            width=width,
            height=height,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            style=PromptStyle(encoder_emphasis(request.emphasis), request.clip_skip),
            after_step=after_step,
        )
        if not latents.isfinite().all():
            raise GenerationError(
                f"the UNet gave NaN for {request.prompt!r} in {_PRECISION_NAMES[self.base.dtype]}; "
                "use fp32 or bf16, or a lower adapter weight"
            )
        return latents

    def _decode(self, latents: torch.Tensor, request: GenerationRequest) -> Image.Image:
        """Return the picture of latents [4,h,w]. Raises GenerationError for NaN."""
        (picture,) = self.base.family.decode_latents(self.base, latents[None])
        if not picture.isfinite().all():
            raise GenerationError(f"the VAE gave NaN for {request.prompt!r}; use fp32 or bf16")
        return Image.fromarray((picture * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy())

    def _size(self, request: GenerationRequest) -> tuple[int, int]:
        return request.width or self.base.resolution, request.height or self.base.resolution

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.base.dtype != torch.float32 and has_float32_adapter(self.base):
            return autocast(self.base)
        return nullcontext()

    def _recipe(
        self,
        request: GenerationRequest,
        texts: PicturePrompts,
        seed: int,
        used: tuple[UsedAdapter, ...],
    ) -> Recipe:
        width, height = self._size(request)
        scheduler = self._sampler
        return Recipe(
            prompt=texts.prompt,
            negative_prompt=texts.negative_prompt,
            template=request.prompt if request.prompt != texts.prompt else "",
            negative_template=request.negative_prompt if request.negative_prompt != texts.negative_prompt else "",
            seed=seed,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            width=width,
            height=height,
            base=Path(self.base.source.name).name.removesuffix(".safetensors"),
            base_family=self.base.family.name,
            base_sha256=self.base.source.sha256,
            adapters=used,
            scheduler=type(scheduler).__name__,
            scheduler_config=_plain_settings(scheduler.config),
            noise_device="cpu",
            precision=_PRECISION_NAMES[self.base.dtype],
            emphasis=request.emphasis,
            clip_skip=request.clip_skip,
            quantize=self.base.quantize,
            device=_device_name(self.base.device),
            versions={name: importlib.metadata.version(name) for name in ("sdlora", "torch", "diffusers", "peft")},
        )


def _batches(asked: Sequence[_Asked], most: int) -> Iterator[list[_Asked]]:
    """Yield the pictures in order, at most so many together, each time those with the same adapters."""
    for _, alike in itertools.groupby(asked, key=lambda picture: picture.adapters):
        pictures = list(alike)
        yield from (pictures[start : start + most] for start in range(0, len(pictures), most))


def _of_one_length(base: LoadedBase, plans: Mapping[int, PromptPlan]) -> Iterator[dict[int, PromptPlan]]:
    """Yield the plans in groups of which all texts fill equally many chunks, so that no picture depends on the others."""
    groups: dict[int, dict[int, PromptPlan]] = {}
    for seed, plan in plans.items():
        groups.setdefault(chunk_count(base, list(plan.spellings())), {})[seed] = plan
    yield from groups.values()


def _join(words: dict[str, Mapping[str, torch.Tensor]], more: Words, source: str) -> None:
    """`words` has `more` too. Raises ConfigError where both teach one word, with different vectors."""
    for word, vectors in more.items():
        known = next((other for other in words if same_word(word, other)), None)
        if known is None:
            words[word] = vectors
        elif not _equal(words[known], vectors):
            raise ConfigError(
                f"{source}: teaches the word {word!r}, which another adapter in use teaches otherwise; use one of the two"
            )


def _equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[encoder].detach().float().cpu(), other[encoder].detach().float().cpu()) for encoder in one
    )


def _plain_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler's settings as JSON can hold them: infinity, a default of some, as text."""
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in kept.items()}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

"""The adapters that an Engine keeps beside its base, and which of them act in which rows of a batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sdlora.adapters.blocks import BlockWeights, parse_block_weights
from sdlora.adapters.file import read_adapter
from sdlora.adapters.fit import refuse_other_family
from sdlora.adapters.inject import act_in_rows, add_adapter, remove_adapter, set_adapter_weights
from sdlora.adapters.stored import adapter_hashes
from sdlora.errors import ConfigError, FormatError
from sdlora.families.base import LoadedBase, Words
from sdlora.families.words import check_words, knowing, same_word
from sdlora.generation.recipe import UsedAdapter
from sdlora.generation.request import AdapterChoice
from sdlora.generation.step_weights import StepWeights, parse_step_weights

_ZERO_SNR = "ss_zero_terminal_snr"
"""In an adapter's metadata, here and of kohya's trainer: "True" where it was trained on the rescaled schedule."""


@dataclass(frozen=True)
class _Resident:
    name: str
    words: Words
    used: UsedAdapter
    """How recipes name it; its weight is each request's."""
    zero_snr: bool
    """Whether it was trained on a schedule that ends in pure noise."""
    text_layers: bool
    """Whether it changes text encoders."""


@dataclass(frozen=True)
class UNetWeight:
    """How strongly an adapter acts on the UNet, by block and step."""

    weight: float
    blocks: BlockWeights | None = None
    steps: StepWeights | None = None

    @staticmethod
    def of(choice: AdapterChoice) -> UNetWeight:
        """Return what was asked for."""
        blocks = parse_block_weights(choice.blocks) if choice.blocks else None
        return UNetWeight(choice.weight, blocks, parse_step_weights(choice.steps) if choice.steps else None)

    def at(self, step: int, steps: int) -> UNetWeight:
        """Return what it is at a step."""
        if self.steps is None:
            return self
        return UNetWeight(self.weight * self.steps.at(step, steps), self.blocks)

    def __call__(self, block: str) -> float:
        """Return the strength in a block."""
        return self.weight * (self.blocks.of(block) if self.blocks else 1.0)


@dataclass(frozen=True)
class Acting:
    """What acts in a picture."""

    used: tuple[UsedAdapter, ...]
    words: Words
    zero_snr: bool
    unet: Mapping[str, UNetWeight]
    """{name beside the base: weight}."""
    text_encoders: Mapping[str, float]
    """The same of those that change text encoders."""

    def speaks_like(self, other: Acting) -> bool:
        """Whether prompts mean the same to both."""
        return (
            self.text_encoders == other.text_encoders
            and self.words.keys() == other.words.keys()
            and all(self.words[word] is other.words[word] for word in self.words)
        )


class ResidentAdapters:
    """Adapters beside one base, at most `most` of them but for those of one batch; the one used longest ago goes first.

    `live` are adapters that are there already and act in every picture. Base weights are never written.
    """

    def __init__(self, base: LoadedBase, live: Mapping[str, float], most: int) -> None:
        self._base = base
        self._live = dict(live)
        self._live_weights = {name: UNetWeight(weight) for name, weight in live.items()}
        self._rows: list[dict[str, UNetWeight]] | None = None
        """What acts in the rows of a batch now; None: the same in all."""
        self._most = most
        self._resident: OrderedDict[tuple[str, int, int], _Resident] = OrderedDict()
        self._names_given = 0

    def gather(self, mixes: Sequence[tuple[AdapterChoice, ...]]) -> list[Acting]:
        """Return what acts for each of the mixes; all their adapters are there, not yet active.

        Raises FormatError or ModelError for an adapter that cannot be used, ConfigError for one that is named twice
        in a mix and for words that two in a mix teach differently.
        """
        acting = {mix: self._acting(mix) for mix in dict.fromkeys(mixes)}
        wanted = {name for one in acting.values() for name in one.unet}
        while len(self._resident) > max(self._most, len(wanted - self._live.keys())):
            # Those of this batch were used last, so that only others are let go.
            _, oldest = self._resident.popitem(last=False)
            remove_adapter(self._base, oldest.name)
        return [acting[mix] for mix in mixes]

    @contextmanager
    def speaking(self, acting: Acting) -> Iterator[None]:
        """Inside, prompts mean what the adapters of a picture make of them; on the UNet only the live ones act."""
        self._rows = None
        set_adapter_weights(self._base, self._live, acting.text_encoders)
        with knowing(self._base, acting.words):
            yield

    def act(self, rows: Sequence[Acting], step: int, steps: int) -> None:
        """In each row of the UNet's next batch, exactly the adapters of that row's picture act, and the live ones."""
        wanted = [{name: weight.at(step, steps) for name, weight in row.unet.items()} for row in rows]
        if wanted != self._rows:
            act_in_rows(self._base, [{**self._live_weights, **row} for row in wanted])
            self._rows = wanted

    def rest(self) -> None:
        """Only the live ones act."""
        self._rows = None
        set_adapter_weights(self._base, self._live)

    def _acting(self, mix: tuple[AdapterChoice, ...]) -> Acting:
        used: list[UsedAdapter] = []
        zero_snr = False
        words = dict(self._base.words)
        unet, text_encoders = dict[str, UNetWeight](), dict[str, float]()
        for choice in mix:
            resident = self._load(Path(choice.path).expanduser())
            if resident.name in unet:
                raise ConfigError(f"{choice.path}: the same adapter file is named twice; give it once")
            text = choice.weight if choice.text_encoder_weight is None else choice.text_encoder_weight
            unet[resident.name] = strength = UNetWeight.of(choice)
            if resident.text_layers:
                text_encoders[resident.name] = text * (strength.blocks.text_encoders if strength.blocks else 1.0)
            if choice.weight != 0 or text != 0:
                _join(words, resident.words, choice.path)
                zero_snr |= resident.zero_snr
            acted = replace(
                resident.used,
                name=Path(choice.path).stem,
                weight=choice.weight,
                text_encoder_weight=None if text == choice.weight else text,
                blocks=choice.blocks,
                steps=choice.steps,
            )
            used.append(acted)
        return Acting(tuple(used), words, zero_snr, unet, text_encoders)

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
        refuse_other_family(adapter.family, self._base.family.traits, self._base.source.name)
        check_words(self._base, adapter.tokens)
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
        text_layers = any(not path.startswith("unet.") for path in adapter.layers)
        resident = _Resident(f"file{self._names_given}", adapter.tokens, used, zero_snr, text_layers)
        add_adapter(self._base, resident.name, adapter)
        self._resident[key] = resident
        return resident


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

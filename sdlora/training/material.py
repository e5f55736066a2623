"""What a run trains on: examples encoded and in the store, their order, and the text that each has at each turn."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdlora.adapters.metadata import ConceptFacts
from sdlora.config import ConceptSection, PriorSection, TrainConfig, with_steps
from sdlora.data.batches import Draw
from sdlora.data.buckets import describe_buckets
from sdlora.data.cache import EncodingReport, encode_pictures, picture_store
from sdlora.data.cache_folder import class_pictures_folder, data_cache, index_file, trim_cache
from sdlora.data.captions import caption_at, caption_variants
from sdlora.data.embeddings import caption_store, encode_captions
from sdlora.data.examples import CachedExample, order_samples, plan_examples
from sdlora.data.index import FileIndex, PictureFacts, content_hash, learn_facts, open_index
from sdlora.data.sample import Concept, Sample
from sdlora.data.source import fill_trigger, fingerprint, held_out_section, open_dataset, prior_concept, raise_problems
from sdlora.data.store import TensorStore, Together
from sdlora.diffusion import seed_from
from sdlora.errors import ConfigError, DataError
from sdlora.families.base import LoadedBase
from sdlora.families.words import knowing
from sdlora.training.objective import EncodedTexts, Turn
from sdlora.training.trainee import first_words

Say = Callable[[str], None]
ClassPictures = Callable[[LoadedBase, str, PriorSection, int, Mapping[int, Path]], None]
"""Makes pictures of a class prompt: (base, prompt, how, side in pixels, {number that counts up the seed: file})."""
_SECONDS_BETWEEN_LINES = 10.0
_DRAWS = 64
"""How often a caption is drawn to see what it may become."""


@dataclass(frozen=True)
class FoundSamples:
    """Samples, and what is known of their files."""

    samples: tuple[Sample, ...]
    facts: tuple[PictureFacts, ...]
    mask_hashes: tuple[str, ...]

    def __add__(self, other: FoundSamples) -> FoundSamples:
        return FoundSamples(
            self.samples + other.samples, self.facts + other.facts, self.mask_hashes + other.mask_hashes
        )

    def without(self, hashes: Collection[str]) -> FoundSamples:
        """Return those whose pictures are none of these."""
        kept = [index for index, fact in enumerate(self.facts) if fact.sha256 not in hashes]
        parts = (self.samples, self.facts, self.mask_hashes)
        return FoundSamples(*(tuple(part[index] for index in kept) for part in parts))  # type: ignore[arg-type]

    def fingerprint(self) -> str:
        """Return a hash of all that training takes from them; a changed data set has another."""
        pairs = zip(self.facts, self.mask_hashes, strict=True)
        return fingerprint(self.samples, (f"{fact.sha256}+{mask}" for fact, mask in pairs))


@dataclass(frozen=True)
class OpenedData:
    """A run's data before the base is loaded: found, readable as far as headers tell, held-out pictures apart."""

    training: FoundSamples
    held_out: FoundSamples
    summary: tuple[str, ...]


def open_data(config: TrainConfig) -> OpenedData:
    """Return the pictures of a run and those held out. Raises DataError and ConfigError."""
    dataset = open_dataset(config.data, strict=False)
    problems = [*dataset.problems]
    validation: tuple[Sample, ...] = ()
    if config.validation.folder:
        opened = open_dataset(held_out_section(config.data, config.validation.folder), strict=False)
        validation, problems = opened.samples, [*problems, *opened.problems]
    with open_index(index_file(data_cache(config.data))) as index:
        training = _found(dataset.samples, index, problems)
        split_off = _found(dataset.held_out, index, problems)
        apart = _found(validation, index, problems)
    raise_problems(problems)
    # Copies of what was split off, under other names or in other concepts, are not trained on either.
    found = len(training.samples)
    training = training.without({fact.sha256 for fact in split_off.facts})
    notes = list(dataset.notes)
    if copies := found - len(training.samples):
        notes.append(f"{copies} copies of held-out pictures are left out")
    if all(sample.prior for sample in training.samples):
        raise DataError("data.held_out: leaves no picture to train on but copies of those held out; lower it")
    hashes = {fact.sha256 for fact in training.facts}
    for sample, fact in zip(apart.samples, apart.facts, strict=True):
        if fact.sha256 in hashes:
            raise ConfigError(
                f"{sample.path}: is held out for validation and also a training picture; "
                "held-out pictures must lie outside data.folder and data.prior.folder"
            )
    return OpenedData(training, split_off + apart, (dataset.summary(), *notes))


def _found(samples: Sequence[Sample], index: FileIndex, problems: list[str]) -> FoundSamples:
    facts = learn_facts(samples, index, problems)
    hashes = []
    for sample in samples:
        try:
            hashes.append(content_hash(sample.mask, index) if sample.mask else "")
        except DataError as error:
            problems.append(str(error))
    return FoundSamples(tuple(samples), tuple(fact for fact in facts if fact), tuple(hashes))


@dataclass
class Material:
    """Encoded examples in their order of training, and how their texts come about."""

    config: TrainConfig
    examples: Sequence[CachedExample]
    validation: Sequence[CachedExample]
    identity: str
    """A hash of the data; a resumed run must have the same."""
    report: EncodingReport = field(default_factory=EncodingReport)
    texts: EncodedTexts = field(default_factory=dict)
    epochs: int | None = None
    """For how many epochs texts are encoded beforehand; None: each is drawn afresh and encoded when it is needed."""

    def __post_init__(self) -> None:
        samples = [example.sample for example in self.examples]
        self.order = order_samples(samples, [example.bucket for example in self.examples], self.config)

    def batch(self, number: int) -> tuple[list[Turn], int]:
        """Return the turns of batch `number`, and how many a full batch has."""
        batch = self.order.batch(number)
        return [self._turn(draw) for draw in batch.draws], batch.size

    def _turn(self, draw: Draw) -> Turn:
        example = self.examples[draw.example]
        settings = example.sample.concept.settings
        text = caption_at(
            example.sample.lines,
            settings.captions,
            settings.trigger,
            seed=self.config.training.seed,
            name=example.identity,
            epoch=draw.epoch,
            occurrence=draw.occurrence,
            variants=self._variants(settings),
        )
        return Turn(example, text)

    def _variants(self, settings: ConceptSection) -> int | None:
        """Return of how many texts of a caption one is drawn; None: of all there can be."""
        return None if self.epochs is None else min(settings.captions.variants, self.epochs * settings.repeats)

    def concept_facts(self) -> list[ConceptFacts]:
        """Return what the adapter's header says of each concept."""
        counts = Counter(example.sample.concept for example in self.examples if not example.sample.prior)
        return [ConceptFacts(c.settings.trigger, c.settings.repeats, number) for c, number in counts.items()]

    def resolution(self, base: LoadedBase) -> int:
        """Return the resolution that most pictures are trained at, in pixels."""
        settings = (example.sample.concept.settings for example in self.examples if not example.sample.prior)
        return Counter(own.resolution or base.resolution for own in settings).most_common(1)[0][0]

    def uses_buckets(self) -> bool:
        """Return whether pictures of any concept keep their aspect ratio."""
        return any(example.sample.concept.settings.buckets.enabled for example in self.examples)

    def texts_needed(self) -> set[str]:
        """Return every text that may be needed in `epochs`; where each is drawn afresh, a sample of them."""
        needed = {example.sample.caption for example in (*self.examples, *self.validation)}
        for example in self.examples:
            sample, settings = example.sample, example.sample.concept.settings
            rules, seed = settings.captions, self.config.training.seed
            count = self._variants(settings) or rules.variants
            needed.update(caption_variants(sample.lines, rules, settings.trigger, seed, example.identity, count))
            if self.config.data.prior.source == "training" and not sample.prior:
                needed.add(settings.class_prompt)
        return needed


def prepare_material(
    config: TrainConfig,
    base: LoadedBase,
    data: OpenedData,
    together: Together,
    say: Say,
    class_pictures: ClassPictures | None,
) -> Material:
    """Return the run's material, everything encoded that was not before. Raises DataError, ConfigError, OutputError."""
    cache = data_cache(config.data)
    training = data.training
    if config.data.prior.source == "generated":
        training += _generated(config, base, cache, together, say, class_pictures)
    store = picture_store(base, cache)

    def planned(found: FoundSamples, augment: bool) -> list[CachedExample]:
        return plan_examples(found.samples, found.facts, found.mask_hashes, base.resolution, store, augment=augment)

    material = Material(config, planned(training, True), planned(data.held_out, False), training.fingerprint())
    if not config.training.steps:
        batches = material.order.first_batch(config.training.steps_per_picture)
        material.config = config = with_steps(config, batches, together.processes)
    sizes = [fact.size for fact in training.facts]
    say(describe_buckets(sizes, [example.bucket for example in material.examples]))
    everything = [*material.examples, *material.validation]
    material.report = encode_pictures(base, everything, together=together, on_progress=_progress(say, "pictures"))
    say(material.report.sentence())
    if store.damaged:
        say(f"{store.damaged} damaged files of the cache were removed and their pictures encoded again")
    stores = [store, *_prepare_texts(config, base, material, cache, together, say)]
    if together.rank == 0:
        _trim(config, cache, stores, say)
    return material


def trains_texts(config: TrainConfig) -> bool:
    """Return whether what a text becomes changes while training, so that it is encoded in every step."""
    return config.tokens.train != "none" or config.adapter.text_encoder


def possible_texts(found: FoundSamples, seed: int) -> Iterator[str]:
    """Yield texts that the pictures may be trained with, prior preservation aside; those without chance first."""
    own = [sample for sample in found.samples if not sample.prior]
    yield from (sample.caption for sample in own)
    for sample in own:
        settings, draws = sample.concept.settings, max(_DRAWS, len(sample.lines))
        yield from caption_variants(sample.lines, settings.captions, settings.trigger, seed, str(sample.path), draws)


def _prepare_texts(
    config: TrainConfig, base: LoadedBase, material: Material, cache: Path, together: Together, say: Say
) -> list[TensorStore]:
    """The material has its encoded texts, unless they are encoded in every step; returns the stores they are in."""
    live = trains_texts(config)
    if not live:
        batches = config.training.steps * config.training.accumulate_batches * together.processes
        material.epochs = material.order.epoch_of(max(0, batches - 1)) + 1
    texts = sorted(material.texts_needed())
    _tell_of_long_texts(config, base, texts, say)
    if live:
        return []
    store = caption_store(base, cache)
    material.texts = encode_captions(base, texts, store, together=together, on_progress=_progress(say, "captions"))
    return [store]


def _tell_of_long_texts(config: TrainConfig, base: LoadedBase, texts: Sequence[str], say: Say) -> None:
    """What the text encoder does not see of captions, the vectors of new words counted, is said."""
    with knowing(base, first_words(base, config)):
        excess = base.family.excess_tokens(base, texts)
    if cut := [(over, text) for over, text in zip(excess, texts, strict=True) if over > 0]:
        over, text = max(cut)
        say(
            f"{len(cut)} of {len(texts)} captions are longer than the text encoder sees; "
            f"the longest loses its last {over} tokens: {text[:60]!r}..."
        )


def _generated(
    config: TrainConfig,
    base: LoadedBase,
    cache: Path,
    together: Together,
    say: Say,
    class_pictures: ClassPictures | None,
) -> FoundSamples:
    """Return the pictures of each class prompt, made by the base where they are not there from an earlier run."""
    if class_pictures is None:
        raise ConfigError(
            'data.prior.source is "generated", and train() was given nothing to generate with; '
            "pass class_pictures, or use the command sdlora train"
        )
    prior = config.data.prior
    side = config.data.resolution or base.resolution
    samples = []
    concepts = config.data.concepts or (config.data,)
    for prompt in dict.fromkeys(fill_trigger(concept.class_prompt, concept.trigger) for concept in concepts):
        recipe = (base.source.sha256, str(base.dtype), prompt, side, prior.seed, prior.steps, prior.guidance_scale)
        folder = class_pictures_folder(cache, f"{seed_from(*map(str, recipe)):016x}")
        paths = {number: folder / f"{number:05d}.png" for number in range(prior.count)}
        mine = {number: paths[number] for number in together.part(range(prior.count)) if not paths[number].exists()}
        if mine:
            started = time.monotonic()
            class_pictures(base, prompt, prior, side, mine)
            say(f"{len(mine)} pictures of {prompt!r} made in {time.monotonic() - started:.0f} s, in {folder}")
        together.wait()
        concept = Concept(prompt, prior_concept(config.data, str(folder)), prior=True)
        samples += [Sample(path, (prompt,), concept) for path in paths.values()]
    problems: list[str] = []
    with open_index(index_file(cache)) as index:
        found = _found(samples, index, problems)
    raise_problems(problems)
    return found


def _trim(config: TrainConfig, cache: Path, stores: Sequence[TensorStore], say: Say) -> None:
    """The cache is within its limit, as far as that leaves what this run needs."""
    limit = int(config.data.cache.limit_gb * 1e9)
    removed = trim_cache(cache, limit, {path for store in stores for path in store.paths_in_use()})
    if removed.files:
        say(f"{removed.bytes / 1e9:.1f} GB used least recently were removed from the cache {cache}")


def _progress(say: Say, what: str) -> Callable[[int, int], None]:
    """Return what tells how far encoding is, every few seconds, with the time left."""
    started = last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_LINES:
            last = now
            say(f"encoded {done} of {total} {what}, {(now - started) / done * (total - done):.0f} s left")

    return progress

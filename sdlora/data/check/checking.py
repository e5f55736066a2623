"""The check before a run: opens the data as training would, looks at every file, and says what it found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdlora.config import TrainConfig
from sdlora.data import Progress
from sdlora.data.cache_folder import data_cache, index_file
from sdlora.data.captions import caption_variants
from sdlora.data.check.duplicates import groups_of_copies
from sdlora.data.check.epoch import Batches, ConceptShare, Shape, list_shapes, plan_batches, share_out
from sdlora.data.check.findings import (
    DUPLICATE,
    KINDS,
    LEAK,
    NEAR_DUPLICATE,
    NEAR_LEAK,
    NO_BATCH,
    PRIOR_COPY,
    UNREADABLE,
    UNUSABLE,
    Finding,
    Kind,
)
from sdlora.data.check.looking import Look, look_at
from sdlora.data.check.picture import Part, Picture
from sdlora.data.check.pixels import check_files, check_masks, check_shapes
from sdlora.data.check.texts import check_texts, count_tags
from sdlora.data.examples import place_in_buckets
from sdlora.data.index import PictureFacts, open_index
from sdlora.data.pictures import check_colour
from sdlora.data.sample import Sample
from sdlora.data.source import held_out_section, open_dataset
from sdlora.errors import DataError

if TYPE_CHECKING:
    from sdlora.families.outline import BaseOutline

ASSUMED_RESOLUTION = 512
_NAMED = 4


@dataclass(frozen=True)
class Report:
    """All that a check found, for `report_text`, `report_json` and the contact sheets."""

    summary: str
    notes: tuple[str, ...]
    base: str
    """What the base is called; "" where none was named."""
    resolutions: tuple[int, ...]
    """Those in use, in pixels."""
    resolution_assumed: bool
    """Whether neither the settings nor a base say it for some of the pictures."""
    headers_only: bool
    concepts: tuple[ConceptShare, ...]
    shapes: tuple[Shape, ...]
    batches: Batches | None
    """None where there can be none."""
    tags: tuple[tuple[str, int], ...]
    """Tags, or whole captions without a separator, and on how many training pictures they are; most frequent first."""
    pictures: tuple[Picture, ...]
    findings: tuple[Finding, ...]
    """The gravest first, those of one kind together."""

    @property
    def ok(self) -> bool:
        """Whether a training run would take the data."""
        return all(finding.kind.severity != "error" for finding in self.findings)

    def by_kind(self) -> dict[Kind, list[Finding]]:
        """Return the findings of each kind that there are any of, the gravest kinds first."""
        found: dict[Kind, list[Finding]] = defaultdict(list)
        for finding in self.findings:
            found[finding.kind].append(finding)
        return dict(found)


def check_data(
    config: TrainConfig,
    base: BaseOutline | None = None,
    *,
    headers_only: bool = False,
    on_progress: Progress | None = None,
) -> Report:
    """Return what is to say about the data of a run, before it. Nothing but the index of known files is written.

    With `base` captions are seen as its text encoders see them, and pictures in its resolution. With
    `headers_only` no pixel is decoded: damage, masks and near-duplicates are not looked for.

    Raises DataError where there are no pictures at all, ConfigError for settings that do not go together.
    """
    opened = _open(config)
    samples = [*opened.training, *opened.held_out]
    for colour in {sample.concept.settings.background for sample in samples}:
        check_colour(colour)
    with open_index(index_file(data_cache(config.data))) as index:
        looks = look_at(samples, index, headers_only=headers_only, on_progress=on_progress)
    resolution = (base.resolution if base else None) or ASSUMED_RESOLUTION
    own = len(opened.training)
    # As a run does: copies of what data.held_out splits off are not trained on either.
    taken = {look.sha256 for look in looks[own : own + opened.split_off] if look.sha256}
    trained = [number for number in range(own) if looks[number].sha256 not in taken]
    pictures = [
        *_plan([samples[n] for n in trained], [looks[n] for n in trained], config, resolution, held_out=False),
        *_plan(samples[own:], looks[own:], config, resolution, held_out=True),
    ]
    found = [Finding(UNUSABLE, problem) for problem in opened.problems] + _find(pictures, base)
    training = [picture for picture in pictures if picture.part != "validation" and picture.bucket]
    batches = None
    # Where nothing is left to train on because of other errors, these say enough.
    if any(picture.part == "training" for picture in training) or all(f.kind.severity != "error" for f in found):
        try:
            batches = plan_batches(training, config)
        except DataError as error:
            found.append(Finding(NO_BATCH, str(error)))
    settled = [sample.concept.settings.resolution for sample in samples if not sample.train_size]
    return Report(
        summary=opened.summary,
        notes=opened.notes,
        base=base.title if base else "",
        resolutions=tuple(sorted({side or resolution for side in settled})),
        resolution_assumed=0 in settled and not (base and base.resolution),
        headers_only=headers_only,
        concepts=tuple(share_out(training, config)),
        shapes=tuple(list_shapes(training)),
        batches=batches,
        tags=tuple(sorted(count_tags(pictures).items(), key=lambda item: (-item[1], item[0]))),
        pictures=tuple(pictures),
        findings=tuple(sorted(found, key=lambda finding: KINDS.index(finding.kind))),
    )


@dataclass(frozen=True)
class _Opened:
    """The data of a run as they were found, before a file is looked at."""

    summary: str
    notes: tuple[str, ...]
    training: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    split_off: int
    """How many of these, the first, are a share of the training pictures."""
    problems: tuple[str, ...]


def _open(config: TrainConfig) -> _Opened:
    dataset = open_dataset(config.data, strict=False)
    notes, held_out, problems = dataset.notes, dataset.held_out, dataset.problems
    if config.validation.folder:
        validation = open_dataset(held_out_section(config.data, config.validation.folder), strict=False)
        notes += (f"validation: {validation.summary()}", *validation.notes)
        held_out += validation.samples
        problems += validation.problems
    if config.data.prior.source == "generated":
        notes += ("the pictures of each class prompt are generated when the run starts, and not looked at here",)
    return _Opened(dataset.summary(), notes, dataset.samples, held_out, len(dataset.held_out), problems)


def _find(pictures: Sequence[Picture], base: BaseOutline | None) -> list[Finding]:
    """Return all that is to say about pictures, masks, captions and copies."""
    unreadable = [
        Finding(UNREADABLE, picture.look.problem, (number,))
        for number, picture in enumerate(pictures)
        if picture.look.problem
    ]
    return [
        *unreadable,
        *check_files(pictures),
        *check_masks(pictures),
        *check_shapes(pictures),
        *check_texts(pictures, base),
        *_copies(pictures),
    ]


def _plan(
    samples: Sequence[Sample], looks: Sequence[Look], config: TrainConfig, resolution: int, *, held_out: bool
) -> Iterator[Picture]:
    """Yield the pictures with the shapes and texts that a run would give them."""
    readable = [number for number, look in enumerate(looks) if look.header]
    facts = [PictureFacts(looks[number].sha256, *_size(looks[number])) for number in readable]
    chosen = place_in_buckets([samples[number] for number in readable], facts, resolution)
    buckets = dict(zip(readable, chosen, strict=True))
    for number, (sample, look) in enumerate(zip(samples, looks, strict=True)):
        settings = sample.concept.settings
        texts = caption_variants(
            sample.lines,
            settings.captions,
            settings.trigger,
            config.training.seed,
            look.sha256,
            settings.captions.variants,
        )
        part: Part = "validation" if held_out else "prior" if sample.prior else "training"
        texts = tuple(dict.fromkeys((sample.caption, *texts)))
        yield Picture(sample, part, look, buckets.get(number), texts)


def _size(look: Look) -> tuple[int, int]:
    assert look.header is not None
    return look.header.size


def _copies(pictures: Sequence[Picture]) -> Iterator[Finding]:
    """Yield each group of copies once: files of the same content, then pictures that are nearly the same."""
    by_content: dict[str, list[int]] = defaultdict(list)
    for number, picture in enumerate(pictures):
        if picture.look.sha256:
            by_content[picture.look.sha256].append(number)
    for numbers in by_content.values():
        if len(numbers) > 1:
            yield _copy(pictures, numbers, DUPLICATE, LEAK, "the same file")
    firsts = [numbers[0] for numbers in by_content.values() if pictures[numbers[0]].look.thumbnail]
    for group in groups_of_copies([pictures[number].look.thumbnail for number in firsts]):
        members = [number for index in group for number in by_content[pictures[firsts[index]].look.sha256]]
        yield _copy(pictures, sorted(members), NEAR_DUPLICATE, NEAR_LEAK, "nearly the same picture")


def _copy(pictures: Sequence[Picture], numbers: Sequence[int], kind: Kind, leak: Kind, what: str) -> Finding:
    parts = {pictures[number].part for number in numbers}
    if "validation" in parts and len(parts) > 1:
        kind = leak
    elif parts == {"training", "prior"}:
        kind = PRIOR_COPY
    names = [
        pictures[number].name + (f" ({pictures[number].part})" if len(parts) > 1 else "") for number in numbers[:_NAMED]
    ]
    if len(numbers) > _NAMED:
        names.append(f"{len(numbers) - _NAMED} more")
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    captions = {pictures[number].texts[0] for number in numbers}
    differ = "; their captions differ" if len(captions) > 1 else ""
    return Finding(kind, f"{listed}: {what}{differ}", tuple(numbers))

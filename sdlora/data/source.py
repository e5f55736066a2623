"""Opens a data set: finds its pictures, gives each its caption, mask and concept, and says what is wrong with it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdlora.config import ConceptSection, DataSection, PriorSection
from sdlora.data.layouts import list_pictures
from sdlora.data.layouts.listing import MASK_ENDING, Group, Listed, Listing, pictures_below, prior_settings
from sdlora.data.pictures import check_colour
from sdlora.data.sample import Concept, Sample
from sdlora.diffusion import seed_from
from sdlora.errors import DataError

_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Dataset:
    """The samples of a run, concept by concept, in the order of their paths; those for prior preservation last."""

    samples: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    """Samples kept out of training, as `held_out` asks."""
    layouts: tuple[str, ...]
    notes: tuple[str, ...]
    """What a person should know about how it was read; one sentence each."""
    without_caption: int
    """How many pictures had no caption of their own."""
    problems: tuple[str, ...] = ()
    """What is wrong with single files, a sentence each; a data set that is trained on has none."""

    def summary(self) -> str:
        """Return a sentence for the start of a run: "kohya folders: 3 concepts, 41 pictures, 2 without caption"."""
        own = [sample for sample in self.samples if not sample.prior]
        concepts = len({id(sample.concept) for sample in own})
        parts = [_count(concepts, "concept"), _count(len(own), "picture")]
        parts.append(
            f"{self.without_caption} without a caption of their own" if self.without_caption else "all captioned"
        )
        if masked := sum(sample.mask is not None for sample in own):
            parts.append(f"{masked} with a mask")
        if several := sum(len(sample.lines) > 1 for sample in own):
            how = "one is drawn" if own[0].concept.settings.captions.lines == "alternatives" else "the first is taken"
            parts.append(f"{several} with several captions, of which {how}")
        if others := len(self.samples) - len(own):
            parts.append(f"{others} of other things")
        if self.held_out:
            parts.append(f"{len(self.held_out)} held out")
        return f"{' and '.join(dict.fromkeys(self.layouts))}: {', '.join(parts)}"


def open_dataset(section: DataSection, *, strict: bool = True) -> Dataset:
    """Return the pictures that `section` names, with captions, masks and concepts, "[trigger]" filled in.

    Raises ConfigError for a background that is no colour, DataError for a place where there are no pictures,
    and one that names everything that is wrong with single files; where `strict` is False, these are in
    `problems` instead, and the samples they are about are left out.
    """
    problems: list[str] = []
    listings: list[Listing] = []
    groups: list[Group] = []

    def take(concept: ConceptSection, setting: str, *, prior: bool = False) -> None:
        check_colour(concept.background)
        try:
            listing = list_pictures(concept, setting, problems)
        except DataError as error:
            problems.append(str(error))
            return
        listings.append(listing)
        groups.extend(replace(group, prior=prior or group.prior) for group in listing.groups)

    for number, concept in enumerate(section.concepts or (section,)):
        take(concept, f"data.concepts.{number}.folder" if section.concepts else "data.folder")
    if section.prior.folder:
        take(prior_concept(section, section.prior.folder), "data.prior.folder", prior=True)

    if not listings:
        raise_problems(problems)
    samples: list[Sample] = []
    bare = 0
    for group in sorted(groups, key=lambda group: group.prior):
        made, without = _samples_of(group, problems)
        bare += 0 if group.prior else without
        samples += made
    samples, held_out = _split(samples)
    problems += _shared_pictures(samples)
    if held_out and all(sample.prior for sample in samples):
        problems.append(f"data.held_out: leaves none of {len(held_out)} pictures to train on; lower it")
    if strict:
        raise_problems(problems)
    return Dataset(
        samples=tuple(samples),
        held_out=tuple(held_out),
        layouts=tuple(listing.title for listing in listings),
        notes=tuple(note for listing in listings for note in listing.notes),
        without_caption=bare,
        problems=tuple(problems),
    )


def prior_concept(section: DataSection, folder: str) -> ConceptSection:
    """Return the settings for a folder of pictures of other things."""
    shared = ConceptSection.model_validate({name: getattr(section, name) for name in ConceptSection.model_fields})
    return prior_settings(shared).model_copy(update={"folder": folder, "layout": "auto"})


def held_out_section(section: DataSection, folder: str) -> DataSection:
    """Return the settings for a folder of held-out pictures: cut and captioned as the others are."""
    masks = section.masks
    own = {
        "folder": folder,
        "layout": "auto",
        "concepts": (),
        "held_out": 0.0,
        "prior": PriorSection(),
        # A folder of masks belongs to the training pictures.
        "masks": masks.model_copy(
            update={"folder": "", "source": "none" if masks.source == "folder" else masks.source}
        ),
    }
    return section.model_copy(update=own)


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one DataError that tells all `problems`, if there are any."""
    if not problems:
        return
    if len(problems) == 1:
        raise DataError(problems[0])
    shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS])
    more = len(problems) - _SHOWN_PROBLEMS
    rest = f"\n  and {more} more, which sdlora dataset check lists" if more > 0 else ""
    raise DataError(f"{len(problems)} things are wrong with the pictures:\n{shown}{rest}")


def fill_trigger(text: str, trigger: str) -> str:
    """Return `text` with "[trigger]" replaced. Raises DataError when there is no trigger to put there."""
    if "[trigger]" not in text:
        return text
    if not trigger:
        raise DataError(f"{text!r} holds [trigger] but data.trigger is not set")
    return text.replace("[trigger]", trigger)


def fingerprint(samples: Iterable[Sample], hashes: Iterable[str]) -> str:
    """Return a hash of all that training takes from the samples; `hashes` are those of their pictures and masks."""
    digest = hashlib.sha256()
    concepts: dict[Concept, int] = {}
    for sample, content in zip(samples, hashes, strict=True):
        if sample.concept not in concepts:
            concepts[sample.concept] = len(concepts)
            own = sample.concept.settings.model_dump_json(exclude={"folder": True, "layout": True, "masks": {"folder"}})
            digest.update(own.encode())
        text = f"{content}|{sample.lines}|{concepts[sample.concept]}|{sample.prior}|{sample.train_size}\n"
        digest.update(text.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _samples_of(group: Group, problems: list[str]) -> tuple[list[Sample], int]:
    """Return the group's samples, and how many have no caption of their own."""
    group = _without_masks(group)
    settings = _with_filled_texts(group.settings, problems)
    concept = Concept(Path(settings.folder).name, settings, group.prior)
    masks = _masks_for(group, problems)
    samples = []
    bare = 0
    for listed in group.pictures:
        lines = _lines_of(listed, settings)
        if lines is None:
            bare += 1
            lines = (settings.caption,) if settings.caption and settings.caption_from != "files" else None
        if lines is None:
            problems.append(_no_caption(listed, group))
            continue
        try:
            filled = tuple(fill_trigger(line, settings.trigger) for line in lines)
        except DataError as error:
            problems.append(f"{listed.path}: its caption {error}")
            continue
        mask = listed.mask or masks.get(listed.path)
        samples.append(Sample(listed.path, filled, concept, mask, listed.train_size, listed.rows, listed.row))
    return samples, bare


def _without_masks(group: Group) -> Group:
    """Return the group without the files of a mask folder that lies among its pictures."""
    folder = group.settings.masks.folder
    if not folder:
        return group
    masks = Path(folder).expanduser().absolute()
    return replace(group, pictures=[p for p in group.pictures if not p.path.absolute().is_relative_to(masks)])


def _with_filled_texts(settings: ConceptSection, problems: list[str]) -> ConceptSection:
    """Return the settings with "[trigger]" filled in wherever they hold a text but the caption."""
    rules = settings.captions
    try:
        texts = {name: fill_trigger(getattr(rules, name), settings.trigger) for name in ("prefix", "suffix")}
        class_prompt = fill_trigger(settings.class_prompt, settings.trigger)
    except DataError as error:
        problems.append(f"data.captions or data.class_prompt: {error}")
        return settings
    return settings.model_copy(update={"captions": rules.model_copy(update=texts), "class_prompt": class_prompt})


def _lines_of(listed: Listed, settings: ConceptSection) -> tuple[str, ...] | None:
    if settings.caption_from == "filename" and listed.rows is None:
        return (listed.path.stem.replace("_", " ").strip(),)
    if settings.caption_from == "instance":
        return (settings.caption,)
    return listed.lines


def _no_caption(listed: Listed, group: Group) -> str:
    where = "has no caption"
    if listed.rows is None:
        where = f"has no caption file ({listed.path.stem}{(*group.settings.caption_suffixes, '.txt')[0]})"
    advice = (
        "write it, saying what the picture shows"
        if group.prior
        else 'write it, or set data.caption, for example "a photo of [trigger]"'
    )
    return f"{listed.path}: {where}; {advice}"


def _masks_for(group: Group, problems: list[str]) -> dict[Path, Path]:
    """Return the mask file of each picture that has one."""
    rules = group.settings.masks
    source = rules.source
    if source == "auto":
        source = "folder" if rules.folder else "files"
    if source == "files":
        beside = {p.path: p.path.with_name(f"{p.path.stem}{MASK_ENDING}.png") for p in group.pictures if p.rows is None}
        return {picture: mask for picture, mask in beside.items() if mask.is_file()}
    if source != "folder":
        return {}
    folder = Path(rules.folder).expanduser()
    if not folder.is_dir():
        problems.append(f"{folder}: there is no such folder; data.masks.folder must name the folder of masks")
        return {}
    masks = {path.relative_to(folder).with_suffix(""): path for path in pictures_below(folder, problems)}
    root = Path(group.settings.folder).expanduser()
    stems = Counter(picture.path.stem for picture in group.pictures)
    found = {}
    for picture in group.pictures:
        inside = picture.path.relative_to(root) if picture.path.is_relative_to(root) else Path(picture.path.name)
        own = masks.get(inside.with_suffix(""))
        mask = own or masks.get(Path(picture.path.stem))
        if mask is None:
            continue
        if own is None and stems[picture.path.stem] > 1:
            problems.append(
                f"{mask}: could be the mask of {picture.path} and of another picture of that name; put it into "
                f"{folder / inside.parent}"
            )
        found[picture.path] = mask
    if not found:
        problems.append(f"{folder}: holds no file with the name of a picture; a mask is called as its picture is")
    return found


def _split(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Return those to train on, and those held out, which depends on names alone.

    All concepts with the same share are one set, of which at least one picture is held out.
    """
    shares: dict[float, list[Sample]] = defaultdict(list)
    for sample in samples:
        if not sample.prior:
            shares[sample.concept.settings.held_out].append(sample)
    held_out: set[int] = set()
    for share, members in shares.items():
        count = max(1, round(share * len(members))) if share else 0
        ranked = sorted(members, key=lambda sample: seed_from("held out", sample.path.name))
        held_out.update(id(sample) for sample in ranked[:count])
    return (
        [sample for sample in samples if id(sample) not in held_out],
        [sample for sample in samples if id(sample) in held_out],
    )


def _shared_pictures(samples: Sequence[Sample]) -> Iterable[str]:
    """Yield a sentence for each picture that is both learnt and held to what the base knows."""
    own = {sample.path.resolve() for sample in samples if not sample.prior and not sample.rows}
    for sample in samples:
        if sample.prior and not sample.rows and sample.path.resolve() in own:
            yield (
                f"{sample.path}: lies in data.folder and in data.prior.folder; keep the two apart, "
                'or use data.prior.source = "training", which needs no other pictures'
            )


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"

"""Checks captions: what is empty, shared or cut off, and whether the trigger is in them as the encoder sees it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sdlora.config import ConceptSection
from sdlora.data.captions import plain_caption
from sdlora.data.check import findings
from sdlora.data.check.findings import Finding
from sdlora.data.check.picture import Picture

if TYPE_CHECKING:
    from sdlora.families.outline import BaseOutline

_SHARED_BY = 3
"""So many pictures with one caption are worth a word."""
_SHOWN = 60
_CHOICES = re.compile(r"\{[^{}]*\|[^{}]*\}")


def check_texts(pictures: Sequence[Picture], base: BaseOutline | None) -> Iterator[Finding]:
    """Yield what is wrong with captions; with a base also what its text encoders make of them."""
    yield from _empty(pictures)
    yield from _repeated(pictures)
    for number, picture in enumerate(pictures):
        yield from _braces(number, picture)
    if base is not None:
        yield from _cut(pictures, base)
    yield from _triggers(pictures, base)


def count_tags(pictures: Sequence[Picture]) -> Counter[str]:
    """Return on how many pictures each tag is, of those to learn, by their plain captions."""
    counts: Counter[str] = Counter()
    for picture in pictures:
        if picture.part == "training":
            separator = picture.sample.concept.settings.captions.separator
            tags = picture.texts[0].split(separator) if separator else [picture.texts[0]]
            counts.update({tag.strip() for tag in tags if tag.strip()})
    return counts


def _empty(pictures: Sequence[Picture]) -> Iterator[Finding]:
    for number, picture in enumerate(pictures):
        if empty := sum(not text.strip() for text in picture.texts):
            which = "has an empty caption" if empty == len(picture.texts) else "has an empty line in its caption"
            yield Finding(findings.CAPTION_EMPTY, f"{picture.name}: {which}", (number,))


def _repeated(pictures: Sequence[Picture]) -> Iterator[Finding]:
    users: dict[str, list[int]] = defaultdict(list)
    for number, picture in enumerate(pictures):
        settings = picture.sample.concept.settings
        asked_for = settings.caption_from == "instance" or picture.sample.lines == (_filled(settings),)
        if picture.part == "training" and not asked_for and picture.texts[0].strip():
            users[picture.texts[0]].append(number)
    for text, numbers in users.items():
        if len(numbers) >= _SHARED_BY:
            sentence = f"{pictures[numbers[0]].name} and {len(numbers) - 1} more: {_short(text)}"
            yield Finding(findings.CAPTION_REPEATED, sentence, tuple(numbers))


def _filled(settings: ConceptSection) -> str:
    return settings.caption.replace("[trigger]", settings.trigger)


def _braces(number: int, picture: Picture) -> Iterator[Finding]:
    settings = picture.sample.concept.settings
    for line in picture.sample.lines:
        if not settings.captions.wildcards:
            if found := _CHOICES.search(line):
                yield Finding(findings.BRACES_PLAIN, f"{picture.name}: {_short(found[0])} stays as it is", (number,))
                return
            continue
        drawn = plain_caption((line,), settings.captions, settings.trigger)
        meant = line.count("{{") + line.count("}}")
        if drawn.count("{") + drawn.count("}") > meant:
            yield Finding(findings.BRACES_UNBALANCED, f"{picture.name}: {_short(line)}", (number,))
            return


def _cut(pictures: Sequence[Picture], base: BaseOutline) -> Iterator[Finding]:
    cut = base.cut(list(dict.fromkeys(text for picture in pictures for text in picture.texts)))
    for number, picture in enumerate(pictures):
        longest = max((cut[text] for text in picture.texts if text in cut), key=lambda one: one.excess, default=None)
        if longest:
            tokens = f"{longest.excess} token{'s' * (longest.excess > 1)} over, not seen: {_short(longest.lost)}"
            yield Finding(findings.CAPTION_CUT, f"{picture.name}: {tokens}", (number,))


def _triggers(pictures: Sequence[Picture], base: BaseOutline | None) -> Iterator[Finding]:
    users: dict[str, list[int]] = defaultdict(list)
    for number, picture in enumerate(pictures):
        if picture.part != "prior" and picture.sample.concept.settings.trigger:
            users[picture.sample.concept.settings.trigger].append(number)
    for trigger, numbers in users.items():
        if base is not None and base.is_common_word(trigger):
            yield Finding(findings.TRIGGER_KNOWN, f"{trigger!r}: is one token, among the more frequent half of all")
        texts = {text for number in numbers for text in pictures[number].texts if text.strip()}
        # The text encoders know no capital letters.
        inside = {text for text in texts if trigger.lower() in text.lower()}
        apart = _texts_with_word(trigger, sorted(inside), base)
        for number in numbers:
            yield from _trigger_in(number, pictures[number], inside, apart)


def _texts_with_word(word: str, texts: Sequence[str], base: BaseOutline | None) -> set[str]:
    """Return the texts that hold the word by itself: its tokens, or without a base no letter beside it."""
    if base is not None:
        return base.texts_with(word, texts)
    alone = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
    return {text for text in texts if alone.search(text)}


def _trigger_in(number: int, picture: Picture, inside: set[str], apart: set[str]) -> Iterator[Finding]:
    texts = [text for text in picture.texts if text.strip()]
    for kind, wrong in (
        (findings.TRIGGER_SPLIT, [text for text in texts if text in inside and text not in apart]),
        (findings.TRIGGER_MISSING, [text for text in texts if text not in inside]),
    ):
        if wrong:
            some = f"{len(wrong)} of its {len(texts)} texts, " if len(wrong) < len(texts) else ""
            yield Finding(kind, f"{picture.name}: {some}{_short(wrong[0])}", (number,))
            return


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")

"""From a caption to the text of one training step: trigger, lines, wildcards, tags, dropout.

Order and marks are those of kohya's sd-scripts (library/train_util.py, process_caption), so captions
written for it mean the same here. Three things differ: prefix and suffix are put to every line, not to
the first and the last; empty tags are left out everywhere; and no keep_separator stays in the text,
whether or not tags are shuffled or dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random
from typing import Any

from sdlora.config import CaptionsSection
from sdlora.diffusion import seed_from

# Stands for the inserted trigger until the text is finished, which keeps it whole and findable whatever it is
# made of. Unicode reserves this code point for internal use, so no caption holds it.
_TRIGGER = "\ufdd0"
# An escaped brace, or a wildcard and its choices. The quantifier must not give back a "}}" it took: "{a}}" is an
# open brace, "a" and an escaped brace, not a wildcard.
_BRACES = re.compile(r"\{\{|\}\}|\{((?:\}\}|[^}])++)\}")


def plain_caption(lines: Sequence[str], rules: CaptionsSection, trigger: str) -> str:
    """Return the caption with nothing left to chance: first line, first choices, every tag, in its own order."""
    return draw_caption(lines, rules, trigger, _NO_CHANCE)


def draw_caption(lines: Sequence[str], rules: CaptionsSection, trigger: str, random: Random) -> str:
    """Return one text of the caption. Dropout of whole captions is not part of it: see `caption_at`."""
    line = random.choice(lines) if rules.lines == "alternatives" else lines[0]
    text = _choose(_dress(line, rules, trigger), rules, random)
    if rules.shuffle or rules.tag_dropout > 0 or _is_marked(text, rules):
        text = _arrange(_split(text, rules), rules, random)
    if rules.secondary_separator:
        text = text.replace(rules.secondary_separator, rules.separator)
    return text.replace(_TRIGGER, trigger)


def left_to_chance(lines: Sequence[str], rules: CaptionsSection, trigger: str) -> bool:
    """Return whether two draws can differ; where they cannot, each is `plain_caption`.

    Wildcards count as chance even in tags that are dropped for certain.
    """
    drawn_from = lines if rules.lines == "alternatives" else lines[:1]
    if len({plain_caption([line], rules, trigger) for line in drawn_from}) > 1:
        return True
    return any(_varies(_dress(line, rules, trigger), rules) for line in drawn_from)


def caption_variants(
    lines: Sequence[str], rules: CaptionsSection, trigger: str, seed: int, name: str, count: int
) -> tuple[str, ...]:
    """Return the different texts among `count` draws: all that `caption_at` gives with so many variants.

    A fixed function of its arguments; a larger `count` only adds texts at the end.
    """
    if not left_to_chance(lines, rules, trigger):
        return (plain_caption(lines, rules, trigger),)
    return tuple(dict.fromkeys(_variant(lines, rules, trigger, seed, name, number) for number in range(count)))


def caption_at(
    lines: Sequence[str],
    rules: CaptionsSection,
    trigger: str,
    *,
    seed: int,
    name: str,
    epoch: int,
    occurrence: int,
    variants: int | None,
) -> str | None:
    """Return the text of the example `name` in one epoch (0, 1, 2, ...), None where it is trained without one.

    `occurrence` (0, 1, 2, ...) counts the example's repeats within the epoch. With `variants` None each
    text is drawn afresh. Else it is one of so many draws made once, each used equally often; a text that
    several of them share comes more often, which keeps to the share of dropped tags.
    """
    # The name comes last in every seed: it may hold "/", which would blur it with a part after it.
    if rules.dropout_every_epochs and (epoch + 1) % rules.dropout_every_epochs == 0:
        return None
    if Random(seed_from(seed, "caption dropout", epoch, occurrence, name)).random() < rules.dropout:
        return None
    if variants is None:
        return draw_caption(lines, rules, trigger, Random(seed_from(seed, "caption", epoch, occurrence, name)))
    turn, place = divmod(epoch, variants)
    order = Random(seed_from(seed, "caption order", turn, occurrence, name)).sample(range(variants), variants)
    return _variant(lines, rules, trigger, seed, name, order[place])


def _variant(lines: Sequence[str], rules: CaptionsSection, trigger: str, seed: int, name: str, number: int) -> str:
    """Return variant `number` (0, 1, 2, ...): a draw that gives each line its turn before one comes again."""
    if rules.lines == "alternatives":
        turn, place = divmod(number, len(lines))
        lines = [Random(seed_from(seed, "caption lines", turn, name)).sample(lines, len(lines))[place]]
    return draw_caption(lines, rules, trigger, Random(seed_from(seed, "caption variant", number, name)))


def _dress(line: str, rules: CaptionsSection, trigger: str) -> str:
    """Return the line with prefix and suffix, and _TRIGGER before it where a trigger is to be inserted."""
    if rules.insert_trigger and trigger and not re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", line):
        line = f"{_TRIGGER}{rules.separator} {line}" if line else _TRIGGER
    return " ".join(part for part in (rules.prefix, line, rules.suffix) if part)


def _choose(text: str, rules: CaptionsSection, random: Random) -> str:
    """Return the text with one choice in place of each wildcard, and plain braces for escaped ones."""
    if not rules.wildcards:
        return text

    def replacement(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        return random.choice(match[1].split("|")).replace("{{", "{").replace("}}", "}")

    return _BRACES.sub(replacement, text)


def _is_marked(text: str, rules: CaptionsSection) -> bool:
    return rules.keep_separator != "" and rules.keep_separator in text


def _split(text: str, rules: CaptionsSection) -> list[tuple[str, bool]]:
    """Return the tags in order, each with whether it stays; the inserted trigger does, besides `keep_tags` others."""
    if _is_marked(text, rules):
        start, free, *end = text.split(rules.keep_separator)
        parts = [(start, True), (free, False), *((part, True) for part in end)]
        return [(tag, stays or _TRIGGER in tag) for part, stays in parts for tag in _tags(part, rules)]
    tags = _tags(text, rules)
    keep = rules.keep_tags + any(_TRIGGER in tag for tag in tags[: rules.keep_tags])
    return [(tag, index < keep or _TRIGGER in tag) for index, tag in enumerate(tags)]


def _tags(text: str, rules: CaptionsSection) -> list[str]:
    return [tag.strip() for tag in text.split(rules.separator) if tag.strip()]


def _arrange(tags: Sequence[tuple[str, bool]], rules: CaptionsSection, random: Random) -> str:
    """Return the tags joined: those that stay in their places, the others shuffled among theirs or left out."""
    free = [tag for tag, stays in tags if not stays]
    if rules.shuffle:
        random.shuffle(free)
    free = ["" if random.random() < rules.tag_dropout else tag for tag in free]
    following = iter(free)
    # Not rules.separator: kohya's trainer joins with a comma and a space whatever it split at.
    return ", ".join(filter(None, (tag if stays else next(following) for tag, stays in tags)))


def _varies(text: str, rules: CaptionsSection) -> bool:
    """Return whether two draws from one line, dressed, can differ."""
    if rules.wildcards and any(len(set(match[1].split("|"))) > 1 for match in _BRACES.finditer(text) if match[1]):
        return True
    free = [tag for tag, stays in _split(_choose(text, rules, _NO_CHANCE), rules) if not stays]
    if rules.tag_dropout == 1 or not free:
        return False
    return rules.tag_dropout > 0 or (rules.shuffle and len(set(free)) > 1)


class _NoChance(Random):
    """Takes the first choice, leaves the order, and drops only what is dropped for certain."""

    def choice(self, seq: Any) -> Any:
        return seq[0]

    def shuffle(self, x: Any) -> None:
        pass

    def random(self) -> float:
        return 1 - 2**-53  # the largest number that random() gives: below a share of 1, not below any other


_NO_CHANCE = _NoChance()

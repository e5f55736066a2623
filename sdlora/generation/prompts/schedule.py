r"""Prompts that change while a picture is made: [from:to:when], [to:when], [from::when] and [a|b].

The grammar, as AUTOMATIC1111 has it:

    prompt     = (emphasis | schedule | alternation | text)*
    emphasis   = "(" prompt ")" | "(" prompt ":" prompt ")" | "[" prompt "]"
    schedule   = "[" [prompt ":"] prompt ":" number "]"
    alternation = "[" prompt ("|" [prompt])+ "]"
    text       = anything but brackets, ":" and "|", or a backslash and any character

Brackets and ":" may also stand alone, outside of every well-formed bracket; "|" may not, nor a backslash at the end of
a line: a prompt with one is plain text from beginning to end. A well-formed bracket counts whatever loose ones stand
around it, where that program's parser may choose otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_PIECES = re.compile(r"(?:[^\\\[\]():|]|\\.)+|[\[\]():|\\]")
_WHEN = re.compile(r"\s*([+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
_CLOSES = {")": "(", "]": "["}
_DEEPEST = 100


def parse_schedule(text: str, steps: int) -> list[tuple[int, str]]:
    """Return [(last step, prompt)], in order, for `steps` sampling steps counted from 1: what the prompt is up to then.

    `when` is a step, or with a point in it a share of the steps; before it and at it the first text holds. An
    alternation changes with every step. What is not well-formed stays as it is written. Weights in round brackets are
    not touched.
    """
    parsed = _parse(text) if "[" in text else None
    if parsed is None:
        return [(steps, text)]
    ends = {steps}
    for node in parsed:
        ends |= set(_ends(node, steps))
    return [(end, "".join(_text(node, end, steps) for node in parsed)) for end in sorted(ends)]


@dataclass(frozen=True)
class _Schedule:
    before: _Prompt
    after: _Prompt
    when: str

    def last_step(self, steps: int) -> int:
        """Return the last step at which `before` holds."""
        value = float(self.when) * (steps if "." in self.when else 1)
        return int(max(0.0, min(steps, value)))


@dataclass(frozen=True)
class _Alternation:
    options: tuple[_Prompt, ...]


_Node = str | _Schedule | _Alternation
_Prompt = tuple[_Node, ...]


@dataclass
class _Open:
    """A bracket that is open: what stands in it, in parts between ":" and "|"."""

    bracket: str
    parts: list[list[_Node]] = field(default_factory=lambda: [[]])
    marks: list[str] = field(default_factory=list)

    def flat(self) -> Iterator[_Node]:
        """Yield all that stands in it as if the bracket and its marks were text."""
        yield self.bracket
        for number, part in enumerate(self.parts):
            if number:
                yield self.marks[number - 1]
            yield from part


def _parse(text: str) -> _Prompt | None:
    """Return the prompt as nodes, None where it is plain text as a whole."""
    outside: list[_Node] = []
    opened: list[_Open] = []

    def give_up() -> None:
        """No open bracket is well-formed, since something in it is not: all are text."""
        outside.extend(node for bracket in opened for node in bracket.flat())
        opened.clear()

    for piece in _PIECES.findall(text):
        if piece == "\\":
            return None
        if piece in ("(", "["):
            if len(opened) >= _DEEPEST:
                return None
            opened.append(_Open(piece))
        elif piece in (":", "|"):
            if opened:
                opened[-1].parts.append([])
                opened[-1].marks.append(piece)
            else:
                outside.append(piece)
        elif piece in _CLOSES:
            closed = _close(opened[-1]) if opened and opened[-1].bracket == _CLOSES[piece] else None
            if closed is None:
                give_up()
                outside.append(piece)
            else:
                opened.pop()
                (opened[-1].parts[-1] if opened else outside).extend(closed)
        else:
            (opened[-1].parts[-1] if opened else outside).append(piece)
    give_up()
    return None if "|" in outside else tuple(outside)


def _close(bracket: _Open) -> list[_Node] | None:
    """Return what a closed bracket means, None where it is not well-formed."""
    marks, parts = bracket.marks, bracket.parts
    if bracket.bracket == "(":
        return [*bracket.flat(), ")"] if marks in ([], [":"]) else None
    if not marks:
        return [*bracket.flat(), "]"]
    if set(marks) == {"|"}:
        return [_Alternation(tuple(map(tuple, parts)))]
    *texts, last = parts
    when = _WHEN.fullmatch("".join(last)) if all(isinstance(node, str) for node in last) else None  # type: ignore[arg-type]
    if set(marks) != {":"} or len(marks) > 2 or when is None:
        return None
    return [_Schedule(tuple(texts[0]) if len(texts) > 1 else (), tuple(texts[-1]), when[1])]


def _ends(node: _Node, steps: int) -> Iterator[int]:
    """Yield the last steps of all that changes in it, whether it is ever seen or not."""
    if isinstance(node, _Alternation):
        yield from range(1, steps + 1)
    elif isinstance(node, _Schedule):
        if end := node.last_step(steps):
            yield end
        for inside in (*node.before, *node.after):
            yield from _ends(inside, steps)


def _text(node: _Node, step: int, steps: int) -> str:
    """Return what it is at a step."""
    if isinstance(node, str):
        return node
    if isinstance(node, _Alternation):
        chosen = node.options[(step - 1) % len(node.options)]
    else:
        chosen = node.before if step <= node.last_step(steps) else node.after
    return "".join(_text(inside, step, steps) for inside in chosen)

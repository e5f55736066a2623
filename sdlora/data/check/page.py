"""The contact sheet as one HTML file that needs nothing else: every picture as the model will see it, with what was found."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import sha256
from html import escape
from pathlib import Path

from PIL import Image

from sdlora.data import Progress
from sdlora.data.check.checking import Report
from sdlora.data.check.drawing import draw_all
from sdlora.data.check.findings import KINDS, Finding
from sdlora.data.check.page_look import SCRIPT, STYLE
from sdlora.data.check.picture import Picture
from sdlora.data.check.report import cropped_sentence, head_lines, tag_lines, verdict
from sdlora.data.check.sheet import LEGEND, describe_cut, findings_by_picture
from sdlora.storage import atomic_path

_SIDE, _SMALL_SIDE = 256, 144
_MANY = 2000
"""Beyond so many pictures they are drawn smaller, so that browsers can hold the page."""
_ITEMS = 200
_LINKS = 6
_QUALITY = 82
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_page(report: Report, path: Path, on_progress: Progress | None = None) -> None:
    """`path` holds the page. Pictures go to it one after another, so that the memory does not grow with them."""
    side = _SIDE if len(report.pictures) <= _MANY else _SMALL_SIDE
    found = findings_by_picture(report)
    drawings = draw_all(report.pictures, side, _jpeg)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(_before_cards(report, side))
        for number, (picture, drawing) in enumerate(zip(report.pictures, drawings, strict=True)):
            file.write(_card(number, picture, drawing, found.get(number, [])))
            if on_progress:
                on_progress(number + 1, len(report.pictures))
        file.write(f"</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n")


def _jpeg(drawn: Image.Image) -> tuple[bytes, tuple[int, int]]:
    buffer = io.BytesIO()
    drawn.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue(), drawn.size


def _before_cards(report: Report, side: int) -> Iterator[str]:
    title = ", ".join(dict.fromkeys(share.name for share in report.concepts)) or "no pictures"
    yield f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)} - contact sheet</title>\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    yield '<meta name="viewport" content="width=device-width">\n'
    yield f"<style>:root {{ --side: {side}px }}{STYLE}</style>\n</head>\n<body>\n<header>\n<h1>{escape(title)}</h1>\n"
    summary, *notes = head_lines(report)
    yield f"<p>{escape(summary)}</p>\n" + "".join(f'<p class="faint">{escape(note)}</p>\n' for note in notes)
    yield f'<p class="verdict {"fine" if report.ok else "error"}">{escape(verdict(report))}</p>\n</header>\n'
    yield from _findings(report)
    yield '<div class="columns">\n'
    yield from _shapes(report)
    yield from _concepts(report)
    yield "</div>\n"
    yield f'<h2>Pictures</h2>\n<p class="faint">{escape(LEGEND)}</p>\n'
    yield from _filters(report)
    yield '<main class="cards">\n'


def _findings(report: Report) -> Iterator[str]:
    if not report.findings:
        return
    yield "<section><h2>Findings</h2>\n"
    for kind, found in report.by_kind().items():
        opened = " open" if kind.severity == "error" else ""
        yield f'<details{opened}><summary><b class="{kind.severity}">{kind.severity}</b> {escape(kind.title)} ({len(found)})'
        yield f' <span class="faint">- {escape(kind.advice)}</span></summary>\n<ul>'
        yield "".join(f"<li>{escape(finding.text)}{_links(finding.pictures)}</li>\n" for finding in found[:_ITEMS])
        yield f"<li>and {len(found) - _ITEMS} more</li>\n" if len(found) > _ITEMS else ""
        yield "</ul></details>\n"
    yield "</section>\n"


def _links(numbers: Iterable[int], but: int = -1) -> str:
    others = [number for number in numbers if number != but]
    links = ", ".join(f'<a href="#p{number + 1}">{number + 1}</a>' for number in others[:_LINKS])
    return f" {links}{', ...' if len(others) > _LINKS else ''}" if links else ""


def _shapes(report: Report) -> Iterator[str]:
    if not report.shapes:
        return
    yield "<section><h2>Shapes</h2>\n<table>\n"
    most = report.shapes[0].pictures
    for shape in report.shapes:
        width = f"{100 * shape.pictures / most:.0f}%"
        yield f'<tr><td class="number">{shape.bucket[0]}x{shape.bucket[1]}</td><td class="number">{shape.pictures}</td>'
        yield f'<td class="bar"><div style="width: {width}"></div></td>'
        yield f'<td class="number faint">{shape.cropped:.1%} cropped</td></tr>\n'
    yield f'</table>\n<p class="faint">{escape(cropped_sentence(report))}</p>\n</section>\n'


def _concepts(report: Report) -> Iterator[str]:
    yield "<section><h2>Concepts</h2>\n<table>\n"
    for share in report.concepts:
        what = "for prior preservation" if share.prior else f"trigger {share.trigger}" if share.trigger else ""
        yield f'<tr><td>{escape(share.name)}</td><td class="number">{share.pictures} pictures x {share.repeats}</td>'
        yield f'<td class="number">{share.draws} draws</td><td class="number">{share.share:.0%}</td>'
        yield f'<td class="faint">{escape(what)}</td></tr>\n'
    yield "</table>\n"
    if lines := tag_lines(report):
        yield "<h2>Tags</h2>\n" + "".join(f"<p>{escape(line.strip())}</p>\n" for line in lines)
    yield "</section>\n"


def _filters(report: Report) -> Iterator[str]:
    """Yield a button for each kind of finding, concept and shape that some picture is of."""
    marks: dict[str, Counter[tuple[str, str]]] = {"found": Counter(), "concept": Counter(), "shape": Counter()}
    found = findings_by_picture(report)
    for number, picture in enumerate(report.pictures):
        for group, mark, label in _marks(picture, found.get(number, [])):
            marks[group][mark, label] += 1
    yield '<nav class="filters" hidden><div><button>all</button> <span id="left"></span></div>'
    for group, counts in marks.items():
        if len(counts) > 1 or (counts and group == "found"):
            yield f"<div><span>{group}</span>"
            for (mark, label), count in sorted(counts.items(), key=_place):
                yield f'<button aria-pressed="false" data-group="{group}" data-mark="{mark}">{escape(label)} {count}</button>'
            yield "</div>"
    yield "</nav>\n"


def _place(counted: tuple[tuple[str, str], int]) -> tuple[int, int]:
    """Return where a button comes: kinds of findings by gravity, others by how many pictures they show."""
    (_, label), count = counted
    return next((place for place, kind in enumerate(KINDS) if kind.name == label), 0), -count


def _marks(picture: Picture, found: list[Finding]) -> list[tuple[str, str, str]]:
    """Return what the picture can be filtered by: group, mark and label."""
    marks = [("found", f"found-{kind.name}", kind.name) for kind in dict.fromkeys(finding.kind for finding in found)]
    label = picture.sample.concept.name + (f" ({picture.part})" if picture.part != "training" else "")
    marks.append(("concept", f"concept-{sha256(label.encode()).hexdigest()[:12]}", label))
    if picture.bucket:
        shape = f"{picture.bucket[0]}x{picture.bucket[1]}"
        marks.append(("shape", f"shape-{shape}", shape))
    return marks


def _card(number: int, picture: Picture, drawing: tuple[bytes, tuple[int, int]], found: list[Finding]) -> str:
    data, (width, height) = drawing
    name = escape(picture.sample.path.name)
    marks = " ".join(mark for _, mark, _ in _marks(picture, found))
    badges = [
        f'<span class="badge {finding.kind.severity}" title="{escape(finding.text)}">{finding.kind.name}'
        f"{_links(finding.pictures, but=number)}</span>"
        for finding in found
    ]
    if len(picture.texts) > 1:
        others = "\n".join(picture.texts[1:])
        badges.append(f'<span class="badge faint" title="{escape(others)}">{len(picture.texts)} texts</span>')
    return (
        f'<figure id="p{number + 1}" data-is="{marks}"><div class="well"><img loading="lazy" decoding="async" '
        f'width="{width}" height="{height}" alt="{name}" '
        f'src="data:image/jpeg;base64,{base64.b64encode(data).decode()}"></div>\n'
        f'<figcaption><div><span class="faint">{number + 1}</span> '
        f'<span class="name" title="{escape(picture.name)}">{name}</span></div>\n'
        f'<div class="faint">{escape(describe_cut(picture))}</div>\n'
        f'<div class="caption">{_caption(picture)}</div>\n<div class="badges">{"".join(badges)}</div>'
        f"</figcaption></figure>\n"
    )


def _caption(picture: Picture) -> str:
    """Return the plain caption as HTML, the trigger marked."""
    text, trigger = picture.texts[0], picture.sample.concept.settings.trigger
    if not text:
        return '<span class="faint">(no caption)</span>'
    if not trigger or picture.part == "prior":
        return escape(text)
    parts = re.split(f"({re.escape(trigger)})", text, flags=re.IGNORECASE)
    return "".join(f"<mark>{escape(part)}</mark>" if place % 2 else escape(part) for place, part in enumerate(parts))

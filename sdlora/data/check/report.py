"""What a check found, as text for people and as JSON for scripts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from sdlora.data.check.checking import Report
from sdlora.data.check.epoch import ConceptShare
from sdlora.data.check.picture import Picture

_LISTED = 10
_TAGS = 30
_SHAPES = 24


def report_text(report: Report, limit: int | None = None) -> str:
    """Return the report for people; of each kind of finding `limit` are listed, 10 where it is None."""
    most = _LISTED if limit is None else limit
    blocks = [head_lines(report), concept_lines(report), _shapes(report), tag_lines(report)]
    for kind, found in report.by_kind().items():
        lines = [f"{kind.severity}: {kind.title} ({len(found)})", *(f"  {finding.text}" for finding in found[:most])]
        if len(found) > most:
            lines.append(f"  and {len(found) - most} more; --limit {len(found)} lists them")
        blocks.append([*lines, f"  -> {kind.advice}"])
    return "\n\n".join("\n".join(block) for block in (*blocks, [verdict(report)]) if block)


def verdict(report: Report) -> str:
    """Return the last line: whether a run would take the data, and how much there is to look at."""
    counts = dict.fromkeys(("error", "warning", "note"), 0)
    for finding in report.findings:
        counts[finding.kind.severity] += 1
    listed = ", ".join(f"{number} {name}{'s' * (number != 1)}" for name, number in counts.items() if number)
    if not report.ok:
        return f"a training run would refuse this data: {listed}"
    return f"a training run would take this data{': ' + listed if listed else '; nothing was found'}"


def head_lines(report: Report) -> list[str]:
    """Return what the data were taken for, and under which assumptions they were looked at."""
    lines = [report.summary, *(f"  {note}" for note in report.notes)]
    sides = " and ".join(map(str, report.resolutions))
    origin = " (assumed: --base or --resolution says)" if report.resolution_assumed else ""
    if sides:
        lines.append(f"  resolution {sides}{origin}{'; base: ' + report.base if report.base else ''}")
    if not report.base:
        lines.append("  without --base, captions are not looked at as the text encoder sees them")
    if report.headers_only:
        lines.append("  only headers were read: damage, masks and near-duplicates were not looked for")
    return lines


def concept_lines(report: Report) -> list[str]:
    """Return a line for each concept, with its share of an epoch."""
    lines = []
    for title, prior in (("concepts", False), ("for prior preservation", True)):
        shares = [share for share in report.concepts if share.prior == prior]
        if shares:
            width = max(len(share.name) for share in shares)
            lines += [f"{title}:", *(f"  {share.name:<{width}}  {_share(share)}" for share in shares)]
    return lines


def _share(share: ConceptShare) -> str:
    trigger = f', trigger "{share.trigger}"' if share.trigger and not share.prior else ""
    return (
        f"{share.pictures} picture{'s' * (share.pictures != 1)}, repeats {share.repeats}: {share.draws} draws "
        f"an epoch, {share.share:.0%}{trigger}"
    )


def _shapes(report: Report) -> list[str]:
    if not report.shapes:
        return []
    lines = [f"shapes: {len(report.shapes)}"]
    most = report.shapes[0].pictures
    for shape in report.shapes[:_SHAPES]:
        bar = "#" * max(1, round(30 * shape.pictures / most))
        size = f"{shape.bucket[0]}x{shape.bucket[1]}"
        lines.append(f"  {size:>9} {shape.pictures:>6}  {shape.cropped:>6.1%} cropped  {bar}")
    if len(report.shapes) > _SHAPES:
        lines.append(f"  and {len(report.shapes) - _SHAPES} more")
    return [*lines, f"  {cropped_sentence(report)}"]


def cropped_sentence(report: Report) -> str:
    """Return how much is cropped away, and how many batches there are."""
    mean, largest = cropped_shares(report)
    text = f"{mean:.1%} cropped on average, at most {largest:.1%}"
    if batches := report.batches:
        text += f"; batches of {batches.size}: {batches.count} an epoch, {batches.short} of them short"
        text += f", {batches.left_out} pictures left out" if batches.left_out else ""
        text += f", {batches.drawn_again} pictures drawn again" if batches.drawn_again else ""
    return text


def tag_lines(report: Report) -> list[str]:
    """Return the tags on more than one picture, and those on all."""
    shared = [(tag, count) for tag, count in report.tags if count > 1][:_TAGS]
    if not shared:
        return []
    everywhere = everywhere_tags(report)
    lines = ["most frequent tags: " + ", ".join(f"{tag} ({count})" for tag, count in shared)]
    if everywhere:
        lines.append("  on every picture: " + ", ".join(everywhere))
    return lines


def cropped_shares(report: Report) -> tuple[float, float]:
    """Return the mean and the largest share that is cropped away of pictures trained on."""
    shares = [picture.cropped for picture in report.pictures if picture.part != "validation" and picture.bucket]
    return (sum(shares) / len(shares), max(shares)) if shares else (0.0, 0.0)


def everywhere_tags(report: Report) -> list[str]:
    """Return the tags that are on every training picture."""
    count = sum(picture.part == "training" for picture in report.pictures)
    return [tag for tag, number in report.tags if number == count > 1]


def report_json(report: Report, limit: int | None = None) -> dict[str, Any]:
    """Return the report as JSON can hold it; of each kind of finding `limit` are listed, all where it is None."""
    mean, largest = cropped_shares(report)
    return {
        "ok": report.ok,
        "summary": report.summary,
        "notes": list(report.notes),
        "base": report.base or None,
        "resolutions": list(report.resolutions),
        "resolution_assumed": report.resolution_assumed,
        "headers_only": report.headers_only,
        "concepts": [asdict(share) for share in report.concepts],
        "shapes": [
            {"width": s.bucket[0], "height": s.bucket[1], "pictures": s.pictures, "cropped": round(s.cropped, 4)}
            for s in report.shapes
        ],
        "cropped": {"mean": round(mean, 4), "largest": round(largest, 4)},
        "batches": asdict(report.batches) if report.batches else None,
        "tags": [{"tag": tag, "pictures": count} for tag, count in report.tags[:_TAGS]],
        "tags_on_every_picture": everywhere_tags(report),
        "findings": list(_findings(report, limit)),
        "pictures": [_picture(picture) for picture in report.pictures],
    }


def _findings(report: Report, limit: int | None) -> Iterator[dict[str, Any]]:
    for kind, found in report.by_kind().items():
        yield {
            "kind": kind.name,
            "severity": kind.severity,
            "title": kind.title,
            "advice": kind.advice,
            "count": len(found),
            "items": [
                {"text": finding.text, "files": [report.pictures[number].name for number in finding.pictures]}
                for finding in found[:limit]
            ],
        }


def _picture(picture: Picture) -> dict[str, Any]:
    header, bucket = picture.look.header, picture.bucket
    return {
        "file": picture.name,
        "part": picture.part,
        "concept": picture.sample.concept.name,
        "width": header.width if header else None,
        "height": header.height if header else None,
        "format": header.format if header else None,
        "mode": header.mode if header else None,
        "shape": list(bucket) if bucket else None,
        "cropped": round(picture.cropped, 4),
        "enlarged": round(picture.enlarged, 4),
        "mask": str(picture.sample.mask) if picture.sample.mask else None,
        "caption": picture.texts[0],
        "texts": len(picture.texts),
    }

"""What the page says beside its pictures."""

from __future__ import annotations

import html

from .jobs import Progress, Waiting
from .library import Library


def progress(report: Waiting | Progress, base: str) -> tuple[str, float]:
    """Return the line under the bar, plain text, and the share of the work that is done."""
    if isinstance(report, Waiting):
        return (f"Loading base {base} ..." if report.reason == "loading" else "Waiting for another picture ..."), 0.0
    text = f"Step {report.step} of {report.steps}, picture {report.picture} of {report.pictures}"
    if report.seconds_left is not None:
        text += f", about {duration(report.seconds_left)} left"
    return text, (report.picture - 1 + report.step / report.steps) / report.pictures


def duration(seconds: float) -> str:
    """Return the time as people say it: "4.2 s", "35 s", "12 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def status(text: str, kind: str = "idle", share: float = 0.0) -> str:
    """Return the status line as HTML, `text` escaped; with kind "busy" a bar filled to `share`."""
    bar = f'<div class="bar"><div style="width:{share:.1%}"></div></div>' if kind == "busy" else ""
    return f'<div class="status {kind}" role="status">{bar}<p>{html.escape(text)}</p></div>'


def library_note(library: Library, count: int) -> str:
    """Return the HTML under the dropdown: what to do without adapters, and which files cannot be used and why."""
    lines = []
    if not count:
        lines.append(f"<p>No adapters in {html.escape(str(library.folder))} yet. Train one, then press Refresh.</p>")
    if unusable := library.unusable():
        items = "".join(f"<li><b>{html.escape(e.name)}</b>: {html.escape(e.problem)}</li>" for e in unusable)
        files = "1 file" if len(unusable) == 1 else f"{len(unusable)} files"
        lines.append(f"<details><summary>{files} cannot be used</summary><ul>{items}</ul></details>")
    return f'<div class="hint">{"".join(lines)}</div>'

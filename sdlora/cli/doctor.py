"""`sdlora doctor`: what this machine and installation can do."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from sdlora.doctor import Check, examine, examine_each

_COLUMN = 26  # where values begin


def run(arguments: list[str]) -> int:
    """Examine and print; returns 1 where there is a problem."""
    options = _parser().parse_args(arguments)
    show = _print_json if options.json else _print_list
    return 0 if show(not options.skip_self_test, options.device) else 1


def _print_json(self_test: bool, device: str | None) -> bool:
    checks = examine(self_test, device)
    document = {"ok": _is_well(checks), "checks": [asdict(check) for check in checks]}
    print(json.dumps(document, indent=2), flush=True)
    return _is_well(checks)


def _print_list(self_test: bool, device: str | None) -> bool:
    checks = []
    for check in examine_each(self_test, device):
        checks.append(check)
        print(_lines(check), flush=True)
    print(f"\n{_summary(checks)}", flush=True)
    return _is_well(checks)


def _is_well(checks: Sequence[Check]) -> bool:
    return all(check.state != "problem" for check in checks)


def _lines(check: Check) -> str:
    """Return state, name and value with its meaning, then the fix where there is one."""
    width = max(60, shutil.get_terminal_size((110, 24)).columns)
    margin = " " * _COLUMN
    head = f"{check.state:<8} {check.name:<16} "
    texts = [(head, f"{check.value} - {check.meaning}"), *([(margin, f"fix: {check.fix}")] if check.fix else [])]
    wrap = textwrap.TextWrapper(width, subsequent_indent=margin, break_on_hyphens=False, break_long_words=False)
    return "\n".join(wrap.fill(start + text) for start, text in texts)


def _summary(checks: Sequence[Check]) -> str:
    problems, notes = ([check.name for check in checks if check.state == state] for state in ("problem", "note"))
    if problems:
        return f"to be mended: {', '.join(problems)}"
    return f"everything works; notes: {', '.join(notes)}" if notes else "everything works"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdlora doctor",
        description="Check this machine and installation: every line with its meaning and, where needed, its fix. "
        "Nothing is asked of the network. The exit status is 1 where there is a problem.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--skip-self-test", action="store_true", help="leave out the training of a small adapter")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps; default: the GPU where there is one")
    return parser

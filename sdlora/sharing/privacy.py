"""What a header, or a card, tells about its author's machine, name and pictures, which nobody publishes on purpose."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from sdlora.adapters.header_text import plain
from sdlora.adapters.private_text import private_entries, tellings

Kind = Literal["path", "private", "name", "needed"]
_PATH = "a path"
_EVERYBODY = {"root", "user", "admin", "administrator", "ubuntu", "home", "default", "guest", "jovyan"}
_SHOWN = 80
_ESCAPE = re.compile(r"\\([!-/:-@\[-`{-~])")
_OF_A_MACHINE = re.compile(r"file:|[A-Za-z]:[\\/]|\\\\\w|~\w|/[\w.@+~-]+/\S|/root\b", re.IGNORECASE)
"""Paths that are no links to what lies beside a card, no line feeds in code, and no /commands."""


@dataclass(frozen=True)
class Finding:
    """One thing that a header tells."""

    kind: Kind
    """"path" on a machine; else what is "private", the "name" of who runs this, a path in an entry that is "needed"."""
    key: str
    what: str
    text: str = ""
    """Of it, as much as shows what it is."""

    def sentence(self) -> str:
        """Return it for a person to read."""
        return f"{self.key} tells {self.what}{f': {self.text}' if self.text else ''}"


def private_findings(metadata: Mapping[str, str], user: str | None = None) -> list[Finding]:
    """Return what of a header is private, paths first; `user` None stands for who runs this.

    It is what `strip` leaves out, each entry once; a path in an entry without which the file is not read is "needed".
    """
    private = private_entries(metadata)
    found = [finding for key in sorted(metadata) for finding in _of_entry(key, metadata[key], private.get(key, ""))]
    name = _login_name() if user is None else user
    if len(name) >= 3 and name.lower() not in _EVERYBODY:
        whole = re.compile(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", re.IGNORECASE)
        own = (key for key in sorted(metadata) if whole.search(metadata[key]))
        found += [Finding("name", plain(key, _SHOWN), "your login name", plain(name, _SHOWN)) for key in own]
    return sorted(found, key=lambda finding: get_args(Kind).index(finding.kind))


def paths_in_card(text: str) -> list[str]:
    """Return the paths of a machine in a card, as much of each as shows what it is."""
    words = re.split(r"[\s`]+", _ESCAPE.sub(r"\1", text))
    found = (found for word in words for what, found in tellings(word) if what == _PATH)
    return [plain(path, _SHOWN) for path in found if _OF_A_MACHINE.match(path)]


def _of_entry(key: str, text: str, private: str) -> Iterator[Finding]:
    """Yield what one entry tells; `private` is why `strip` leaves it out, "" where it does not."""
    shown = plain(key, _SHOWN)
    told = [*tellings(text, key), *tellings(key)]
    if path := next((found for what, found in told if what == _PATH), ""):
        yield Finding("path" if private else "needed", shown, "a path of a machine", plain(path, _SHOWN))
    elif private:
        yield Finding(
            "private", shown, private, next((plain(found, _SHOWN) for what, found in told if what == private), "")
        )


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such user, as in some containers
        return ""

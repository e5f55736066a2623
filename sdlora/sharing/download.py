"""One file over the network: of bounded size, with each login for its own server alone."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sdlora.errors import FormatError, NetworkError, OutputError
from sdlora.sharing.address import CIVITAI_HOSTS, origin, redirected, shown
from sdlora.sharing.hub import check_token, describe_status, endpoint, network_errors, shown_error

OnBytes = Callable[[int, int], None]
"""Told how many bytes have come and how many will, 0 where the server does not tell."""
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 10
_SECONDS = 60.0
_PIECE = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Download:
    """What came, and what the server said of it."""

    path: Path
    sha256: str
    promised_sha256: str
    """What the Hub says that it should be, or ""."""


def download(
    url: str,
    choose: Callable[[str], Path],
    *,
    limit: int,
    civitai_token: str = "",
    hub_id: str = "",
    on_bytes: OnBytes | None = None,
) -> Download:
    """The file behind the address lies where `choose`, asked with the server's name for it, says.

    `hub_id` is the Hub's repository that the address is of, if it is. Raises NetworkError where the server refuses or
    cannot be reached, FormatError for a web page, OutputError for more than `limit` bytes and for a full disk.
    """
    start, promised = url, ""
    for _ in range(_MOST_REDIRECTS):
        with _asked(url, civitai_token, start) as response:
            if origin(url) == origin(endpoint()):
                promised = promised or _promised(response.headers)
            if response.status_code in _REDIRECTS and "location" in response.headers:
                url = redirected(url, response.headers["location"])
                continue
            _check_answer(response, start, hub_id)
            path = choose(_name(response.headers) or unquote(urlsplit(start).path.rpartition("/")[2]))
            return Download(path, _save(response, path, start, limit, on_bytes), promised)
    raise NetworkError(f"{shown(start)}: leads from one address to another without end")


def headers_for(url: str, civitai_token: str) -> dict[str, str]:
    """Return the headers of a request: the Hub's login for the Hub, Civitai's token for Civitai, none for others.

    Raises ConfigError for a login that is none.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import build_hf_headers

    headers = {"accept-encoding": "identity", "user-agent": "sdlora"}
    if origin(url) == origin(endpoint()):
        check_token(get_token() or "", "HF_TOKEN")
        return {**headers, **build_hf_headers(library_name="sdlora")}
    if civitai_token.strip() and urlsplit(url).scheme == "https" and urlsplit(url).hostname in CIVITAI_HOSTS:
        headers["authorization"] = f"Bearer {check_token(civitai_token.strip(), 'CIVITAI_TOKEN')}"
    return headers


@contextmanager
def _asked(url: str, civitai_token: str, start: str) -> Iterator[Any]:
    """Yield the server's answer, whose body has not been read."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        with get_session().stream(
            "GET", url, headers=headers_for(url, civitai_token), follow_redirects=False, timeout=_SECONDS
        ) as response:
            yield response
    except OfflineModeIsEnabled as error:
        raise NetworkError(f"{shown(start)}: HF_HUB_OFFLINE is set; unset it to go online") from error
    except network_errors() as error:
        raise NetworkError(
            f"{shown(start)}: cannot be reached, or broke off ({shown_error(error)}); check the connection and try again"
        ) from error


def _check_answer(response: Any, start: str, hub_id: str) -> None:
    """Raises NetworkError for a refusal, FormatError for a web page in place of a file."""
    status, code = response.status_code, response.headers.get("x-error-code", "")
    if status != 200:
        raise NetworkError(f"{shown(start)}: {_refusal(status, code, hub_id, start)}")
    if response.headers.get("content-type", "").lower().startswith(("text/html", "application/xhtml")):
        raise FormatError(f"{shown(start)}: is a web page, not a model file; {_sign_in(start)}")


def _refusal(status: int, code: str, hub_id: str, start: str) -> str:
    if hub_id:
        reasons = {
            "EntryNotFound": f"{hub_id} has no such file",
            "RevisionNotFound": f"{hub_id} has no such branch, tag or commit",
            "RepoNotFound": describe_status(404, hub_id),
            "GatedRepo": f"{hub_id} is gated; accept its terms on {endpoint()}/{hub_id}, run 'hf auth login', and try again",
        }
        return reasons.get(code) or describe_status(status, hub_id) or f"the server refuses ({status})"
    if status in (401, 403):
        return f"the server wants a login ({status}); {_sign_in(start)}"
    if status in (404, 410):
        return f"there is no such file ({status}); check the address"
    return describe_status(status, "") if status == 429 or status >= 500 else f"the server refuses ({status})"


def _sign_in(start: str) -> str:
    if urlsplit(start).hostname in CIVITAI_HOSTS:
        return "make a token in your account's settings at civitai.com and give it as CIVITAI_TOKEN"
    return "open it in a browser, sign in there if it asks, and copy the address of the file itself"


def _name(headers: Mapping[str, str]) -> str:
    """Return the file name in Content-Disposition, or ""."""
    message = Message()
    try:
        message["content-disposition"] = headers.get("content-disposition", "")
        return message.get_filename() or ""
    except (ValueError, LookupError, TypeError, AttributeError):  # the library expects what makes sense
        return ""


def _promised(headers: Mapping[str, str]) -> str:
    """Return the SHA-256 that the Hub tells of a large file; of small ones it has another hash."""
    tag = headers.get("x-linked-etag", "").removeprefix("W/").strip('"').lower()
    return tag if _SHA256.fullmatch(tag) else ""


def _save(response: Any, path: Path, start: str, limit: int, on_bytes: OnBytes | None) -> str:
    """The body lies at `path`; returns its SHA-256."""
    told = response.headers.get("content-length", "")
    total = int(told) if told.isascii() and told.isdecimal() else 0
    done, digest = 0, hashlib.sha256()
    try:
        with path.open("wb") as file:
            for piece in response.iter_bytes(_PIECE):
                done += len(piece)
                if max(done, total) > limit:
                    raise OutputError(
                        f"{shown(start)}: is larger than {limit / 1e9:g} GB; say --max-gigabytes to allow more"
                    )
                file.write(piece)
                digest.update(piece)
                if on_bytes:
                    on_bytes(done, total)
            file.flush()
            os.fsync(file.fileno())
    except network_errors():
        raise
    except OSError as error:
        raise OutputError(
            f"{path.name}: cannot be written ({error.strerror or error}); choose another folder"
        ) from error
    return digest.hexdigest()

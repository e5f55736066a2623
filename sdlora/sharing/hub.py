"""The Hugging Face Hub: which one is meant, and what its refusals mean."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sdlora.errors import ConfigError, NetworkError, first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_TOKEN = re.compile(r"[\x21-\x7e]+")


def endpoint() -> str:
    """Return the address of the Hub, which `HF_ENDPOINT` names where it is not the usual one. Raises ConfigError."""
    from huggingface_hub import constants

    named = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    try:
        parts = urlsplit(named)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError("HF_ENDPOINT: is no address; expected one such as https://huggingface.co, or leave it unset")
    return named


def hub_api() -> HfApi:
    """Return the way to the Hub that is meant, as who is logged in. Raises ConfigError for a login that is none."""
    from huggingface_hub import HfApi, get_token

    check_token(get_token() or "", "HF_TOKEN")
    return HfApi(endpoint=endpoint())


def check_token(token: str, name: str) -> str:
    """Return the token, "" where there is none. Raises ConfigError, which does not show it, for what cannot be one."""
    if token and not _TOKEN.fullmatch(token):
        raise ConfigError(f"{name}: is no token; expected letters and digits without spaces, copy it again")
    return token


@contextmanager
def hub_answers(name: str, revision: str = "") -> Iterator[None]:
    """What the Hub or the network refuses inside is a NetworkError of one sentence; `name` is a Hub id."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise NetworkError(f"{name}: HF_HUB_OFFLINE is set; unset it to go online") from error
    except HFValidationError as error:
        raise NetworkError(f"{name}: is no Hugging Face id; expected owner/name") from error
    except RevisionNotFoundError as error:
        raise NetworkError(f"{name}: has no branch, tag or commit called {revision!r}") from error
    # The library takes answers for what it expects: a stranger's JSON ends in any of these.
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise NetworkError(f"{name}: {_reason(error, name)}") from error
    except Exception as error:
        if not isinstance(error, network_errors()):
            raise
        raise NetworkError(f"{name}: {_reason(error, name)}") from error


@contextmanager
def quiet_progress() -> Iterator[None]:
    """The library's progress bars are shown on a terminal alone."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def network_errors() -> tuple[type[Exception], ...]:
    """Return what requests end in where there is no answer."""
    from httpx2 import HTTPError, InvalidURL  # what huggingface_hub asks with

    return HTTPError, InvalidURL


def shown_error(error: BaseException) -> str:
    """Return the first line of a network error; not of one that quotes what would have been sent, logins included."""
    from httpx2 import LocalProtocolError

    return "the request cannot be sent" if isinstance(error, LocalProtocolError) else first_line(error)


def status_of(error: BaseException) -> int:
    """Return the HTTP status that an error, or what caused it, is about; 0 where there was no answer."""
    seen: BaseException | None = error
    while seen is not None:
        if status := getattr(getattr(seen, "response", None), "status_code", 0):
            return int(status)
        seen = seen.__cause__
    return 0


def describe_status(status: int, name: str) -> str:
    """Return what a refusal with that HTTP status means, and what helps; "" for a status that says nothing."""
    server, owner = endpoint(), name.partition("/")[0]
    if status == 401:
        return f"{server} does not accept the login (401); run 'hf auth login', or set HF_TOKEN to a valid token"
    if status == 403:
        return f"the login may not do this (403); use a token that may write to {owner}, or accept the terms on {server}/{name}"
    if status == 404:
        return f"there is no such model on {server}, or it is private and the login may not see it (404)"
    if status in (409, 412):
        return f"was changed by somebody else meanwhile ({status}); look at {server}/{name} and try again"
    if status == 413:
        return "a file is too large for the server (413)"
    if status == 429:
        return "the server gets too many requests (429); wait a while and try again"
    return f"the server failed ({status}); try again later" if status >= 500 else ""


def _reason(error: BaseException, name: str) -> str:
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError):
        return f"is gated; accept its terms on {endpoint()}/{name}, run 'hf auth login', and try again"
    status = status_of(error)
    if status:
        return describe_status(status, name) or f"the server refuses ({status}: {first_line(error)})"
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    if isinstance(error, network_errors()) or isinstance(cause, network_errors()):
        return f"{endpoint()} cannot be reached ({shown_error(cause)}); check the connection and try again"
    return f"{endpoint()} does not answer as expected ({first_line(error)})"

"""Where an adapter is to come from: a file on the Hugging Face Hub, or an address on the web."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import parse_qs, unquote, urljoin, urlsplit

from sdlora.adapters.header_text import plain
from sdlora.errors import ConfigError
from sdlora.families.sources import is_hub_id
from sdlora.sharing.hub import endpoint
from sdlora.storage import past_devices

CIVITAI_HOSTS = frozenset({"civitai.com", "www.civitai.com"})
SUFFIX = ".safetensors"
_HUB_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
_OTHER_KINDS = ("datasets", "spaces", "buckets", "collections", "papers", "docs")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ODD = re.compile(r'[<>:"|?*]')
_LONGEST_BYTES = 150
_NAMELESS = "pytorch_lora_weights.safetensors"
"""What diffusers calls every adapter."""


@dataclass(frozen=True)
class HubPlace:
    """A file of a repository on the Hub; `file` is "" where it is still to be found out."""

    repository: str
    file: str = ""
    revision: str = ""


@dataclass(frozen=True)
class WebPlace:
    """A file behind an address."""

    url: str


def parse_address(text: str) -> HubPlace | WebPlace:
    """Return what "owner/name", "owner/name/file.safetensors" or an address names. Raises ConfigError for others."""
    text = text.strip()
    if "://" in text:
        return _parse_url(text)
    owner, _, rest = text.partition("/")
    name, _, file = rest.partition("/")
    if not is_hub_id(f"{owner}/{name}") or _leads_out(file) or (not file and name.endswith(SUFFIX)):
        raise ConfigError(
            f"{plain(text)}: is neither a Hugging Face id (owner/name, owner/name/file.safetensors) nor an https address"
        )
    return HubPlace(f"{owner}/{name}", file)


def is_civitai(text: str) -> bool:
    """Return whether an id or address names something at Civitai. Raises ConfigError where it names nothing."""
    place = parse_address(text)
    return isinstance(place, WebPlace) and urlsplit(place.url).hostname in CIVITAI_HOSTS


def check_url(url: str, came_from: str = "") -> str:
    """Return the address where it is one that is asked: https, or http on this machine. Raises ConfigError.

    A redirect leads to this machine or its network only from there, so that no server reaches what listens to these
    alone. Addresses in numbers are told by themselves; a name is not resolved, so one may still lead there.
    """
    try:
        parts = urlsplit(url)
        host, _ = _host(url), parts.port
    except ValueError as error:
        raise ConfigError(f"{shown(url)}: is no address") from error
    before = _host(came_from) if came_from else ""
    where = f"{shown(came_from)}: leads to {shown(url)}, which" if came_from else f"{shown(url)}:"
    if came_from and _is_inside(host) and host != before and not (host in _LOOPBACK and before in _LOOPBACK):
        raise ConfigError(f"{where} is not asked, as it may be on this machine or its network; give it yourself")
    if parts.scheme == "http" and host in _LOOPBACK and (not came_from or before in _LOOPBACK):
        return url
    if parts.scheme != "https" or not host:
        raise ConfigError(
            f"{where} is not asked; only https addresses are, as others can be read and changed on the way"
        )
    return url


def _host(url: str) -> str:
    """Return the host of an address, as the network has it. Raises ValueError where there is no such name."""
    host = urlsplit(url).hostname or ""
    if ":" not in host:  # an address of version 6 is no name
        host = host.encode("idna").decode().rstrip(".")
    url.encode()
    return host


def _is_inside(host: str) -> bool:
    """Return whether a host is, or may be, this machine or of its network, as far as its name alone tells."""
    try:
        address = ip_address(host)
    except ValueError:
        last = host.rpartition(".")[2]  # a number there stands for an address in some system's spelling
        return last == "localhost" or bool(re.fullmatch(r"[0-9]+|0x[0-9a-f]*", last))
    address = getattr(address, "ipv4_mapped", None) or address
    return not address.is_global or address.is_multicast


def redirected(url: str, location: str) -> str:
    """Return where a server at `url` sends us, where that is an address that is asked. Raises ConfigError."""
    try:
        target = urljoin(url, location)
    except ValueError as error:
        raise ConfigError(f"{shown(url)}: leads to {shown(location)}, which is no address") from error
    return check_url(target, url)


def shown(url: str) -> str:
    """Return as much of an address as is shown: no query and no user, which may hold secrets."""
    try:
        parts = urlsplit(url)
        return plain(f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}")
    except ValueError:
        scheme, _, rest = url.rpartition("://") if "://" in url else ("", "", url)
        host = re.split(r"[/?#]", rest)[0].rpartition("@")[2]
        return plain(f"{scheme}://{re.sub(r'(?<!^):(?![0-9]+$).*', '', host)}")


def origin(url: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port of an address."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def safe_file_name(name: str) -> str:
    """Return the name as that of a .safetensors file in a folder of the user's, whatever a server called it."""
    last = re.split(r"[\\/]", unicodedata.normalize("NFC", name.encode(errors="replace").decode()))[-1]
    stem = _ODD.sub("", "".join(filter(str.isprintable, last))).strip(". ")
    for suffix in (SUFFIX, ".pt", ".ckpt", ".bin", ".pth"):
        stem = stem[: -len(suffix)] if stem.lower().endswith(suffix) else stem
    stem = stem.encode()[:_LONGEST_BYTES].decode(errors="ignore").strip(". ")
    return f"{past_devices(stem) or 'adapter'}{SUFFIX}"


def fetched_name(repository: str, file: str) -> str:
    """Return what a file of a repository is called here: by the repository where its own name says nothing."""
    last = file.rpartition("/")[2]
    return safe_file_name(f"{repository.partition('/')[2]}{SUFFIX}" if last == _NAMELESS else last)


def _parse_url(text: str) -> HubPlace | WebPlace:
    url = check_url(text)
    parts = urlsplit(url)
    if parts.hostname in _HUB_HOSTS or origin(url) == origin(endpoint()):
        return _parse_hub(url, [unquote(part) for part in parts.path.split("/") if part])
    if parts.hostname in CIVITAI_HOSTS and parts.path.startswith("/models/"):
        version = parse_qs(parts.query).get("modelVersionId", [""])[0]
        if not version.isdecimal():
            raise ConfigError(
                f"{shown(url)}: is a page with several versions; open it, choose one, and give its address with "
                "?modelVersionId=, or the link of its download button"
            )
        return WebPlace(f"https://{parts.hostname}/api/download/models/{version}")
    return WebPlace(url)


def _parse_hub(url: str, steps: list[str]) -> HubPlace:
    """Return what the path of an address on the Hub names: owner/name, .../tree/REVISION, .../blob/REVISION/FILE."""
    if len(steps) >= 2 and steps[0] not in _OTHER_KINDS and is_hub_id(f"{steps[0]}/{steps[1]}"):
        repository, rest = f"{steps[0]}/{steps[1]}", steps[2:]
        if not rest:
            return HubPlace(repository)
        if rest[0] == "tree" and len(rest) == 2:
            return HubPlace(repository, "", rest[1])
        file = "/".join(rest[2:])
        if rest[0] in ("resolve", "blob", "raw") and file and not _leads_out(file):
            return HubPlace(repository, file, rest[1])
    raise ConfigError(f"{shown(url)}: is no model on the Hub; expected .../owner/name or .../owner/name/blob/main/FILE")


def _leads_out(file: str) -> bool:
    return file.startswith("/") or "\\" in file or any(part in ("..", ".") for part in file.split("/"))

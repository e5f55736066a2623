"""Builds the page and serves it to this computer, or behind a password to others."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

import sdlora
from sdlora.errors import ConfigError
from sdlora.sharing.library import AdapterLibrary
from sdlora.storage import check_writable

from .generate import GenerateTab
from .jobs import EngineJobs
from .library import Library
from .style import CSS, HEAD

_UPLOAD_LIMIT = "1mb"  # the page takes no files
_QUEUE_LIMIT = 32
_FORGET_SECONDS = 86_400
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Fonts that every system has: none is fetched.
_THEME = gr.themes.Default(
    primary_hue="indigo",
    spacing_size="sm",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
_LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}


def build_page(jobs: EngineJobs, library: Library, output: Path) -> gr.Blocks:
    """Return the page, not yet served."""
    with gr.Blocks(title="sdlora", analytics_enabled=False, delete_cache=(3600, _FORGET_SECONDS)) as page:
        gr.HTML("<h1>sdlora</h1>", elem_id="title")
        with gr.Tab("Generate"):
            GenerateTab(jobs, library, output).build(page)
    page.queue(max_size=_QUEUE_LIMIT, default_concurrency_limit=8)
    return page


def serve(
    base: str | sdlora.BaseSection,
    library: Path,
    output: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    password: tuple[str, str] | None = None,
    open_browser: bool = False,
) -> None:
    """The page is served until Ctrl-C. Its address is printed; port 0 is any free one.

    Raises ConfigError for a host that others can reach without `password` (user, password), and for a
    port in use; OutputError when `output` cannot be written.
    """
    host = host.strip("[]")
    if not is_loopback(host) and not password:
        raise ConfigError(
            f"--host {host} opens the page to other computers; add --password user:password, "
            "or leave the host at 127.0.0.1"
        )
    output = output.expanduser().resolve()
    check_writable(output)
    port = _usable_port(host, port)
    adapters = AdapterLibrary(library)
    # Naming sdlora.Engine imports torch: when a picture is asked for, not before the page is served.
    jobs = EngineJobs(base, lambda named: sdlora.Engine(named, find_adapter=adapters.path_of))
    with tempfile.TemporaryDirectory(prefix="sdlora-page-") as temporary:
        # By default gradio keeps copies of every picture in a folder that all users of a machine share.
        os.environ["GRADIO_TEMP_DIR"] = temporary
        page = build_page(jobs, Library(library.expanduser()), output)
        jobs.start_loading()
        try:
            _launch(page, host, port, output, password, open_browser)
            _wait_for_interrupt()
        finally:
            jobs.close()
            page.close(verbose=False)


def _launch(
    page: gr.Blocks, host: str, port: int, output: Path, password: tuple[str, str] | None, open_browser: bool
) -> None:
    address = f"[{host}]" if ":" in host else host
    page.launch(
        server_name=address,
        server_port=port,
        inbrowser=open_browser,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        auth=password,
        allowed_paths=[str(output)],
        max_file_size=_UPLOAD_LIMIT,
        app_kwargs={"middleware": [Middleware(HostGuard, host=host)]},
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        theme=_THEME,
        css=CSS,
        head=HEAD,
    )
    print(f"sdlora is at http://{address}:{port} (Ctrl-C ends it)", flush=True)


def _wait_for_interrupt() -> None:
    """Ctrl-C or SIGTERM has come."""
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in _STOP_SIGNALS}
    try:
        while not stopped.wait(0.5):  # with a limit, so that Windows delivers Ctrl-C
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_loopback(host: str) -> bool:
    """Return whether only this computer can reach a server on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class HostGuard:
    """ASGI middleware: a request must name this server as its host, and come from no other site's page.

    Without it, a website could point its own name at 127.0.0.1 and drive the page from a visitor's
    browser (DNS rebinding).
    """

    def __init__(self, app: Any, host: str) -> None:
        self._app = app
        self._names = _LOCAL_NAMES | {host.lower()}
        # On all interfaces the page has any of the machine's addresses. A number cannot be rebound.
        self._any_number = host in {"0.0.0.0", "::"}
        if self._any_number:
            self._names |= {socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in {"http", "websocket"}:
            headers = dict(scope["headers"])
            host = headers.get(b"host", b"").decode("latin-1").lower()
            origin = headers.get(b"origin", b"").decode("latin-1").lower()
            if not self._is_ours(host) or (origin and urlsplit(origin).netloc != host):
                await PlainTextResponse("This address is not served here.", 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._any_number


def _usable_port(host: str, port: int) -> int:
    """Return `port`, or a free one for 0. Raises ConfigError when it cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"the page cannot be served at {host}:{port} ({reason}); use another --port, or 0 for any"
        ) from error

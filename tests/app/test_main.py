import asyncio
import socket
import subprocess
import sys

import pytest

from sdlora.app.main import HostGuard, _usable_port, is_loopback
from sdlora.cli.app import run
from sdlora.errors import ConfigError


def answer(guard, **headers):
    """Return the status of a request with these headers; 200 when it is let through."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    guard._app = app
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(guard({"type": "http", "method": "POST", "headers": raw}, None, send))
    return sent[0]["status"]


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1:7860", "[::1]:7860", "LOCALHOST"])
def test_own_names_are_served(host):
    guard = HostGuard(None, "127.0.0.1")
    assert answer(guard, host=host) == 200
    assert answer(guard, host=host, origin=f"http://{host}") == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "192.168.1.5:7860", "", "[::1", "localhost.evil.example"]
)
def test_foreign_names_are_refused(host):
    assert answer(HostGuard(None, "127.0.0.1"), host=host) == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:3000"])
def test_pages_of_other_sites_are_refused(origin):
    assert answer(HostGuard(None, "127.0.0.1"), host="127.0.0.1:7860", origin=origin) == 403


def test_on_all_interfaces_numbers_are_served_and_names_are_not():
    guard = HostGuard(None, "0.0.0.0")
    assert answer(guard, host="192.168.1.5:7860") == 200
    assert answer(guard, host="evil.example") == 403


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
     ("192.168.1.5", False), ("::", False), ("my-pc", False)],
)  # fmt: skip
def test_is_loopback(host, loopback):
    assert is_loopback(host) is loopback


def test_command_refuses_an_open_host_without_password(tmp_path):
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0 opens the page to other computers; add --password"):
        run(["--host", "0.0.0.0", "--output", str(tmp_path)])


@pytest.mark.parametrize("password", ["secret", "user:", ":secret"])
def test_command_refuses_half_a_password(password):
    with pytest.raises(ConfigError, match="user:password"):
        run(["--password", password])


def test_port_in_use_is_refused_and_zero_is_a_free_one():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="in use"):
            _usable_port("127.0.0.1", other.getsockname()[1])
    assert _usable_port("127.0.0.1", 0) > 0
    with pytest.raises(ConfigError):
        _usable_port("127.0.0.1", 99_999)


def test_page_is_imported_without_torch_and_without_analytics():
    code = (
        "import os, sys, sdlora.app.main as main\n"
        "assert 'torch' not in sys.modules\n"
        "assert os.environ['GRADIO_ANALYTICS_ENABLED'] == 'False'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

"""The page in a headless Chromium, as somebody uses it."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image

import sdlora
from sdlora.families.tiny import save_tiny

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
# Bounds for loaded machines; a quiet one needs seconds.
START_SECONDS = 180
WAIT_MS = 120_000
LONG_RUN_STEPS = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/ is an untrained tiny base, library/demo/adapter.safetensors fits it, library/broken does not."""
    folder = tmp_path_factory.mktemp("page")
    base = sdlora.load_base(sdlora.BaseSection(path=str(save_tiny("sd1", folder / "base"))), "cpu")
    layers = {
        f"unet.{name}": sdlora.LoraLayer(torch.ones(1, layer.in_features), torch.ones(layer.out_features, 1), 1.0)
        for name, layer in base.unet.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith("attn2.to_k")
    }
    (folder / "library" / "demo").mkdir(parents=True)
    metadata = {"modelspec.trigger_phrase": "sks ball"}
    adapter = sdlora.AdapterFile(layers, "sd1", metadata)
    sdlora.write_adapter(adapter, folder / "library" / "demo" / "adapter.safetensors")
    (folder / "library" / "broken.safetensors").write_bytes(b"<!doctype html><html>sign in first</html>")
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """The page is served, at the address that the command prints."""
    command = "import sys; from sdlora.cli.app import run; sys.exit(run(sys.argv[1:]))"
    options = ["--base", "base", "--library", "library", "--output", "pictures", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    overdue = threading.Timer(START_SECONDS, process.kill)  # which ends the reading below
    overdue.start()
    try:
        line = process.stdout.readline()
        overdue.cancel()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, f"the page did not start: {line}{process.stdout.read()}"
        yield found[0]
    finally:
        overdue.cancel()
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no Chromium found: install one, or name it in CHROMIUM")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The opened page with its base loaded. In the end nothing but the page's own server was contacted."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    hosts = set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(address)
    page.locator("#status").get_by_text("is ready").wait_for()
    yield page
    context.close()
    assert hosts - {""} == {urlsplit(address).netloc}


@pytest.fixture
def screenshots(tmp_path):
    folder = Path(os.environ.get("SDLORA_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def choose_adapter(page):
    page.locator("#adapter input").click()
    page.get_by_role("option", name="demo/adapter").click()
    page.locator("#compare input:checked").wait_for()


def test_prompt_adapter_picture_download(page, folder, screenshots):
    page.locator("#prompt textarea").fill("a red ball on grass")
    choose_adapter(page)
    page.locator("#trigger").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value.startsWith('sks ball, ')")
    page.locator("#seed input").fill("42")
    page.locator("#generate").click()
    page.locator("#slider img").first.wait_for()
    page.locator("#status").get_by_text("Seed 42, 25 steps, 64x64").wait_for()
    page.wait_for_function(
        "[...document.querySelectorAll('#slider img')].every(img => img.complete && img.naturalWidth)"
    )
    page.screenshot(path=screenshots / "compared.png", full_page=True)

    with page.expect_download() as download:
        page.locator("#download").click()
    with Image.open(download.value.path()) as picture:
        assert picture.format == "PNG" and picture.size == (64, 64)
        assert picture.info["parameters"].startswith("sks ball, a red ball on grass <lora:adapter:1>\n")
        assert '"seed": 42' in picture.info["sdlora"]
    kept = list((folder / "pictures").rglob("*-42.png"))
    assert [file.read_bytes() for file in kept] == [Path(download.value.path()).read_bytes()]

    page.set_viewport_size({"width": 420, "height": 900})
    page.screenshot(path=screenshots / "narrow.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 420


def test_keyboard_generates_a_plain_picture(page, screenshots):
    page.locator("#prompt textarea").fill("a cat")
    page.locator("#steps input[type=number]").fill("4")
    page.locator("#prompt textarea").press("Control+Enter")
    page.locator("#picture img").wait_for()
    page.wait_for_function("document.querySelector('#picture img').getBoundingClientRect().width > 400")
    page.screenshot(path=screenshots / "plain.png", full_page=True)
    assert not page.locator("#slider").is_visible()


def test_wrong_size_is_explained_and_the_page_stays_usable(page, screenshots):
    page.locator("#width input").fill("100")
    page.locator("#generate").click()
    page.locator("#status .error").get_by_text("width is 100; input should be a multiple of 8").wait_for()
    page.screenshot(path=screenshots / "refused.png")
    assert page.locator("#generate").is_enabled()


def test_cancel_frees_the_page(page, folder, screenshots):
    # Larger than the base's own size, so that it takes seconds and there is something to cancel.
    for field, value in (("width", 256), ("height", 256), ("seed", 77)):
        page.locator(f"#{field} input").fill(str(value))
    page.locator("#steps input[type=number]").fill(str(LONG_RUN_STEPS))
    page.locator("#generate").click()
    page.locator("#status").get_by_text(re.compile(r"Step \d+ of \d+, picture 1 of 1")).wait_for()
    page.screenshot(path=screenshots / "running.png")
    page.locator("#cancel").click()
    page.locator("#status").get_by_text("Cancelled.").wait_for()
    page.locator("#generate:enabled").wait_for()

    for field, value in (("width", 64), ("height", 64), ("seed", 78)):
        page.locator(f"#{field} input").fill(str(value))
    page.locator("#steps input[type=number]").fill("2")
    page.locator("#generate").click()
    page.locator("#status").get_by_text("Seed 78, 2 steps").wait_for()
    assert not list((folder / "pictures").rglob("*-77.png"))

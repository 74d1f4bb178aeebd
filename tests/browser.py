"""A browser for the tests of pages: Chromium, without a window or a network."""

import contextlib
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# No sandbox within another, and nothing asked of the network.
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def opened():
    """The browser; a test that asks for it is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("there is no Chromium; install Debian's package chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(OPTIONS))
        yield browser
        browser.close()


@contextlib.contextmanager
def page(browser, width=1280, scheme="light"):
    """A page of a width and a colour scheme; what goes wrong on it is an error at the end."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    made, wrong = context.new_page(), []
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("requestfailed", lambda request: wrong.append(f"not found: {request.url}"))
    yield made
    context.close()
    assert not wrong, wrong

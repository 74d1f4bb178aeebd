"""The built site as its visitors see it: on phones, in the dark, searching, without a server."""

import browser
import pytest
from built import SITE

PAGES = [
    "index.html",
    "install.html",
    "choosing.html",
    "kernels.html",
    "benchmarks.html",
    "migrating.html",
    "shares.html",
    "notebooks/normalizations_ja.html",
    "api/index.html",
    "api/generated/normwise.layers.ReversibleInstanceNormalization.html",
    "api/generated/normwise.ops.group_norm.html",
]
PHONE, DESK = 360, 1280
each_width = pytest.mark.parametrize("width", [PHONE, DESK])
each_scheme = pytest.mark.parametrize("scheme", ["light", "dark"])


@pytest.fixture(scope="module")
def chromium():
    with browser.opened() as opened:
        yield opened


def address(name):
    return (SITE / name).as_uri()


@each_scheme
@each_width
def test_nothing_is_cut_off_or_empty(chromium, width, scheme):
    with browser.page(chromium, width, scheme) as page:
        for name in PAGES:
            page.goto(address(name))
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{name} is {wide} pixels wide"
            assert len(page.inner_text("article")) > 100, name
            pictures = page.evaluate(
                "[...document.querySelectorAll('article img')].map(i => [i.src, i.naturalWidth])"
            )
            assert all(loaded for _, loaded in pictures), (name, pictures)


# WCAG's least contrast of text of the usual size.
CONTRAST = 4.5
LUMINANCES = """
() => {
  const parts = c => c.match(/[\\d.]+/g).map(Number);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = parts(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.9) return colour;
    }
    return [255, 255, 255];
  };
  const light = c => c.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  const shown = [...document.querySelectorAll('article *')].filter(e => own(e) && e.offsetParent);
  return shown.map(e => [
    light(parts(getComputedStyle(e).color)), light(behind(e)), e.textContent.slice(0, 40)
  ]);
}
"""


@each_scheme
def test_text_stands_out(chromium, scheme):
    with browser.page(chromium, DESK, scheme) as page:
        for name in PAGES:
            page.goto(address(name))
            found = page.evaluate(LUMINANCES)
            assert found
            for front, back, text in found:
                high, low = max(front, back), min(front, back)
                assert (high + 0.05) / (low + 0.05) >= CONTRAST, (name, text)


def test_the_search_finds_a_layer(chromium):
    with browser.page(chromium) as page:
        page.goto(address("search.html") + "?q=GroupNormalization")
        page.wait_for_selector("#search-results a")
        found = page.eval_on_selector_all("#search-results a", "all => all.map(a => a.href)")
        assert any("normwise.layers.GroupNormalization" in link for link in found)


def test_the_theme_can_be_chosen_by_keyboard(chromium):
    with browser.page(chromium) as page:
        page.goto(address("index.html"))
        button = page.locator(".theme-switch-button:visible").first
        button.focus()
        before = page.evaluate("document.documentElement.dataset.theme")
        page.keyboard.press("Enter")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.wait_for_function("document.documentElement.dataset.mode !== 'auto'")
        assert before == "light"


def test_an_example_is_copied_without_its_prompts(chromium):
    with browser.page(chromium) as page:
        page.goto(address("index.html"))
        page.evaluate(
            "document.addEventListener('copy', () => copied = document.activeElement.value)"
        )
        page.hover(".highlight-python")
        page.click(".highlight-python button.copybtn")
        copied = page.evaluate("copied")
        assert copied.startswith("import keras, normwise\nfrom sklearn")
        assert ">>>" not in copied

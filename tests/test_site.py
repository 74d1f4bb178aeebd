"""The built site: every public name, every link, and nothing that another server has to send.

`make test-site` builds it first and says where it is.
"""

import functools
import importlib
import inspect
import os
import re
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from built import SITE

InventoryFile = pytest.importorskip("sphinx.util.inventory").InventoryFile

# Where public names are imported from, and the module that the site has them under.
PUBLIC = {
    "normwise.layers": "normwise.layers",
    "normwise.rnn": "normwise.rnn",
    "normwise.ops": "normwise.ops",
    "normwise.models": "normwise.models",
    "normwise.migrate": "normwise.migrate",
    "normwise.figures": "normwise.tutorial.figures",
    "normwise.geometry": "normwise.geometry",
    "normwise.kernels": "normwise.kernels",
    "normwise": "normwise",
}
# By which attribute an element names what a browser loads for it.
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|work|Users)/\w")


class Page(HTMLParser):
    """The links of a page, what it loads, its anchors and its words."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.anchors, self.untold = [], [], set(), []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors.update(given[name] for name in ("id", "name") if given.get(name))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        address = given.get(LOADED.get(tag, ""))
        # A canonical address is said, and not loaded.
        if address and given.get("rel") not in ("canonical", "search"):
            self.loads.append(address)
        if tag == "img" and not given.get("alt"):
            self.untold.append(given.get("src"))


@functools.cache
def pages():
    """Every page by its path."""
    found = sorted(SITE.rglob("*.html"))
    return {path: Page(path) for path in found if "_static" not in path.parts}


def public_names(module):
    """The names that a module has for its users."""
    found = importlib.import_module(PUBLIC[module])
    return {name for name in found.__all__ if not inspect.ismodule(getattr(found, name))}


@functools.cache
def listed(*kinds):
    """The names of some kinds that the reference has."""
    with (SITE / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", os.path.join)
    return {name for kind in kinds for name in inventory.get(f"py:{kind}", {})}


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference_once(module):
    there = listed("class", "function", "data")
    names = public_names(module)
    assert names
    missing = {name for name in names if f"{PUBLIC[module]}.{name}" not in there}
    assert not missing
    # Under its own name and no other: not a second time where it is defined.
    for name in names:
        others = [
            each for each in there if each.endswith(f".{name}") and each.startswith("normwise")
        ]
        assert others.count(f"{PUBLIC[module]}.{name}") == 1
        page = SITE / "api" / "generated" / f"{PUBLIC[module]}.{name}.html"
        assert page.exists() or name == "KINDS"


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_types_and_an_example(module):
    for name in public_names(module):
        public = getattr(importlib.import_module(PUBLIC[module]), name)
        if not callable(public):
            continue
        assert ">>>" in public.__doc__, f"{module}.{name} has no example"
        functions = [public]
        if inspect.isclass(public):
            methods = listed("method")
            functions += [
                method
                for own, method in vars(public).items()
                if f"{PUBLIC[module]}.{name}.{own}" in methods
            ]
        for function in functions:
            untyped = [
                parameter.name
                for parameter in inspect.signature(function).parameters.values()
                if parameter.annotation is parameter.empty and parameter.name != "self"
            ]
            assert not untyped, f"{module}.{name}: {function.__name__}({', '.join(untyped)})"


def test_every_link_leads_somewhere():
    broken = []
    for path, page in pages().items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or link == "#":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = target in pages()
            if not target.exists():
                broken.append(f"{path.name}: {link}")
            elif (
                known and parts.fragment and unquote(parts.fragment) not in pages()[target].anchors
            ):
                broken.append(f"{path.name}: {link}, which has no such anchor")
    assert not broken
    assert sum(len(page.links) for page in pages().values()) > 1000


def test_nothing_is_loaded_from_elsewhere():
    loads = {load for page in pages().values() for load in page.loads}
    assert not [load for load in loads if urlsplit(load).scheme or load.startswith("//")]
    styles = "".join(path.read_text() for path in (SITE / "_static").rglob("*.css"))
    assert not re.findall(r"url\([\"']?https?:", styles)
    missing = {
        f"{path.name}: {load}"
        for path, page in pages().items()
        for load in page.loads
        if not (path.parent / unquote(urlsplit(load).path)).resolve().exists()
    }
    assert not missing


def test_every_picture_has_words():
    untold = {path.name: page.untold for path, page in pages().items() if page.untold}
    assert not untold


def test_no_page_names_the_machine_that_built_it():
    named = {path.name: MACHINE.findall(page.text) for path, page in pages().items()}
    assert not {name: found for name, found in named.items() if found}


def test_programs_find_the_pages_listed():
    listed = (SITE / "llms.txt").read_text(encoding="utf-8")
    assert listed.startswith("# normwise\n\n> ")
    addresses = re.findall(r"\]\(https://[^/]+/normwise/([^)]+)\)", listed)
    assert len(addresses) > 60
    assert len(set(addresses)) == len(addresses)
    assert not [address for address in addresses if not (SITE / address).exists()]

"""What a release says of itself: metadata that agree, workflows that are pinned, a light import."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import normwise

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# What weighs, and is for one command or one function.
LATER = {
    "IPython",
    "google_crc32c",
    "libcst",
    "matplotlib",
    "pandas",
    "sklearn",
    "sphinx",
    "triton",
    "typer",
}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_that_which_was_installed(monkeypatch):
    assert normwise.__version__ == importlib.metadata.version("normwise")

    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    assert normwise.__version__ == "0+unknown"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_hash(path):
    text = path.read_text(encoding="utf-8")
    used = re.findall(r"uses: (\S+)(.*)", text)
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{action}{comment} names no version"
    # What a job may do is said, and is next to nothing.
    assert re.search(r"^permissions:\n  contents: read$", text, re.MULTILINE)


def test_one_action_has_one_version():
    pinned = {}
    for path in WORKFLOWS:
        for name, pin in re.findall(r"uses: (\S+)@(\S+)", path.read_text(encoding="utf-8")):
            pinned.setdefault(name, set()).add(pin)
    assert not {name: pins for name, pins in pinned.items() if len(pins) > 1}


def test_every_python_that_is_named_is_tested():
    named = {
        version
        for entry in PROJECT["classifiers"]
        if (version := entry.rpartition(" :: ")[2]).startswith("3.")
    }
    tested = {
        version
        for path in WORKFLOWS
        for version in re.findall(r"'?\b(3\.\d\d)\b", path.read_text())
    }
    assert named == tested
    assert PROJECT["requires-python"] == f">={min(named)}"


def test_the_citation_agrees_with_the_metadata():
    citation = read("CITATION.cff")
    assert f"title: {PROJECT['name']}\n" in citation
    assert f"license: {PROJECT['license']}\n" in citation
    assert f"repository-code: {PROJECT['urls']['Source']}\n" in citation
    assert f"url: {PROJECT['urls']['Documentation']}\n" in citation
    keywords = re.findall(r"^  - ([\w-]+)$", citation.partition("keywords:")[2], re.MULTILINE)
    assert keywords == PROJECT["keywords"]
    assert "version" not in re.findall(r"^([\w-]+):", citation, re.MULTILINE)  # the tag's


KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_changelog_keeps_its_form():
    changelog = read("CHANGELOG.md")
    releases = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    assert releases[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", each) for each in releases[1:])
    kinds = re.findall(r"^### (.*)$", changelog, re.MULTILINE)
    assert kinds
    assert set(kinds) <= KINDS
    for release in releases:
        name = re.match(r"\[(.*?)\]", release)[1]
        assert re.search(rf"^\[{re.escape(name)}\]: https://", changelog, re.MULTILINE), name


@pytest.mark.parametrize("file", ["README.md", "docs/index.md", "docs/install.md"])
def test_pip_comes_first_and_names_extras_that_there_are(file):
    text = read(file)
    first = re.search(r"```\w*\n(.*?)```", text, re.DOTALL)[1]
    assert first.startswith("pip install 'normwise[")
    named = re.findall(r"normwise\[([\w,-]+)\]", text)
    extras = {extra for each in named for extra in each.split(",")}
    assert extras <= set(PROJECT["optional-dependencies"])


def test_import_brings_nothing_that_a_layer_does_not_need():
    program = (
        "import keras, sys; before = set(sys.modules); import normwise; "
        "print(*(set(sys.modules) - before))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    brought = {name.partition(".")[0] for name in shown.stdout.split()}
    assert "normwise" in brought
    assert not brought & LATER

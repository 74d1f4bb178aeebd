"""What the docs show of commands and programs runs: doctest tries the rest.

A block without prompts is of a shell or of Python. Its `normwise ...` are called in a folder that
has what they name; of other commands what they name is looked up.
"""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import built  # noqa: F401 - skips all of this where no site was built
import keras
import numpy as np
import old_models
import pytest
import typer
from typer.testing import CliRunner

import normwise
from normwise.cli import app

ROOT = Path(__file__).parents[1]
FILES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if "generated" not in path.parts),
]
BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = {"", "sh", "console"}
# Commands of others, which need a network, or minutes.
OTHERS = {"cd", "export", "set", "git", "for", "python3", "done"}


def blocks(wanted):
    """The blocks of a kind that doctest does not run, each with its file."""
    for file in FILES:
        for kind, text in BLOCK.findall(file.read_text(encoding="utf-8")):
            if ">>>" not in text and not kind.startswith("{") and wanted(kind):
                yield file.name, text


def commands():
    """Every command line of the docs once."""
    lines = {}
    for _, text in blocks(SHELL.__contains__):
        for line in text.replace("\\\n", "").splitlines():
            line = re.sub(r"\s#.*", "", line)
            for command in re.split(r" && |; (?:do )?", line):
                if words := shlex.split(command):
                    lines.setdefault(" ".join(words), words)
    return list(lines.values())


def ours():
    """Our own command lines: those that train are the tutorial's, the others are quick."""
    return [words[1:] for words in commands() if words[0] == "normwise"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the docs name."""
    made = tmp_path_factory.mktemp("examples")
    (made / "src").mkdir()
    (made / "src" / "model.py").write_text(
        "import tensorflow_addons as tfa\nnorm = tfa.layers.GroupNormalization(groups=2)\n"
    )
    shutil.copytree(ROOT / "docs" / "notebooks", made / "notebooks")
    old_models.write_h5(made / "old.h5", old_models.small(), old_models.weights_of_small())
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(8, 3),
            keras.layers.BatchNormalization(),
            keras.layers.LayerNormalization(),
        ]
    )
    model.save(made / "old.keras")
    return made


@pytest.mark.parametrize("words", ours(), ids=" ".join)
def test_our_commands_do_what_the_docs_show(words, folder, monkeypatch):
    monkeypatch.chdir(folder)
    if (
        words[0] == "tutorial"
    ):  # It trains; what it is given is read here, and runs in its own tests.
        parsed(words)
        return
    Path("new.keras").unlink(missing_ok=True)
    result = CliRunner().invoke(app, words)
    # Something may be left to do in source: 1.
    assert result.exit_code in ((0, 1) if words[0] == "migrate" else (0,)), result.output


def parsed(words):
    """Read a command line as the command does, and do nothing."""
    group = typer.main.get_command(app)
    with group.make_context("normwise", list(words)) as context:
        name, command, rest = group.resolve_command(context, list(words))
        with command.make_context(name, rest, parent=context):
            pass


def test_other_commands_name_what_there_is(monkeypatch):
    monkeypatch.chdir(ROOT)
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in commands():
        assigned = [word for word in words if re.fullmatch(r"[A-Z_]+=\S*", word)]
        program, *rest = [word for word in words if word not in assigned]
        program = Path(program).name
        if program == "pip":
            named = re.findall(r"(?:normwise|\.)\[([\w,-]+)\]", " ".join(rest))
            assert {extra for each in named for extra in each.split(",")} <= set(extras), words
        elif program == "make":
            targets = [word for word in rest if "=" not in word and not word.startswith("-")]
            subprocess.run(["make", "--dry-run", *targets], check=True, capture_output=True)
        elif program in ("python", "pytest", "ruff", "mypy", "clang-format"):
            for path in (word for word in rest if re.match(r"(tests|benchmarks|csrc)/", word)):
                assert list(ROOT.glob(path)), words
        else:
            assert program in OTHERS | {"normwise"}, words


def test_programs_without_prompts_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    model = normwise.migrate.load_model("old.h5")
    model.save("new.keras")
    x = np.ones((2, 6, 6, 4), "float32")
    given = {"keras": keras, "np": np, "x": x, "y_of_tensorflow_addons": model.predict(x)}
    programs = list(blocks({"python"}.__contains__))
    assert programs
    for name, text in programs:
        exec(compile(text, name, "exec"), dict(given))

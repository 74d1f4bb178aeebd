"""The codemod on scripts and notebooks written for it, each with what it must become beside it.

`KERAS_BACKEND=jax python tests/test_migrate_source.py` stores what they become now; read the diff.
"""

import difflib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import tokenize
import types
from pathlib import Path
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import keras
import pytest
from typer.testing import CliRunner

import normwise
from normwise import cli
from normwise.migrate.source import names, rewrite_source
from normwise.migrate.source.notebooks import rewrite_notebook

CASES = Path(__file__).parent / "migrate_cases"
DOCS = Path(__file__).parents[1] / "docs" / "migrating.md"
OLD = sorted(CASES.glob("*.old"))
SCRIPTS = [path for path in OLD if ".py." in path.name]
NOTEBOOKS = [path for path in OLD if ".ipynb." in path.name]


def parametrized(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.name.removesuffix(".old"))


def read(path):
    return path.read_bytes().decode()


def rewrite(path, text):
    return (rewrite_notebook if path in NOTEBOOKS else rewrite_source)(text)


def left(rewritten):
    """What remains, a line for each finding."""
    lines = []
    for found in rewritten.remaining:
        cell = "" if found.cell is None else f"cell {found.cell}, "
        lines.append(f"{cell}{found.line}:{found.column} {found.old} -> {found.new}\n")
    return "".join(lines)


@parametrized(OLD)
def test_becomes_what_is_stored(path):
    rewritten = rewrite(path, read(path))
    assert rewritten.text == read(path.with_suffix(".new"))
    assert left(rewritten) == read(path.with_suffix(".left"))
    assert bool(rewritten.changes) == (rewritten.text != read(path))
    assert all(found.new.startswith("normwise") for found in rewritten.changes)


@parametrized(OLD)
def test_a_second_run_changes_nothing(path):
    once = rewrite(path, read(path))
    twice = rewrite(path, once.text)
    assert (twice.text, twice.changes) == (once.text, ())
    assert [found.old for found in twice.remaining] == [found.old for found in once.remaining]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.removesuffix("\n"),
        lambda text: text.replace("    ", "\t"),
        lambda text: text + "\x0c\n\n   \n  # the\n# end\n  ",
        lambda text: "\x0c\n" + text.replace("\n\n\n", "\n\n\x0c\n"),
    ],
    ids=["mark", "crlf", "no-newline", "tabs", "end", "form-feeds"],
)
@parametrized(SCRIPTS)
def test_the_layout_of_a_script_stays(path, change):
    assert rewrite_source(change(read(path))).text == change(read(path.with_suffix(".new")))


@parametrized(SCRIPTS)
def test_no_comment_is_lost(path):
    def comments(text):
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        return sorted(token.string for token in tokens if token.type == tokenize.COMMENT)

    assert comments(read(path.with_suffix(".new"))) == comments(read(path))


@parametrized(NOTEBOOKS)
def test_of_a_notebook_only_lines_of_code_change(path):
    old, new = (json.loads(read(path.with_suffix(suffix))) for suffix in (".old", ".new"))
    for before, after in zip(old["cells"], new["cells"], strict=True):
        if before["cell_type"] == "code":
            before.pop("source"), after.pop("source")
    assert old == new
    changed = difflib.ndiff(*(read(path.with_suffix(s)).splitlines() for s in (".old", ".new")))
    for line in changed:
        if line[0] in "+-":
            assert "tfa" in line or "tensorflow_addons" in line or "normwise" in line


# Imports, and what may be written below them. A use stands for the object that it gives.
FORMS = {
    "import tensorflow_addons as tfa": ["tfa.layers.GroupNormalization", "tfa.losses.GIoULoss"],
    "import os, tensorflow_addons as addons": ["addons.rnn.LayerNormLSTMCell", "os.sep"],
    "import tensorflow_addons": [
        "tensorflow_addons.layers.normalizations.InstanceNormalization",
        "tensorflow_addons.optimizers.AdamW",
    ],
    "import tensorflow_addons.layers": ["tensorflow_addons.layers.TLU"],
    "import tensorflow_addons.layers as tfl": ["tfl.TLU", "getattr(tfl, 'Maxout')"],
    "from tensorflow_addons import layers": ["layers.WeightNormalization", "layers.Maxout"],
    "from tensorflow_addons import rnn as cells, losses": ["cells.NASCell", "losses.GIoULoss"],
    "from tensorflow_addons.layers import normalizations": ["normalizations.GroupNormalization"],
    "from tensorflow_addons.layers import TLU": ["TLU"],
    "from tensorflow_addons.layers import (Maxout,  # a\n  GroupNormalization as GN)": [
        "GN",
        "Maxout",
    ],
    "from tensorflow_addons.layers.wrappers import WeightNormalization": ["WeightNormalization"],
    "from tensorflow_addons.rnn import LayerNormSimpleRNNCell as Cell, NASCell": [
        "Cell",
        "NASCell",
    ],
    "import normwise": ["normwise.layers.RMSNormalization"],
    "import normwise as nw": ["nw.layers.RMSNormalization"],
    "normwise = 'mine'": ["normwise"],
}
WRAPPINGS = [
    "{}",
    "if True:\n    {}",
    "try:\n    {}\nexcept ImportError:\n    raise",
    "x = 1; {}; y = 2",
    "if 1: {}",
    "# before\n{}  # behind",
]


@st.composite
def programs(draw):
    """The parts of a program that imports in several forms, and puts what it uses into `used`."""
    parts = ["used = []\n"]
    for imported in draw(st.lists(st.sampled_from(list(FORMS)), min_size=1, max_size=5)):
        uses = draw(st.lists(st.sampled_from(FORMS[imported]), max_size=3))
        wrapping = draw(st.sampled_from(WRAPPINGS if "\n" not in imported else WRAPPINGS[:1]))
        lines = [wrapping.format(imported), *(f"used.append({use})" for use in uses)]
        if draw(st.booleans()):
            parameter = draw(st.sampled_from(["", "normwise=0", "nw=0", "tfa=0", "layers=0"]))
            body = "\n".join(lines).replace("\n", "\n    ")
            lines = [f"def f({parameter}):\n    {body}", "f()"]
        parts.append("\n".join(lines) + "\n")
    return parts


def fake_modules():
    """Both packages as far as FORMS goes; an object is its name, wherever it is imported from."""
    modules = {}
    for old in [*names.MOVED, *names.IN_KERAS, *names.NOWHERE, "layers.RMSNormalization"]:
        package, _, last = old.rpartition(".")
        homes = [home for home in names.REGISTERING_MODULES if home.startswith(f"{package}.")]
        for home in ["tensorflow_addons", "normwise"]:
            for path in [package, *homes]:
                dotted = f"{home}.{path}".rstrip(".")
                modules.setdefault(dotted, types.ModuleType(dotted))
                setattr(modules[dotted], last, last)
    for dotted in list(modules):
        parent, _, child = dotted.rpartition(".")
        if parent:
            setattr(modules.setdefault(parent, types.ModuleType(parent)), child, modules[dotted])
    return modules


def run(program):
    scope = {}
    with mock.patch.dict(sys.modules, fake_modules()):
        exec(compile(program, "program", "exec"), scope)
    return scope["used"]


@hypothesis.given(programs())
def test_a_rewritten_program_does_the_same(parts):
    program = "".join(parts)
    rewritten = rewrite_source(program)
    assert run(rewritten.text) == run(program)
    again = rewrite_source(rewritten.text)
    assert (again.text, again.changes) == (rewritten.text, ())
    assert len(again.remaining) == len(rewritten.remaining)
    assert "tensorflow_addons" not in rewritten.text or rewritten.remaining


@hypothesis.given(programs(), st.sampled_from([None, 1, "\t"]))
def test_a_rewritten_notebook_does_the_same(parts, indent):
    cells = [{"cell_type": "code", "source": part.splitlines(keepends=True)} for part in parts]
    text = json.dumps({"cells": cells, "nbformat": 4}, indent=indent)
    rewritten = rewrite_notebook(text)
    cells = json.loads(rewritten.text)["cells"]
    assert run("".join(line for cell in cells for line in cell["source"])) == run("".join(parts))
    assert json.dumps({"cells": cells, "nbformat": 4}, indent=indent) == rewritten.text
    again = rewrite_notebook(rewritten.text)
    assert (again.text, again.changes) == (rewritten.text, ())


def tables():
    """The section of the docs that says what every name has become."""
    heads = {
        "Moved by `normwise migrate`:": (names.MOVED, "differs"),
        "To move by hand, to Keras 3.15:": (names.IN_KERAS, "differs"),
    }
    lines = []
    for head, (successors, note) in heads.items():
        lines += [head, "", f"| TensorFlow Addons | now | {note} |", "|---|---|---|"]
        lines += [f"| `{old}` | `{new.name}` | {new.note} |" for old, new in successors.items()]
        lines.append("")
    lines += ["Nowhere, but for what is near:", "", "| TensorFlow Addons | near |", "|---|---|"]
    lines += [f"| `{old}` | {note} |" for old, note in names.NOWHERE.items() if note]
    rest = ", ".join(f"`{old}`" for old, note in names.NOWHERE.items() if not note)
    return "\n".join([*lines, "", *textwrap.wrap(f"Nowhere: {rest}.", 104), ""])


def section():
    text = DOCS.read_text()
    start, end = text.index("-->\n\n") + 5, text.index("\n## What differs")
    return text[:start], text[start:end], text[end:]


def test_the_docs_name_them_all():
    assert section()[1] == tables()


def test_the_names_are_tensorflow_addons_own():
    for known in names.MOVED.values():
        assert inspect.isclass(resolve(normwise, known.name.removeprefix("normwise.")))
    assert not set(names.MOVED) & {*names.IN_KERAS, *names.NOWHERE}
    assert not set(names.IN_KERAS) & set(names.NOWHERE)


@pytest.mark.parametrize("old", names.IN_KERAS)
def test_keras_has_what_is_said_to_be_there(old):
    new, note = names.IN_KERAS[old]
    if "not in" in note and tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15):
        pytest.skip(note)
    for dotted in [new, *re.findall(r"keras\.[\w.]*\w", note)]:
        assert callable(resolve(keras, dotted.removeprefix("keras.")))


@pytest.mark.parametrize("old", [old for old, note in names.NOWHERE.items() if "keras." in note])
def test_hints_name_what_keras_has(old):
    for dotted in re.findall(r"(?<!tqdm\.)keras\.[\w.]*\w", names.NOWHERE[old]):
        assert callable(resolve(keras, dotted.removeprefix("keras.")))


def resolve(package, path):
    found = package
    for part in path.split("."):
        found = getattr(found, part)
    return found


# The arguments of the originals, in their order, for those who pass them without names.
NORM = (
    "center scale beta_initializer gamma_initializer beta_regularizer gamma_regularizer "
    "beta_constraint gamma_constraint"
)
SIGNATURES = {
    "layers.GroupNormalization": f"groups axis epsilon {NORM}",
    "layers.FilterResponseNormalization": (
        f"epsilon axis {NORM.removeprefix('center scale ')} "
        "learned_epsilon learned_epsilon_constraint name"
    ),
    "layers.TLU": (
        "affine tau_initializer tau_regularizer tau_constraint "
        "alpha_initializer alpha_regularizer alpha_constraint"
    ),
    "layers.WeightNormalization": "layer data_init",
    "layers.SpectralNormalization": "layer power_iterations",
    "rnn.LayerNormLSTMCell": (
        "units activation recurrent_activation use_bias kernel_initializer recurrent_initializer "
        "bias_initializer unit_forget_bias kernel_regularizer recurrent_regularizer "
        "bias_regularizer kernel_constraint recurrent_constraint bias_constraint dropout "
        "recurrent_dropout norm_gamma_initializer norm_beta_initializer norm_epsilon"
    ),
    "rnn.LayerNormSimpleRNNCell": (
        "units activation use_bias layernorm_epsilon kernel_initializer recurrent_initializer "
        "bias_initializer gamma_initializer kernel_regularizer recurrent_regularizer "
        "bias_regularizer gamma_regularizer kernel_constraint recurrent_constraint "
        "bias_constraint gamma_constraint dropout recurrent_dropout"
    ),
}


@pytest.mark.parametrize("path", SIGNATURES)
def test_arguments_need_no_rewriting(path):
    expected = SIGNATURES[path].split()
    assert list(inspect.signature(resolve(normwise, path)).parameters)[: len(expected)] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import tensorflow_addons\nx = (1\n", "line 2: no Python 3: '\\(' was never closed"),
        ("print 'tensorflow_addons'", "line 1: no Python 3: Missing parentheses"),
        ("def f():\nreturn 1\n", "line 2: no Python 3: expected an indented block"),
    ],
)
def test_no_python_is_refused_with_its_line(text, message):
    with pytest.raises(ValueError, match=message):
        rewrite_source(text)


@pytest.mark.parametrize("before", ["\x0c", "\\\n"])
def test_what_stands_before_a_statement_is_not_lost(before):
    old, new = (f"import {name}\n{before}x = 1\n" for name in ("tensorflow_addons", "normwise"))
    assert rewrite_source(old).text == new


def test_only_text_is_source():
    with pytest.raises(TypeError, match="str, not bytes; decode it"):
        rewrite_source(b"import tensorflow_addons")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no notebook: no JSON"),
        ("[]", "no notebook of format 4"),
        ('{"worksheets": [], "nbformat": 3}', "convert an older one by jupyter nbconvert"),
        (
            '{"cells": [{"cell_type": "markdown", "source": []}, '
            '{"cell_type": "code", "source": ["a\\n", "b = ("]}]}',
            "cell 2, line 2: no Python 3",
        ),
    ],
)
def test_no_notebook_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        rewrite_notebook(text)


def test_a_notebook_of_another_language_is_left_alone():
    cells = [{"cell_type": "code", "source": ["library(tensorflow_addons)"]}]
    text = json.dumps({"cells": cells, "metadata": {"kernelspec": {"language": "R"}}})
    assert rewrite_notebook(text).text == text


TUTORIAL_IN_SMALL = """
import os
import keras
import numpy as np

def load_data():
    rng = np.random.default_rng(0)
    return None, (rng.integers(0, 255, (64, 28, 28)), rng.integers(0, 10, 64))

keras.datasets.mnist.load_data = load_data
"""


@pytest.mark.parametrize("case", ["tutorial", "recurrent"])
def test_the_result_runs(case):
    """Under `tf.keras`, which is Keras 3, on the backend that it has."""
    pytest.importorskip("tensorflow")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("tf.keras is of the TensorFlow backend")
    program = TUTORIAL_IN_SMALL + rewrite_source(read(CASES / f"{case}.py.old")).text
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert ran.returncode == 0, ran.stderr
    expected = {"tutorial": r"(?s)(2/2.*loss.*){3}", "recurrent": r"\(32, 1\)"}
    assert re.search(expected[case], ran.stdout), ran.stdout


def test_registered_names_keep_working():
    for old in names.MOVED:
        name = old.partition(".")[2]
        registered = keras.saving.get_registered_object(f"Addons>{name}")
        assert registered is resolve(normwise, old)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project that has it all, and what is nobody's source."""
    monkeypatch.chdir(tmp_path)
    for path in SCRIPTS + NOTEBOOKS:
        target = tmp_path / "project" / path.name.removesuffix(".old")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    others = [".git/hook.py", "env/pyvenv.cfg", "env/lib/a.py", "site-packages/a.py"]
    others += ["__pycache__/a.py", "data.txt", ".ipynb_checkpoints/a.ipynb"]
    for other in others:
        target = tmp_path / "project" / other
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_text("import tensorflow_addons\n")
    # Of no concern, and no Python 3.
    (tmp_path / "project" / "old.py").write_text("print 'hello'\n")
    return tmp_path


def migrate(*arguments):
    return CliRunner().invoke(
        cli.app, ["migrate", *map(str, arguments)], env={"COLUMNS": "200"}, catch_exceptions=False
    )


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def migrated(before):
    """What a folder should become."""
    new = {path.name.removesuffix(".old"): path.with_suffix(".new").read_bytes() for path in OLD}
    after = {f"project/{name}": content for name, content in new.items()}
    assert set(after) <= set(before)
    return before | after


def test_by_default_nothing_is_written(folder):
    before = contents(folder)
    result = migrate("project")
    assert result.exit_code == 1
    assert contents(folder) == before
    for shown in (
        "project/training.py:4:6 ",
        "normwise.layers.GroupNormalization",
        "project/training.py:19:13 ",
        "by hand: keras.optimizers.AdamW (learning_rate comes first",
        "project/training.py:18:19 ",
        "no successor",
        "project/colab.ipynb:cell 5:7:7 ",
        "--diff shows how, --write does it",
    ):
        assert shown in result.stdout
    assert "site-packages" not in result.stdout
    assert "pyvenv" not in result.stdout


def test_write_writes(folder):
    (folder / "project" / "tutorial.py").chmod(0o755)
    before = contents(folder)
    result = migrate("project", "--write", "project/tutorial.py")
    assert result.exit_code == 1
    assert contents(folder) == migrated(before)
    assert (folder / "project" / "tutorial.py").stat().st_mode & 0o777 == 0o755
    # Lines are those of the new files: an import came before this one.
    assert "project/training.py:20:13 " in result.stdout
    result = migrate("project", "--write")
    assert "0 of " in result.stdout
    assert contents(folder) == migrated(before)


def test_the_diff_is_for_patch(folder):
    before = contents(folder)
    result = migrate("project", "--diff")
    assert result.exit_code == 1
    assert contents(folder) == before
    assert (
        "project/setup.py:5:42: tensorflow-addons>=0.11,<0.24: by hand: normwise" in result.stderr
    )
    (folder / "changes.patch").write_bytes(result.stdout_bytes)
    subprocess.run(["git", "apply", "changes.patch"], check=True)
    (folder / "changes.patch").unlink()
    assert contents(folder) == migrated(before)


def test_a_diff_keeps_line_ends_and_encoding(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = (
        "# coding: latin-1\r\nimport tensorflow_addons as tfa  # é\r\ntfa.layers.TLU()\x0c\r\n#"
    )
    Path("a.py").write_bytes(content.encode("latin-1"))
    result = migrate("a.py", "--diff")
    assert result.exit_code == 0
    assert b"+import normwise  # \xe9\r\n" in result.stdout_bytes
    Path("a.patch").write_bytes(result.stdout_bytes)
    subprocess.run(["git", "apply", "a.patch"], check=True)
    expected = content.replace("tensorflow_addons as tfa", "normwise").replace("tfa.", "normwise.")
    assert Path("a.py").read_bytes() == expected.encode("latin-1")


def test_nothing_to_do_is_success(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    result = migrate(tmp_path)
    assert (result.exit_code, result.stdout.count("\n")) == (0, 1)
    assert migrate(tmp_path, "--diff").stdout == ""


def test_all_moved_is_success(folder):
    assert migrate("project/tutorial.py", "--write").exit_code == 0
    assert migrate("project/tutorial.py").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["no-such"], "no-such: there is no such file or folder; check the name"),
        (["project/data.txt"], "data.txt is no .py or .ipynb file; name such a file, or a folder"),
        (["project", "--diff", "--write"], "leave one of them out"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(folder, arguments, text):
    before = contents(folder)
    result = migrate(*arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert text in result.stderr
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"import tensorflow_addons\nprint 1", "broken.py: line 2: no Python 3"),
        (b"import tensorflow_addons\n# \xff", "broken.py: 'utf-8' codec can't decode"),
        (b"# coding: none\nimport tensorflow_addons", "broken.py: unknown encoding"),
        (b"import tensorflow_addons\n\0", "broken.py: "),
    ],
)
def test_a_broken_file_is_named_and_the_others_are_written(folder, content, text):
    broken = folder / "project" / "broken.py"
    broken.write_bytes(content)
    moved = folder / "project" / "tutorial.py"
    result = migrate(broken, moved, "--write")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert text in result.stderr
    assert broken.read_bytes() == content
    assert moved.read_bytes() == (CASES / "tutorial.py.new").read_bytes()


def test_a_file_is_written_whole_or_not_at_all(folder, monkeypatch):
    before = contents(folder)

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    result = migrate("project/tutorial.py", "--write")
    assert result.exit_code == 2
    assert "No space left" in result.stderr
    assert contents(folder) == before


def test_a_link_stays_one(folder):
    link = folder / "link.py"
    link.symlink_to(folder / "project" / "tutorial.py")
    assert migrate("link.py", "--write").exit_code == 0
    assert link.is_symlink()
    assert link.read_bytes() == (CASES / "tutorial.py.new").read_bytes()


def store():
    before, _, after = section()
    DOCS.write_text(before + tables() + after)
    for path in OLD:
        rewritten = rewrite(path, read(path))
        path.with_suffix(".new").write_bytes(rewritten.text.encode())
        path.with_suffix(".left").write_bytes(left(rewritten).encode())


if __name__ == "__main__":
    store()

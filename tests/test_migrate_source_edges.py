"""The codemod where it must not guess, must refuse, and must go on with the other files."""

import json
import os
import re
import stat
import sys
import textwrap
import time
from pathlib import Path

import keras
import pytest
from test_migrate_source import migrate
from typer.testing import CliRunner

from normwise import cli
from normwise.migrate.source import keras3, rewrite_source
from normwise.migrate.source.notebooks import rewrite_notebook

IMPORT = "import tensorflow_addons as tfa\n"
USED = IMPORT + "tfa.layers.TLU()\n"
MOVED = "import normwise\nnormwise.layers.TLU()\n"

# What is left alone as a whole, for a name in it may be something else.
UNCLEAR = {
    "another import in the other branch": """
        if new:
            from keras.layers import GroupNormalization
        else:
            from tensorflow_addons.layers import GroupNormalization
        GroupNormalization()
        """,
    "another import below": """
        from tensorflow_addons.layers import GroupNormalization
        from normwise.layers import GroupNormalization
        """,
    "no class without the package": """
        try:
            from tensorflow_addons.layers import InstanceNormalization
        except ImportError:
            InstanceNormalization = None
        """,
    "a class": "from tensorflow_addons.layers import TLU\nclass TLU: pass\n",
    "a match": IMPORT + "match 1:\n    case tfa: tfa.layers.TLU\n",
    "a starred match": IMPORT + "match [1]:\n    case [*tfa]: tfa.layers.TLU\n",
    "a match of a mapping": IMPORT + "match {}:\n    case {**tfa}: tfa.layers.TLU\n",
    "a handler": IMPORT + "try: pass\nexcept OSError as tfa: pass\ntfa.layers.TLU\n",
    "a loop": IMPORT + "for tfa in (): pass\ntfa.layers.TLU\n",
    "a deletion": IMPORT + "tfa.layers.TLU\ndel tfa\n",
    "an assignment in an expression": IMPORT + "[tfa := 1 for _ in 'a']\ntfa.layers.TLU\n",
    "global": "def f():\n    global tfa\n    import tensorflow_addons as tfa\ntfa.layers.TLU\n",
    "a name that a class changes": "class C:\n    def f(self):\n"
    "        import tensorflow_addons as __tfa\n        return __tfa.layers.TLU\n",
    "an attribute of a class": "class C:\n    from tensorflow_addons.layers import TLU\n",
    "a module of a class": "class C:\n    import tensorflow_addons as tfa\n    tfa.layers.TLU\n",
}


@pytest.mark.parametrize("program", UNCLEAR.values(), ids=UNCLEAR)
def test_what_may_be_something_else_is_listed_and_left(program):
    program = textwrap.dedent(program)
    done = rewrite_source(program)
    assert (done.text, done.changes) == (program, ())
    assert done.remaining
    assert {found.note for found in done.remaining} == {
        "it may be something else here; move it by hand"
    }


LOCAL = """
def build(flag):
    x = tfa.layers.TLU
    if flag:
        import tensorflow_addons.layers as L
        x = L.TLU
    return x
"""

BECOMES = {
    "a local import that would hide the package": (
        IMPORT + LOCAL,
        "import normwise\n" + LOCAL.replace("tfa.", "normwise."),
    ),
    "a closure through a local import": (
        IMPORT + "def f():\n    import tensorflow_addons.rnn as r\n    r.LayerNormLSTMCell\n"
        "    return lambda: tfa.layers.TLU\n",
        "import normwise\ndef f():\n    import tensorflow_addons.rnn as r\n"
        "    r.LayerNormLSTMCell\n    return lambda: normwise.layers.TLU\n",
    ),
    "a local import alone": (
        "def f():\n    import tensorflow_addons as tfa; return tfa.layers.TLU\n",
        "def f():\n    import normwise; return normwise.layers.TLU\n",
    ),
    "an assignment that reads, too": (
        IMPORT + "class C:\n    tfa += 1\n",
        IMPORT + "class C:\n    tfa += 1\n",
    ),
    "one name of two that is not bound for certain": (
        "from tensorflow_addons import layers\nlayers.TLU\nif x:\n    "
        + IMPORT
        + "tfa.layers.TLU\n",
        "import normwise\nnormwise.layers.TLU\nif x:\n    " + IMPORT + "tfa.layers.TLU\n",
    ),
    "a package that is read before it is imported": (
        IMPORT + "normwise.x\ntfa.layers.TLU\n",
        "import normwise as normwise_\nnormwise.x\nnormwise_.layers.TLU\n",
    ),
    "a name that is exported": (
        IMPORT + '__all__ = ["tfa"]\ntfa.layers.TLU\n',
        "import normwise\n" + IMPORT + '__all__ = ["tfa"]\nnormwise.layers.TLU\n',
    ),
    "a name that is looked up": (
        IMPORT + "tfa.layers.TLU\nglobals()['tfa']\n",
        "import normwise\n" + IMPORT + "normwise.layers.TLU\nglobals()['tfa']\n",
    ),
    "an f-string that prints its source": (
        IMPORT + 'f"{tfa.layers.TLU=} {tfa.layers.TLU}"\n',
        "import normwise\n" + IMPORT + 'f"{tfa.layers.TLU=} {normwise.layers.TLU}"\n',
    ),
    "an f-string of several lines": (
        IMPORT + "f'''é {tfa.layers.TLU:{tfa.layers.TLU}}\n {\n  tfa.layers.TLU!r}'''\n",
        "import normwise\nf'''é {normwise.layers.TLU:{normwise.layers.TLU}}\n"
        " {\n  normwise.layers.TLU!r}'''\n",
    ),
    "a string that is a value in an annotation": (
        IMPORT + "x: Literal['tfa.layers.TLU'] = tfa.layers.TLU\n",
        "import normwise\n" + IMPORT + "x: Literal['tfa.layers.TLU'] = normwise.layers.TLU\n",
    ),
    "what a comprehension calls alike": (
        IMPORT + "[tfa.x for tfa in tfa.layers.TLU]\n",
        "import normwise\n[tfa.x for tfa in normwise.layers.TLU]\n",
    ),
    "comments within": (
        "from tensorflow_addons import (layers,  # one\n    rnn)  # two\n"
        "(layers  # three\n .tlu . # four\n TLU)\n",
        "# one\nimport normwise  # two\n(normwise.layers  # three\n  . # four\n TLU)\n",
    ),
    "form feeds and backslashes": (
        IMPORT + "\x0cx = 1\n\\\ny = tfa.layers.TLU\nif x: \\\n  import tensorflow_addons\n",
        "import normwise\n\x0cx = 1\n\\\ny = normwise.layers.TLU\nif x: \\\n  import normwise\n",
    ),
    "no newline at the end": (USED + IMPORT.rstrip(), MOVED.rstrip()),
    "carriage returns": (USED.replace("\n", "\r"), MOVED.replace("\n", "\r")),
    "a name in full width": (
        "import tensorflow_addons as ｔｆａ\ntfa.layers.ＴＬＵ\n",
        "import normwise\nnormwise.layers.ＴＬＵ\n",
    ),
}


@pytest.mark.parametrize(("old", "new"), BECOMES.values(), ids=BECOMES)
def test_becomes(old, new):
    done = rewrite_source(old)
    assert done.text == new
    compile(done.text, "new", "exec")
    assert rewrite_source(new).changes == ()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="type parameters came with Python 3.12")
def test_type_parameters_are_names():
    old = IMPORT + "def f[tfa: int](x: tfa.y): return x\ntype A[T] = tfa.layers.TLU\n"
    new = "import normwise\ndef f[tfa: int](x: tfa.y): return x\ntype A[T] = normwise.layers.TLU\n"
    assert rewrite_source(old).text == new


DEEP = {
    "terms": "x = " + " + ".join(["a"] * 900),
    "strings": "x = (" + "'a'\n" * 900 + ")",
    "branches": "if 1:\n pass\n" + "elif 2:\n pass\n" * 900,
    "calls": "x = (a\n" + ".b()\n" * 900 + ")",
    "attributes": "x = (a\n" + ".b\n" * 900 + ")",
    "lambdas": "x = " + "lambda: " * 90 + "1",
}


@pytest.mark.parametrize("program", DEEP.values(), ids=DEEP)
def test_what_python_compiles_is_done_however_deep(program):
    assert rewrite_source(USED + program + "\n").text == MOVED + program + "\n"


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("x = " + "(" * 5000 + ")" * 5000, 3),
        ("x = " + "-" * 50000 + "1", 3),
        ("x = 1\nx = " + " + ".join(["1"] * 20000) + "\nx = 2", 4),
        ("if 1:\n pass\n" + "elif 2:\n pass\n" * 20000, None),
        ("x = 1\0", 3),
        ("x = '\ud800'", 3),
    ],
    ids=["brackets", "signs", "terms", "branches", "nul", "surrogate"],
)
def test_what_python_does_not_compile_is_refused_with_its_line(program, line):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"line \d+: ") as refused:
        rewrite_source(USED + program + "\n")
    assert time.monotonic() - start < 10
    assert line is None or f"line {line}: " in str(refused.value)


def test_a_warning_in_a_source_is_not_ours():
    assert rewrite_source(USED + r"x = '\d' is 1" + "\n").changes


CELL = {"cell_type": "code", "source": USED}


@pytest.mark.parametrize(
    ("notebook", "message"),
    [
        ({"cells": [1, CELL]}, "no notebook of format 4"),
        ({"cells": [{**CELL, "source": 3}]}, "cell 1: the source is neither a text nor a list"),
        ({"cells": [CELL, {**CELL, "source": [1]}]}, "cell 2: the source is neither a text nor"),
        ({"cells": [CELL], "metadata": None}, "None has no kernelspec, for it is no object"),
        ({"cells": [CELL], "metadata": {"kernelspec": []}}, "has no language"),
        ({"cells": [CELL], "metadata": {"language_info": {"name": 3}}}, "its language is 3"),
        ({"cells": [CELL, {**CELL, "source": "x = '\ud800'"}]}, r"cell 2, line 1: .*half a char"),
        ({"cells": [CELL, {**CELL, "source": "return"}]}, "cell 2, line 1: no Python 3"),
    ],
)
def test_a_malformed_notebook_is_refused(notebook, message):
    with pytest.raises(ValueError, match=message):
        rewrite_notebook(json.dumps(notebook))


@pytest.mark.parametrize("text", ['{"cells": [], "cells": []}', "[" * 10**5, "9" * 5000])
def test_json_that_is_no_notebook_is_refused(text):
    with pytest.raises(ValueError, match=r"no notebook: no JSON: .*; save it anew"):
        rewrite_notebook(text)


def test_cells_are_compiled_as_cells():
    cells = ["x = 1\r", "from __future__ import annotations\n" + USED, "await x\ntfa.losses.X"]
    document = {"cells": [{**CELL, "source": cell} for cell in cells]}
    done = rewrite_notebook(json.dumps(document))
    assert json.loads(done.text)["cells"][1]["source"].endswith("normwise.layers.TLU()\n")
    assert [(found.cell, found.line) for found in done.remaining] == [(3, 2)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with one file that can be moved, in which tests put others."""
    monkeypatch.chdir(tmp_path)
    Path("z.py").write_text(USED)
    return tmp_path


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"# coding: utf-7\nx = '+AGE-'\n", "utf-7 does not keep its bytes; save it in UTF-8"),
        (b"# coding: unicode_escape\nx = '\\x61'\n", "unicode_escape does not keep its bytes"),
        (b"# coding: iso2022_jp\n# \x1b(B\n", "iso2022_jp does not keep its bytes"),
        (b"# coding: utf-16\n", "a.py: "),
        (b"# coding: rot13\n", "a.py: "),
        (b"# \xff\n", "a.py: "),
        (b"x = " + b"(" * 5000 + b"\n", "a.py: line 1: "),
    ],
)
def test_a_file_that_cannot_be_moved_stops_no_other(files, content, reason):
    content += USED.encode()
    Path("a.py").write_bytes(content)
    result = migrate(".", "--write")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert reason in result.stderr
    assert Path("a.py").read_bytes() == content
    assert Path("z.py").read_text() == MOVED


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_never_opened(files):
    os.mkfifo("a.py")
    Path("b.py").symlink_to("nowhere")
    assert migrate(".", "--write").exit_code == 0
    assert Path("z.py").read_text() == MOVED
    result = migrate("a.py")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "a.py is no .py or .ipynb file" in result.stderr


def test_a_folder_that_cannot_be_listed_stops_no_other(files, monkeypatch):
    closed = files / "closed"
    closed.mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):  # as for anyone but root, whom no permission binds
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    result = migrate(".", "--write")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "Permission denied" in result.stderr
    assert "closed" in result.stderr
    assert Path("z.py").read_text() == MOVED


def test_a_file_that_cannot_be_read_stops_no_other(files, monkeypatch):
    Path("a.py").write_text(USED)
    read = Path.read_bytes

    def refuse(path):
        if path.name == "a.py":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    result = migrate(".", "--write")
    assert result.exit_code == 2
    assert "Permission denied" in result.stderr
    assert stat.S_ISREG(Path("z.py").stat().st_mode)
    monkeypatch.undo()
    assert (files / "z.py").read_text() == MOVED


def test_a_place_is_no_emoji_and_no_markup(files):
    Path("[bold]a.py").write_text("\n" * 99 + USED)
    result = migrate("[bold]a.py")
    assert "[bold]a.py:100:8" in result.stdout


def test_what_would_steer_a_terminal_is_escaped(files):
    Path("a\x1b[2J.py").write_text(IMPORT + "tfa.é\n")
    shown = migrate(".").stdout
    assert "\x1b" not in shown
    assert r"a\x1b[2J.py" in shown
    assert r"a\x1b[2J.py:2:1: tensorflow_addons.é" in migrate(".", "--diff").stderr


def test_an_ascii_terminal_is_enough(files):
    Path("é.py").write_text(IMPORT + "tfa.é\n")
    result = CliRunner(charset="ascii").invoke(cli.app, ["migrate", "é.py"])
    assert result.exit_code == 1
    assert r"\xe9.py:2:1" in result.stdout


REFUSED = """import tensorflow as tf
import tensorflow_addons as tfa
from tensorflow import keras
from tensorflow.keras import backend as K
from tensorflow.keras.layers import ThresholdedReLU
from tensorflow.keras.layers.experimental import preprocessing

def model(x):
    x = tfa.layers.TLU()(tf.nn.relu(x))
    x = tf.keras.layers.Lambda(lambda y: K.mean(y))(preprocessing.Resizing(2, 2)(x))
    return ThresholdedReLU()(x), keras.optimizers.legacy.Adam()

class Layer(keras.layers.Layer):
    def call(self, x):
        return tf.nn.relu(x), K.learning_phase()

tf.data.Dataset, tf.keras.layers.Dense
"""


def test_what_keras_3_refuses_is_listed_and_stays():
    done = rewrite_source(REFUSED)
    assert done.remaining == ()
    assert [(found.line, found.old, found.new) for found in done.hints] == [
        (5, "keras.layers.ThresholdedReLU", "keras.layers.ReLU"),
        (6, "keras.layers.experimental.preprocessing", "keras.layers"),
        (9, "tf.nn.relu", "keras.ops.relu"),
        (10, "keras.backend.mean", "keras.ops.mean"),
        (11, "keras.optimizers.legacy.Adam", "keras.optimizers.Adam"),
        (15, "keras.backend.learning_phase", None),
    ]
    again = rewrite_source(done.text)
    assert [found.old for found in again.hints] == [found.old for found in done.hints]


def test_hints_are_shown_and_count_for_nothing(files):
    Path("z.py").write_text(REFUSED)
    assert "z.py:9:26: tf.nn.relu: for Keras 3: keras.ops.relu" in migrate("z.py", "--diff").stderr
    for _ in range(2):
        result = migrate("z.py", "--write")
        assert result.exit_code == 0
        assert "for Keras 3: keras.ops.relu (in a functional model)" in result.stdout
    cells = [{**CELL, "source": "!pip install tensorflow-addons"}, {**CELL, "source": REFUSED}]
    done = rewrite_notebook(json.dumps({"cells": cells}))
    assert "!pip install normwise" in done.text
    assert done.hints[0].cell == 2


def found(package, path):
    for part in path.split("."):
        package = getattr(package, part)
    return package


@pytest.mark.parametrize("old", [*keras3.ON_TENSORS, *keras3.GONE])
def test_keras_has_what_a_hint_names(old):
    new, _ = (keras3.ON_TENSORS | keras3.GONE)[old]
    if new is not None:
        assert found(keras, new.removeprefix("keras.")) is not None


@pytest.mark.parametrize("old", keras3.ON_TENSORS)
def test_a_function_of_a_hint_refuses_a_keras_tensor(old):
    tf = pytest.importorskip("tensorflow")
    function = found(tf, old.removeprefix("tf."))
    x = keras.Input((4, 4, 3))
    given = [(x,), (x, x), (x, 1), ([x, x], 1), (x, 1, 2), (x, x, 1), (x, x, 1, "SAME")]
    given += [
        (x, 2, 2, "channels_last"),
        (x, [1, 1], 1, "SAME"),
        (None, x),
        (x, *[[1] * 4] * 3, "SAME"),
    ]
    reasons = []
    for arguments in given:
        try:
            function(*arguments)
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            reasons.append(str(error))
        else:
            pytest.fail(f"{old} takes {arguments}")
    # The old backend asks for what a shape or dtype of TensorFlow has, and a KerasTensor's has not.
    assert any(
        re.search("KerasTensor|no attribute '(rank|base_dtype|as_list|is_fully_defined)'", each)
        for each in reasons
    )


@pytest.mark.parametrize("old", keras3.GONE)
def test_a_name_of_a_hint_is_gone(old):
    parts = old.removeprefix("keras.").split(".")
    # Of the old optimizers only the names are there.
    with pytest.raises((AttributeError, ImportError)):
        found(keras, ".".join(parts)).Adam()

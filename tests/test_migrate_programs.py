"""The codemod on programs that nobody wrote for it: each must do the same afterwards.

Half of them are random, for what Python's scopes can do to a name; the other half are files of the
standard library into which imports and uses of TensorFlow Addons are put.
"""

import ast
import collections
import itertools
import os
import random
import symtable
import sys
import sysconfig
import warnings
from pathlib import Path
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import pytest
from test_migrate_source import fake_modules

from normwise.migrate.source import rewrite_source
from normwise.migrate.source.scopes import Scopes

NAMES = ["tfa", "layers", "cells", "tensorflow_addons", "TLU", "Norm", "normwise", "nw", "x"]
IMPORTS = [
    "import tensorflow_addons as tfa",
    "import tensorflow_addons as tfa",
    "import tensorflow_addons",
    "import tensorflow_addons.layers",
    "import tensorflow_addons.layers as layers",
    "from tensorflow_addons import layers",
    "from tensorflow_addons import layers, rnn as cells",
    "from tensorflow_addons import rnn as cells, losses as x",
    "import os, tensorflow_addons.rnn as cells",
    "from tensorflow_addons.layers import TLU",
    "from tensorflow_addons.layers.tlu import TLU",
    "from tensorflow_addons.layers import GroupNormalization as Norm, Maxout",
    "from tensorflow_addons.layers import (TLU,  # one\n{0}    InstanceNormalization as Norm)",
    "import normwise",
    "import normwise as nw",
    "from normwise.layers import TLU",
    "import missing as tfa",
    "from missing import TLU",
]
VALUES = [
    "tfa.layers.TLU",
    "tfa.layers.TLU",
    "tfa.layers.tlu.TLU",
    "tfa.losses.GIoULoss",
    "tfa",
    "tensorflow_addons.layers.GroupNormalization",
    "layers.TLU",
    "layers.Maxout",
    "(layers\n{0}    .normalizations  # of it\n{0}    .GroupNormalization)",
    "cells.LayerNormLSTMCell",
    "cells.NASCell",
    "TLU",
    "Norm",
    "normwise.layers.RMSNormalization",
    "nw.layers.RMSNormalization",
    "x",
    "getattr(tfa.layers, 'TLU')",
    "globals()['tfa'].layers.TLU",
    "f'{{tfa.layers.TLU}} {{layers.TLU!r:>{{len(tfa.layers.TLU)}}}}'",
    "f'{{tfa.layers.TLU=}}'",
    "[each for each in (tfa.layers.TLU, TLU)]",
    "[tfa.layers.TLU for tfa in (1, 2)]",
    "[layers for layers in (layers.TLU,)]",
    "{{tfa.layers.TLU: x for x in ['a']}}",
    "(lambda: tfa.layers.TLU)()",
    "(lambda tfa: tfa)(layers.TLU)",
    "(lambda normwise=2, y=tfa.layers.TLU: (normwise, y, layers.TLU))()",
    "(x := tfa.layers.TLU)",
    "[layers.TLU for _ in range(2) if (tfa := 3)]",
    "'tfa'",
    "{{**{{'a': tfa.layers.TLU}}}}",
]
SIMPLE = [
    "pass",
    "del {name}",
    "{name} = None",
    "{name} = 'own'",
    "{name}: 'tfa.layers.TLU' = 1",
    "{name} += 'a'",
    "global {name}",
    "nonlocal {name}",
    "raise ImportError",
    "return",
    "x = [tfa.layers.TLU, layers.Maxout]",
    "tfa.layers.TLU",
    "__all__ = ['{name}']",
]
IN_FUNCTIONS = ["nonlocal {name}", "return"]
HEADS = [
    "if 1:|else:",
    "if 0:|else:",
    "if 1:",
    "if 0:",
    "try:|except ImportError:",
    "try:|except NameError:",
    "try:|except (ImportError, NameError) as {name}:|else:",
    "try:|finally:",
    "try:|except ImportError:\n{0}    raise|else:|finally:",
    "for {name} in ():|else:",
    "for {name} in 'ab':",
    "while 0:|else:",
    "with contextlib.nullcontext('a') as {name}:",
    "with contextlib.suppress(ImportError, NameError):",
    "def {f}({name}=tfa.layers.TLU):",
    "def {f}():",
    "def {f}():",
    "def {f}(normwise: 'tfa.layers.TLU' = 2, *tfas) -> layers.TLU:",
    "async def h():",
    "class C:",
    "class C(Base):",
    "@keep\n{0}class D:",
    "@keep\n{0}def {f}():",
    "match 'a':\n{0}    case {name}:",
    "match ['a', 'b']:\n{0}    case [*{name}]:",
    "match {{'a': 1}}:\n{0}    case {{'a': 1, **{name}}}:",
]
PREAMBLE = "import contextlib, os\nused = []\nkeep = lambda each: each\nclass Base: pass\n"


GUARD = "with contextlib.suppress(Exception): "
TRIED = """{0}try:
{0}    used.append({1})
{0}except (NameError, AttributeError, TypeError) as error:
{0}    used.append(type(error).__name__)"""


@st.composite
def blocks(draw, indent="", depth=0, inside=""):
    """Some statements, one of them at least."""
    lines = []
    for _ in range(draw(st.integers(1, 6 if depth == 0 else 3))):
        kind = draw(st.integers(0, 9))
        name = draw(st.sampled_from(NAMES))
        if kind < 3:
            imported = draw(st.sampled_from(IMPORTS)).format(indent)
            guard = GUARD if "missing" in imported else draw(st.sampled_from(["", "", GUARD]))
            lines.append(indent + guard + imported)
        elif kind < 6:
            value = draw(st.sampled_from(VALUES)).format(indent)
            lines.append(TRIED.format(indent, value))
        elif kind < 7 or depth == 3:
            allowed = SIMPLE if inside else [each for each in SIMPLE if each not in IN_FUNCTIONS]
            guard = draw(st.sampled_from(["", GUARD, GUARD]))
            lines.append(indent + guard + draw(st.sampled_from(allowed)).format(name=name))
        else:
            # What is called here is defined here, so that nothing calls itself.
            head = draw(st.sampled_from(HEADS)).format(indent, name=name, f=f"f{depth}")
            within = next((each for each in ("def", "class") if f"{each} " in head), inside)
            inner = indent + "    " * (2 if head.startswith("match") else 1)
            for part in head.split("|"):
                lines.append(f"{indent}{part}")
                lines.append(draw(blocks(inner, depth + 1, within if within != "class" else "")))
            called = draw(st.sampled_from(["pass", f"f{depth}()", "used.append(C().layers)"]))
            lines.append(indent + GUARD + called)
    return "\n".join(lines)


def run(program):
    """What a program puts into `used`, and the exception that ends it."""
    scope, error = {"__name__": "program"}, None
    with mock.patch.dict(sys.modules, fake_modules()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(compile(program, "program", "exec"), scope)
        except Exception as raised:
            error = type(raised)
    known = (str, int, list, tuple, dict, type(None))
    return [each if isinstance(each, known) else str(type(each)) for each in scope["used"]], error


@hypothesis.given(blocks())
@hypothesis.settings(
    max_examples=5000 if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz" else 250,
    suppress_health_check=list(hypothesis.HealthCheck),
)
def test_a_random_program_does_the_same(block):
    program = PREAMBLE + block + "\n"
    try:
        compile(program, "program", "exec")
    except SyntaxError:
        with pytest.raises(ValueError, match="no Python 3"):
            rewrite_source(program)
        return
    once = rewrite_source(program)
    assert run(once.text) == run(program), once.text
    twice = rewrite_source(once.text)
    assert (twice.text, twice.changes) == (once.text, ())
    assert [each.old for each in twice.remaining] == [each.old for each in once.remaining]


LIBRARY = Path(sysconfig.get_path("stdlib"))
REAL = [
    *("argparse", "ast", "asyncio/tasks", "collections/__init__", "contextlib", "dataclasses"),
    *("datetime", "decimal", "difflib", "doctest", "email/header", "enum", "functools", "inspect"),
    *("json/decoder", "logging/__init__", "pickle", "shutil", "typing", "unittest/mock"),
]
TOP = [
    ("import tensorflow_addons as tfa_", "import normwise\nimport tensorflow_addons as tfa_"),
    (
        "from tensorflow_addons import layers as layers_",
        "from tensorflow_addons import layers as layers_",
    ),
    ("from tensorflow_addons.layers import TLU as TLU_", "from normwise.layers import TLU as TLU_"),
]
PUT = [
    ("tfa_.layers.TLU(affine=True)  # é", "normwise.layers.TLU(affine=True)  # é"),
    ("layers_.tlu.TLU, layers_.Maxout(2)", "normwise.layers.TLU, layers_.Maxout(2)"),
    ("TLU_(*[tfa_.rnn.NASCell])", "TLU_(*[tfa_.rnn.NASCell])"),
    (
        "y_ = lambda x_=tfa_.layers.TLU: [layers_.TLU for z_ in x_]",
        "y_ = lambda x_=normwise.layers.TLU: [normwise.layers.TLU for z_ in x_]",
    ),
    (
        "def g_(): from tensorflow_addons.rnn import LayerNormLSTMCell as C_; C_()",
        "def g_(): from normwise.rnn import LayerNormLSTMCell as C_; C_()",
    ),
    (
        "def f_(a: 'tfa_.layers.TLU' = 'é') -> layers_.TLU: return f'{tfa_.layers.TLU} {a}'",
        "def f_(a: 'normwise.layers.TLU' = 'é') -> normwise.layers.TLU: "
        "return f'{normwise.layers.TLU} {a}'",
    ),
]


def lines_before_statements(source):
    """The lines above which a statement can be put, with its indentation, from the top down."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        blocks = [getattr(node, field, None) for field in ("body", "orelse", "finalbody")]
        for block in [each for each in blocks if isinstance(each, list)]:
            for before, statement in zip([None, *block], block, strict=False):
                decorators = getattr(statement, "decorator_list", [])
                first = min(each.lineno for each in [statement, *decorators])
                line = lines[first - 1]
                indent = line[: len(line) - len(line.lstrip())]
                is_docstring = before is None and isinstance(statement, ast.Expr)
                is_future = getattr(statement, "module", "") == "__future__"
                is_first = before is None or before.end_lineno < first
                begins = len(indent) == statement.col_offset and not line.lstrip().startswith(
                    "elif"
                )
                if is_first and begins and not is_docstring and not is_future:
                    yield first, indent


@pytest.mark.parametrize("name", REAL)
def test_what_is_put_into_a_real_file_moves_and_nothing_else(name):
    old = expected = LIBRARY.joinpath(f"{name}.py").read_text(encoding="utf-8")
    rng = random.Random(name)
    places = sorted(set(lines_before_statements(old)))
    top = next(place for place in places if not place[1])
    below = [place for place in places if place > top]
    chosen = list(zip(rng.sample(below, min(48, len(below))), itertools.cycle(PUT), strict=False))
    texts = []
    for which in (0, 1):
        lines = old.splitlines(keepends=True)
        for (line, indent), put in sorted(chosen, reverse=True):
            lines.insert(line - 1, f"{indent}{put[which]}\n")
        lines[top[0] - 1 : top[0] - 1] = [f"{each[which]}\n" for each in TOP]
        texts.append("".join(lines))
    old, expected = texts
    once = rewrite_source(old)
    assert once.text == expected
    assert ast.dump(ast.parse(once.text)) == ast.dump(ast.parse(expected))
    twice = rewrite_source(once.text)
    assert (twice.text, twice.changes) == (once.text, ())


@pytest.mark.parametrize("name", REAL)
def test_scopes_are_those_of_cpython(name):
    source = LIBRARY.joinpath(f"{name}.py").read_text(encoding="utf-8")
    scopes = Scopes(ast.parse(source))
    ours = [(scope.kind, scope.bound) for scope in scopes.all if scope.kind != "module"]
    kinds = {"comprehension": "function"}
    counted = collections.Counter((kinds.get(kind, kind), visible(bound)) for kind, bound in ours)
    tables, todo = [], symtable.symtable(source, name, "exec").get_children()
    while todo:
        table = todo.pop()
        tables.append((str(table.get_type()), visible(bound_in(table))))
        todo += table.get_children()
    assert counted == collections.Counter(tables)


def bound_in(table):
    for symbol in table.get_symbols():
        is_elsewhere = symbol.is_declared_global() or symbol.is_nonlocal()
        if (symbol.is_assigned() or symbol.is_parameter() or symbol.is_imported()) and (
            not is_elsewhere
        ):
            yield symbol.get_name()


def visible(bound):
    """The names but for those of the interpreter, and those that a class changes."""
    return frozenset(each for each in bound if each.isidentifier() and "__" not in each)

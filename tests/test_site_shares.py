"""The site's page "Who shares statistics?" in a browser: it agrees with Python, and can be used."""

import ast
import functools
import inspect
import itertools
import math
import pathlib
import random
import re
import shutil

import browser
import built  # noqa: F401 - skips all of this where no site was built
import keras
import numpy as np
import pytest
from frameworks import to_numpy

import normwise
from normwise import geometry, layers
from normwise.kernels import cpu, gpu, library
from normwise.norm import Norm

ROOT = pathlib.Path(__file__).parents[1]
NORMS = ["group", "instance", "layer", "rms", "response", "batch"]
NORMS += ["adaptive", "spade", "global-response", "reversible"]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page without its theme, as a file."""
    folder = tmp_path_factory.mktemp("site")
    text = (ROOT / "docs" / "shares.md").read_text(encoding="utf-8")
    (app,) = re.findall(r"^```\{raw\} html\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>x</title>'
    )
    page = folder / "shares.html"
    page.write_text(f'<!doctype html><html lang="en">{head}<body>{app}', encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "_static" / "shares", folder / "_static" / "shares")
    return page.as_uri()


@pytest.fixture(scope="module")
def chromium():
    with browser.opened() as opened:
        yield opened


@pytest.fixture(scope="module")
def tab(chromium):
    return chromium.new_page()


@pytest.fixture
def page(tab, address):
    """The page as it opens; whatever it says on the console is an error."""
    said = []

    def hear(message):
        said.append(str(message))

    tab.on("console", hear)
    tab.on("pageerror", hear)
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.goto(address)
    yield tab
    tab.remove_listener("console", hear)
    tab.remove_listener("pageerror", hear)
    assert not said


# What is asked of both: a norm, a shape, an axis, groups, and for SPADE where the channels lie.


def written(value):
    """A value as geometry.js is given it: numbers, lists of these, all else by its repr."""
    if isinstance(value, list):
        return [written(each) for each in value]
    return value if type(value) is int else {"repr": repr(value)}


def random_case(rng):
    rank = rng.choice((0, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5))
    extents = (1, 2, 2, 3, 4, 5, 6, 6, 8, 12)
    shape = [rng.choice(extents) for _ in range(rank)]
    if shape and rng.random() < 0.15:
        shape[rng.randrange(rank)] = rng.choice((0, None, 64, 1000, 4096, 5000, 40000))
    return {
        "norm": rng.choice(NORMS),
        "shape": shape,
        "axis": random_axis(rng, rank),
        "groups": rng.choice((1, 1, 2, 2, 2, 3, 4, 6, -1, -1, 0, -2, 5, 2.0, True, None, "2")),
        "channels": rng.choice(("first", "last")),
    }


def random_axis(rng, rank):
    def an_axis():
        return rng.randrange(-rank - 1, rank + 1) if rng.random() < 0.05 else rng.randrange(1, 5)

    kind = rng.random()
    if kind < 0.3:
        return rng.choice((-1, -1, 1, 2, -2, 0))
    if kind < 0.5:
        return an_axis()
    if kind < 0.6:
        return list(range(1, rank - 1))
    if kind < 0.7:
        return rng.sample(range(rank), rng.randint(0, rank))
    if kind < 0.73:
        return rng.choice((1.5, None, True, "last", [1, 2.0], ["1"]))
    return [
        rng.choice((an_axis(), an_axis() - rank)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3)))
    ]


@functools.cache
def spade(data_format):
    return layers.SPADE(data_format=data_format)


def geometry_of(norm, shape, axis, groups, channels):
    """What Python says of a case."""
    shape = tuple(shape)
    match norm:
        case "group":
            return geometry.group(shape, axis, groups)
        case "layer" | "rms":
            return geometry.layer(shape, axis)
        case "response":
            return geometry.response(shape, axis)
        case "batch":
            return geometry.batch(shape, axis)
        case "reversible":
            return layers.ReversibleInstanceNormalization(axis).geometry(shape)
        case "spade":
            layer = spade(f"channels_{channels}")
            layer.compute_output_spec(keras.KerasTensor(shape), keras.KerasTensor(shape))
            return layer.norm.geometry(shape)
    return geometry.group(shape, axis, geometry.INSTANCE)


def python_says(case):
    positions = case.pop("positions", [])
    try:
        sets = geometry_of(**case)
    except (TypeError, ValueError) as error:
        return {"type": type(error).__name__, "message": str(error)}
    norm = Norm(sets, "float32", "float32", 1e-3)
    known, apart = None not in sets.shape, sets.permutation is not None
    counts = [getattr(sets, name) for name in sets.per]
    answer = {
        "extents": list(sets.extents),
        "ends": list(sets.ends),
        "permutation": list(sets.permutation) if apart else None,
        "setAxes": list(sets.set_axes),
        "parameterAxes": list(sets.parameter_axes),
        "parameterShape": list(sets.parameter_shape),
        "statisticsShape": None if apart else list(sets.statistics_shape(sets.shape)),
        "broadcastStatisticsShape": list(sets.broadcast_statistics_shape),
        "setSize": sets.set_size,
        "setCount": None if None in counts else math.prod(counts),
        "pattern": sets.pattern,
        "cpu": kernel("native", cpu.why_not(norm)),
        "gpu": kernel("triton", gpu.why_not(norm)),
        "sets": [list(sets.set_of(tuple(each))) for each in positions],
    }
    if case["norm"] == "batch":
        answer["cpu"] = answer["gpu"] = ["keras", "the layer is Keras’s"]
    if case["norm"] == "global-response":
        answer["cpu"] = answer["gpu"] = ["composite", "it is made of Keras’s operations"]
    if known and 0 < math.prod(sets.shape) <= 200:
        answer["numbers"] = numbers_of(sets)
        assert len(set(answer["numbers"])) == answer["setCount"]
    return answer


def kernel(name, reason):
    return [name, None] if reason is None else ["composite", reason]


def numbers_of(sets):
    """The number of each element's set, where sets are counted by their first elements."""
    numbers = {}
    return [numbers.setdefault(sets.set_of(at), len(numbers)) for at in np.ndindex(*sets.shape)]


JAVASCRIPT_SAYS = """(cases) => cases.map((given) => {
  const G = normwiseGeometry;
  const norm = normwiseNorms.NORMS[given.norm];
  try {
    const sets = norm.find(given.shape, given);
    const kernel = ({kernel, reason}) => [kernel, reason ?? null];
    const {shape} = sets;
    const answer = {
      extents: Object.values(sets.extents),
      cpu: kernel(norm.onCpu(sets)),
      gpu: kernel(norm.onGpu(sets)),
      sets: given.positions.map((position) => G.setOf(sets, position)),
    };
    for (const name of ['ends', 'permutation', 'setAxes', 'parameterAxes', 'parameterShape',
      'statisticsShape', 'broadcastStatisticsShape', 'setSize', 'setCount', 'pattern']) {
      answer[name] = sets[name];
    }
    const elements = G.product(shape);
    if (elements > 0 && elements <= 200) {
      const positions = shape.reduce((all, extent) => all.flatMap((position) =>
        G.range(0, extent).map((index) => [...position, index])), [[]]);
      answer.numbers = positions.map((position) => G.setNumber(sets, position));
      answer.numbers.forEach((number, i) => {
        const first = String(G.firstOfSet(sets, number));
        if (first !== String(positions[answer.numbers.indexOf(number)])) throw new Error(first);
      });
    }
    return answer;
  } catch (error) {
    if (!(error instanceof G.PythonError)) throw error;
    return {type: error.type, message: error.message};
  }
})"""


@pytest.fixture
def kernels_are_there(monkeypatch):
    """Whatever was built or installed here: the page is for other machines too."""
    monkeypatch.setattr(library, "missing", lambda: None)
    monkeypatch.setattr(gpu, "missing", lambda: None)


@pytest.fixture(scope="module")
def cases():
    rng = random.Random(20)
    made = [random_case(rng) for _ in range(3600)]
    for case in made:
        shape = case["shape"]
        can_point = None not in shape and 0 not in shape
        case["positions"] = (
            [[rng.randrange(extent) for extent in shape] for _ in range(3)] if can_point else []
        )
    return made


def given_to_javascript(case):
    return {**case, "axis": written(case["axis"]), "groups": written(case["groups"])}


def test_geometry_is_that_of_python(page, cases, kernels_are_there):
    found = page.evaluate(JAVASCRIPT_SAYS, [given_to_javascript(case) for case in cases])
    expected = [python_says(dict(case)) for case in cases]
    for case, javascript, python in zip(cases, found, expected, strict=True):
        assert javascript == python, case
    valid = [case["norm"] for case, each in zip(cases, expected, strict=True) if "pattern" in each]
    assert {*valid} == {*NORMS}
    assert len(valid) > 1200
    assert len(cases) - len(valid) > 1200
    patterns = {each.get("pattern", "error") for each in expected}
    assert patterns == {"rows", "runs", "columns", "kept", None, "error"}


def test_every_error_of_geometry_was_compared(cases):
    """Each is known by the longest piece of its text."""
    messages = [each["message"] for each in map(python_says, map(dict, cases)) if "message" in each]
    tree = ast.parse(inspect.getsource(geometry))
    pieces = [
        max((part.value for part in ast.walk(call.args[0]) if is_text(part)), key=len)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and getattr(call.func, "id", "") in ("ValueError", "TypeError")
    ]
    assert len(pieces) >= 12
    for piece in pieces:
        assert any(piece in message for message in messages), piece
    # Two that are no geometry's, but a layer's.
    for piece in ("is no time axis of a series", "but SPADE takes images and maps of rank 4"):
        assert any(piece in message for message in messages), piece


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_files_of_the_cpu_are_those_of_the_library(page):
    (text,) = re.findall(
        r"kLongestRow = (\d+);", (ROOT / "csrc" / "normwise.cc").read_text(encoding="utf-8")
    )
    longest = int(text)
    expected = {
        "layer([8, LONGEST], -1)": "rows.cc",
        "layer([8, LONGEST + 1], -1)": "runs.cc",
        "group([8, 6, 4, 5], 1, 3)": "runs.cc",
        "group([8, 4, 5, 6], -1, 3)": "columns.cc",
        "layer([8, 6, 4, 5], 1)": "kept.cc",
        "layer([8, 6, 1, 1], 1)": "kept.cc",
    }
    for call, file in expected.items():
        asked = f"normwiseGeometry.onCpu(normwiseGeometry.{call.replace('LONGEST', text)}).files"
        assert page.evaluate(asked) == [file], (call, longest)


@pytest.mark.skipif(
    gpu.missing() is not None or keras.backend.backend() == "tensorflow",
    reason="of Triton, which ends a process that has imported TensorFlow",
)
def test_files_of_gpus_are_those_of_the_plan(page):
    from normwise.kernels.gpu import plan

    most = (plan._MOST, plan._MOST_WHOLE), (plan._MOST_BACKWARD, plan._MOST_BACKWARD)
    rng = random.Random(21)
    extents = (1, 2, 3, 6, 7, 16, 33, 64, 128, 300, 512, 2000, 8193, 20000, 40000)
    asked, expected = [], []
    while len(asked) < 500:
        shape = tuple(rng.choice(extents) for _ in range(rng.randint(2, 5)))
        first = rng.randrange(len(shape))
        axes = [*range(first, rng.randint(first + 1, len(shape)))]
        groups = rng.choice([d for d in (1, 2, 3, 16, -1) if d == -1 or shape[axes[0]] % d == 0])
        for_group = first > 0 and rng.random() < 0.6
        sets = geometry.group(shape, first, groups) if for_group else geometry.layer(shape, axes)
        norm = Norm(sets, "float32", "float32", 1e-3)
        files = [f"{plan._pattern(norm, plan._Sets.of(norm), *each)}.py" for each in most]
        asked.append([shape, first, groups] if for_group else [shape, axes])
        expected.append(files)
    found = page.evaluate(
        "(asked) => asked.map((given) => normwiseGeometry.onGpu("
        "normwiseGeometry[given.length === 3 ? 'group' : 'layer'](...given)).files)",
        asked,
    )
    assert found == expected
    names = {"rows.py", "kept.py", "whole.py", "runs.py", "pieces.py"}
    assert {*itertools.chain(*expected)} == names


AXES = [
    "-1",
    " 3 ",
    "+2",
    "1, 2",
    "[1, 2]",
    "(1, 2)",
    "1,",
    "[1]",
    "(1,)",
    "[]",
    "1.5",
    "2.",
    "-.5",
]
AXES += ["True", "None", "last", "it's", "[1, 2.0]", "[1, True]"]


def read_by_python(text):
    try:
        value = ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        value = text
    return list(value) if isinstance(value, tuple) else value


def test_what_is_typed_is_read_as_python_reads_it(page):
    found = page.evaluate("(texts) => texts.map(normwiseNorms.readAxis)", AXES)
    assert dict(zip(AXES, found, strict=True)) == {
        text: written(read_by_python(text)) for text in AXES
    }


def configurations():
    """One of each rank for each norm, channels first and last, as what is typed."""
    shapes = {2: (3, 6), 3: (3, 5, 6), 4: (2, 3, 4, 6), 5: (2, 3, 2, 3, 4)}
    for norm, (rank, shape), channels in itertools.product(
        NORMS, shapes.items(), ("first", "last")
    ):
        if (norm == "spade" and rank != 4) or (norm == "reversible" and rank != 3):
            continue
        shape = shape if channels == "last" else (shape[0], shape[-1], *shape[1:-1])
        yield {"norm": norm, "shape": str(shape), "groups": "2", "channels": channels}


LINES = """(given) => {
  const N = normwiseNorms;
  const shape = N.readShape(given.shape);
  const axis = N.defaultAxis(given.norm, shape.length, given.channels);
  const found = N.configure({axis: normwiseGeometry.repr(axis), ...given});
  return {shape, layer: N.layerLine(found), op: N.opLine(found), gamma: found.sets.parameterShape,
    extents: Object.values(found.sets.extents)};
}"""

# Forms of the axis that no default has.
TYPED = [
    {"norm": "layer", "shape": "2,3,4,6", "axis": "1,3", "groups": "", "channels": "last"},
    {"norm": "rms", "shape": "2,3,4,6", "axis": "[-1, 1, 2]", "groups": "", "channels": "last"},
    {"norm": "batch", "shape": "2,3,4,6", "axis": "[3]", "groups": "", "channels": "last"},
    {"norm": "group", "shape": "2,3,4,6", "axis": "(2,)", "groups": "-1", "channels": "last"},
]


def test_every_line_of_code_runs_and_is_what_is_drawn(page):
    rng = np.random.default_rng(0)
    for given in (*configurations(), *TYPED):
        lines = page.evaluate(LINES, given)
        shape = tuple(lines["shape"])
        layer = eval(lines["layer"], {"normwise": normwise, "keras": keras})
        x = rng.normal(3.0, 2.0, shape).astype("float32")
        gamma, beta = np.ones(lines["gamma"], "float32"), np.zeros(lines["gamma"], "float32")
        if given["norm"] == "batch":
            layer.build(shape)
            assert layer.gamma.shape == gamma.shape, given
        else:
            sets = (layer.norm if given["norm"] == "spade" else layer).geometry(shape)
            assert list(sets.extents) == lines["extents"], given
        if lines["op"] is not None:
            y = eval(lines["op"], {"normwise": normwise, "x": x, "gamma": gamma, "beta": beta})
            assert to_numpy(y) == pytest.approx(to_numpy(layer(x)), abs=1e-6), given


# The page as it is used.


def status(page):
    return page.get_by_role("status").first.inner_text()


def element(page):
    return ast.literal_eval(re.match(r"Element (\(.*?\))", status(page))[1])


def facts(page):
    names, values = (page.locator(f"#shares-facts {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def shared_cells(page):
    """How many cells are marked, and how many of these as the chosen one."""
    return [
        page.locator(f"#shares-maps .shares-is-{kind}").count() for kind in ("shared", "chosen")
    ]


def test_the_page_opens_on_group_norm(page):
    assert status(page) == "Element (0, 0, 0, 0) is in set 1 of 8, with 100 elements."
    assert shared_cells(page) == [100, 1]
    assert page.locator("#shares-extents td").all_inner_texts() == ["4", "25", "2", "4", "1"]
    assert facts(page) == {
        "Sets": "8, each of 100 elements",
        "Statistics": "(4, 2, 2) in the kernels, (4, 1, 1, 8) to broadcast",
        "gamma and beta": "(8,)",
        "Pattern in memory": "columns: the neighbours are channels",
        "CPU": "native, columns.cc",
        "GPU": "triton, whole.py",
    }
    line = "normwise.layers.GroupNormalization(groups=2, axis=-1)"
    assert page.locator("#shares-layer").inner_text() == line


def test_controls_change_what_is_drawn(page):
    page.get_by_label("Norm").select_option("layer norm")
    assert status(page) == "Element (0, 0, 0, 0) is in set 1 of 100, with 8 elements."
    assert page.get_by_label("Groups").is_hidden()
    page.get_by_label("first").check(force=True)
    assert page.get_by_label("Shape").input_value() == "4, 8, 5, 5"
    assert page.get_by_label("Axes of a set").input_value() == "1"
    assert facts(page)["Pattern in memory"].startswith("kept")
    page.get_by_label("Axes of a set").fill("1, 2, 3")
    assert status(page) == "Element (0, 0, 0, 0) is in set 1 of 4, with 200 elements."
    assert shared_cells(page) == [200, 1]
    page.get_by_role("button", name="rank 2").click()
    assert status(page) == "Element (0, 0) is in set 1 of 4, with 8 elements."
    page.get_by_label("Norm").select_option("batch norm (Keras)")
    assert "normwise has no batch norm" in page.locator("#shares-note").inner_text()
    assert page.locator("#shares-op-row").is_hidden()
    assert facts(page)["Statistics"] == "(1, 8) to broadcast"
    page.get_by_label("last").check(force=True)
    page.get_by_label("Norm").select_option("reversible instance norm")
    assert page.get_by_label("Shape").input_value() == "4, 12, 8"
    assert status(page) == "Element (0, 0, 0) is in set 1 of 32, with 12 elements."


EVERY_NORM = """() => {
  const said = [];
  const select = document.getElementById('shares-norm');
  const error = document.getElementById('shares-error');
  const radios = [...document.getElementsByName('channels')];
  for (const {value} of select.options) {
    select.value = value;
    select.dispatchEvent(new Event('change'));
    for (const button of document.getElementById('shares-ranks').children) {
      if (value === 'spade' || value === 'reversible') continue;
      button.click();
      for (const radio of radios) {
        radio.click();
        said.push([value, button.textContent, radio.value, error.textContent]);
      }
    }
    said.push([value, '', '', error.textContent]);
  }
  return said;
}"""


def test_every_norm_begins_without_an_error(page):
    said = page.evaluate(EVERY_NORM)
    assert {norm for norm, *_ in said} == {*NORMS}
    assert len(said) == 8 * 4 * 2 + len(NORMS)
    assert [each for each in said if each[-1]] == []


def test_an_error_is_pythons(page):
    page.get_by_label("Groups").fill("3")
    page.get_by_label("Groups").press("Enter")
    with pytest.raises(ValueError, match="groups=3 does not divide") as raised:
        geometry.group((4, 5, 5, 8), -1, 3)
    assert page.get_by_role("alert").inner_text() == f"ValueError: {raised.value}"
    assert page.get_by_label("Groups").get_attribute("aria-invalid") == "true"
    assert page.locator("#shares-picture").is_hidden()
    page.get_by_label("Groups").fill("4")
    assert page.get_by_role("alert").is_hidden()
    assert status(page) == "Element (0, 0, 0, 0) is in set 1 of 16, with 50 elements."


def test_an_error_waits_while_one_types(page):
    page.get_by_label("Shape").press("End")
    page.keyboard.type(", x")
    assert page.get_by_role("alert").is_hidden()
    page.get_by_role("alert").wait_for(state="visible")
    assert page.get_by_role("alert").inner_text().startswith("shape '4, 5, 5, 8, x' is no list")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("64, 64, 64, 64", "more than 4096 cannot be told apart"),
        ("None, 5, 5, 8", "has an extent that is unknown or empty"),
        ("1, 1, 1, 1, 1, 8", "has rank 6, but the figure draws rank 2 to 5"),
    ],
)
def test_what_cannot_be_drawn_is_read_off_all_the_same(page, shape, words):
    page.get_by_label("Shape").fill(shape)
    page.get_by_label("Shape").press("Enter")
    assert words in page.get_by_role("alert").inner_text()
    assert page.locator("#shares-picture").is_hidden()
    assert facts(page)["gamma and beta"] in ("(64,)", "(8,)")


def test_the_pointer_finds_every_element_and_its_set(page):
    """All cells of an odd geometry: the set under the pointer is Python's."""
    page.get_by_label("Norm").select_option("layer norm")
    page.get_by_label("Shape").fill("2, 2, 2, 4")
    page.get_by_label("Axes of a set").fill("1, 3")
    sets, seen = geometry.layer((2, 2, 2, 4), (1, 3)), {}
    for cell in page.locator("#shares-maps .shares-cell").all():
        cell.hover()
        seen[element(page)] = page.evaluate(
            "[...document.querySelectorAll('#shares-maps .shares-is-shared')].map("
            "(cell) => `${cell.dataset.row},${cell.dataset.column}`).join(';')"
        )
    assert {*seen} == {*np.ndindex(2, 2, 2, 4)}
    for one, other in itertools.combinations(seen, 2):
        assert (seen[one] == seen[other]) == (sets.set_of(one) == sets.set_of(other))


def test_the_pointer_chooses_on_the_block_too(page):
    page.locator('[data-block="2,5,0"]').last.hover()
    assert element(page) == (2, 0, 0, 5)
    assert page.locator("#shares-block .shares-chosen").count() > 0
    assert page.get_by_role("img").get_attribute("aria-label").endswith(status(page))


# Line by line, to the right and to the left in turn, and what is said of each element on the way.
WALK = """([rows, columns]) => {
  const picture = document.getElementById('shares-maps');
  const press = (key) => picture.dispatchEvent(new KeyboardEvent('keydown', {key}));
  const told = [];
  press('Home');
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      told.push(document.getElementById('shares-status').textContent);
      if (column < columns - 1) press(row % 2 ? 'ArrowLeft' : 'ArrowRight');
    }
    press('ArrowDown');
  }
  return told;
}"""


@pytest.mark.parametrize(
    ("shape", "rows_and_columns"),
    [((3, 8), (3, 8)), ((3, 7, 4), (4, 21)), ((2, 3, 4, 5), (6, 20)), ((2, 3, 2, 4, 3), (12, 12))],
)
def test_arrows_go_through_all_elements(page, address, shape, rows_and_columns):
    page.goto(f"{address}?norm=layer&shape={','.join(map(str, shape))}&axis=-1")
    told = page.evaluate(WALK, rows_and_columns)
    elements = [ast.literal_eval(re.match(r"Element (\(.*?\))", each)[1]) for each in told]
    assert len(elements) == math.prod(shape)
    assert {*elements} == {*np.ndindex(shape)}


def test_the_page_is_used_by_keyboard_alone(page):
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.type"))
        if reached[-1] == "shares-maps":
            break
    assert {"shares-norm", "shares-shape", "shares-axis", "shares-groups", "radio"} <= {*reached}
    assert reached[-1] == "shares-maps"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    for key, expected in [
        ("ArrowRight", (0, 0, 1, 0)),
        ("ArrowDown", (0, 1, 1, 0)),
        ("Shift+ArrowRight", (0, 1, 1, 1)),
        ("Shift+ArrowDown", (1, 1, 1, 1)),
        ("PageDown", (1, 0, 0, 4)),
        ("PageUp", (1, 0, 0, 0)),
        ("ArrowLeft", (1, 0, 0, 0)),
        ("ArrowUp", (0, 4, 0, 0)),
        ("End", (3, 4, 4, 7)),
        ("Shift+ArrowDown", (3, 4, 4, 7)),
        ("Home", (0, 0, 0, 0)),
    ]:
        page.keyboard.press(key)
        assert element(page) == expected, key
    page.keyboard.press("PageDown")
    assert status(page) == "Element (0, 0, 0, 4) is in set 2 of 8, with 100 elements."


def test_sets_are_stepped_through(page):
    page.get_by_label("Groups").fill("4")
    told = []
    for _ in range(16):
        told.append(re.search(r"set (\d+) of 16", status(page))[1])
        page.get_by_role("button", name="Next set").click()
    assert told == [str(number) for number in range(1, 17)]
    assert element(page) == (0, 0, 0, 0)
    page.get_by_role("button", name="Previous set").click()
    assert status(page) == "Element (3, 0, 0, 6) is in set 16 of 16, with 50 elements."


def test_an_element_is_typed(page):
    page.get_by_label("W", exact=True).fill("3")
    page.get_by_label("C", exact=True).fill("7")
    assert element(page) == (0, 0, 3, 7)
    page.get_by_label("C", exact=True).fill("8")
    assert element(page) == (0, 0, 3, 7)
    page.get_by_label("C", exact=True).press("Enter")
    assert page.get_by_label("C", exact=True).input_value() == "7"


def test_the_address_holds_what_is_shown(page):
    page.get_by_label("Norm").select_option("layer norm")
    page.get_by_label("Axes of a set").fill("1, 2")
    page.get_by_label("Axes of a set").press("Enter")
    page.get_by_role("button", name="Next set").click()
    page.wait_for_url("**at=*")
    assert page.url.endswith("?norm=layer&shape=4,5,5,8&axis=1,2&at=0,0,0,1")
    before = status(page)
    page.reload()
    assert status(page) == before
    assert page.get_by_label("Axes of a set").input_value() == "1, 2"
    page.go_back()
    assert page.get_by_label("Axes of a set").input_value() == "-1"
    page.go_back()
    assert page.get_by_label("Norm").input_value() == "group"
    page.go_forward()
    assert page.get_by_label("Norm").input_value() == "layer"


def test_an_address_may_ask_for_an_error(page, address):
    page.goto(f"{address}?norm=group&shape=8,32&axis=-1&groups=3")
    assert "use 1, 2, 4, 8, 16 or 32" in page.get_by_role("alert").inner_text()
    page.goto(f"{address}?norm=nonsense&shape=<b>&at=9,9,9,9")
    assert page.get_by_role("alert").inner_text().startswith("shape '<b>' is no list of extents")
    page.goto(f"{address}?at=9,9,9,9")
    assert element(page) == (0, 0, 0, 0)


@pytest.mark.parametrize("clipboard", ["undefined", "{writeText: () => Promise.reject()}"])
def test_a_line_is_copied_without_a_clipboard_of_the_browser(page, clipboard):
    page.evaluate(f"Object.defineProperty(navigator, 'clipboard', {{value: {clipboard}}})")
    page.get_by_role("button", name="Copy the function").click()
    line = "normwise.ops.group_norm(x, gamma, beta, groups=2, axis=-1)"
    page.get_by_text(f"Copied: {line}").wait_for()
    page.get_by_label("Axis").press("Control+a")
    page.keyboard.press("Control+v")
    assert page.get_by_label("Axis").input_value() == line


def test_the_browsers_clipboard_is_used_where_there_is_one(page):
    page.evaluate(
        "Object.defineProperty(navigator, 'clipboard',"
        "{value: {writeText: async (text) => { globalThis.written = text; }}})"
    )
    page.get_by_role("button", name="Copy the layer").click()
    page.get_by_text("Copied: ").wait_for()
    assert page.evaluate("written") == "normwise.layers.GroupNormalization(groups=2, axis=-1)"


CONTROLS = "#shares :is(button, input:not([type=radio]), .shares-choice, select)"
BOXES = f"""() => [...document.querySelectorAll('{CONTROLS}')]
  .map((control) => control.getBoundingClientRect()).filter(({{width}}) => width > 0)
  .map(({{left, right, width, height}}) => [left, right, width, height])"""


def test_a_phone_shows_all_of_it(page):
    page.set_viewport_size({"width": 360, "height": 740})
    for rank in (2, 3, 4, 5):
        page.get_by_role("button", name=f"rank {rank}").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        boxes = page.evaluate(BOXES)
        assert len(boxes) >= 15
        for left, right, width, height in boxes:
            assert min(width, height) >= 24
            assert 0 <= left < right <= 360


def test_every_control_has_a_name(page):
    nameless = page.evaluate("""() => {
      const named = (control) => control.labels?.length || control.ariaLabel ||
        control.getAttribute('aria-labelledby') || control.textContent.trim();
      return [...document.querySelectorAll('#shares :is(button, input, select, [tabindex])')]
        .filter((control) => !named(control)).map((control) => control.id);
    }""")
    assert nameless == []


def test_without_javascript_the_page_says_what_it_would_do(chromium, address):
    page = chromium.new_page(java_script_enabled=False)
    page.goto(address)
    assert "normwise figure group" in page.locator("noscript").text_content()
    assert page.locator("#shares").is_hidden()
    page.close()

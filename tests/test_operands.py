"""Gamma and beta of each sample and element, an offset of gamma, a residual, and the statistics."""

import dataclasses
import functools
import itertools
import re

import keras
import numpy as np
import pytest
from frameworks import (
    BACKEND,
    assert_within,
    compiled,
    float64_enabled,
    gradients,
    second_gradients,
    to_numpy,
)
from reference import EPS, SMALLEST, Norm, group_labels, layer_labels

import normwise
from normwise import kernels, ops
from normwise.kernels import library

EPSILON = 1e-3
OFFSET = 0.75
MODES = ("auto", "composite")

needs_library = pytest.mark.skipif(library.path() is None, reason="the library was not built")


@dataclasses.dataclass(frozen=True)
class Case:
    """A norm of one shape, with the axes of gamma and beta."""

    op: callable
    shape: tuple
    axis: int | tuple = -1
    groups: int | None = None

    @property
    def options(self):
        groups = {"groups": self.groups} if self.op is ops.group_norm else {}
        return {"axis": self.axis, "epsilon": EPSILON, **groups}

    @property
    def axes(self):
        """The axes of gamma and beta."""
        rank = len(self.shape)
        if self.op is ops.filter_response_norm:
            return (rank - 1,)
        return tuple(sorted(int(a) % rank for a in np.ravel(self.axis)))

    @property
    def centred(self):
        return self.op not in (ops.rms_norm, ops.filter_response_norm)

    @functools.cached_property
    def labels(self):
        if self.op in (ops.layer_norm, ops.rms_norm):
            return layer_labels(self.shape, self.axes)
        channels = self.shape[self.axes[0]]
        return group_labels(self.shape, self.axes[0], self.groups or channels)

    def shape_of(self, lies):
        """The shape of a gamma or beta that lies so."""
        of_all = tuple(self.shape[a] for a in self.axes)
        shapes = {
            None: None,
            "shared": of_all,
            "sample": (self.shape[0], *of_all),
            # The same, as it broadcasts.
            "alike": tuple(n if a in (0, *self.axes) else 1 for a, n in enumerate(self.shape)),
            "element": self.shape,
            # One for each index of axis 1, whatever that is.
            "position": tuple(n if a == 1 else 1 for a, n in enumerate(self.shape)),
        }
        return shapes[lies]


CASES = {
    "rows": Case(ops.layer_norm, (2, 5, 6)),
    "rows of groups": Case(ops.group_norm, (3, 12), groups=3),
    "rows of two axes": Case(ops.layer_norm, (2, 2, 4, 6), (2, 3)),
    "kept": Case(ops.layer_norm, (2, 6, 5), 1),
    "columns": Case(ops.group_norm, (2, 5, 6), groups=3),
    "instance": Case(ops.instance_norm, (2, 6, 5), 1),
    "runs": Case(ops.group_norm, (2, 6, 5), 1, groups=3),
    "rms": Case(ops.rms_norm, (2, 5, 6)),
    "response": Case(ops.filter_response_norm, (2, 3, 4, 6), (1, 2)),
}

# How gamma and beta lie.
LIES = [
    ("sample", "sample"),
    ("sample", "shared"),
    ("shared", "sample"),
    (None, "sample"),
    ("alike", "alike"),
    ("element", "position"),
    ("position", "sample"),
    ("shared", "element"),
    ("shared", "shared"),
]

# What comes with them: a residual, statistics to return, an offset, an activation and a mask.
EXTRAS = [
    "residual",
    "residual statistics",
    "offset",
    "residual sigmoid",
    "statistics",
    "residual offset mask statistics",
    "sigmoid offset statistics",
    "",
    "mask residual",
]
# Each way to lie with other extras for each case.
COMBINATIONS = [
    pytest.param(name, lies, EXTRAS[(i + 2 * j) % len(EXTRAS)], id=f"{name}-{lies[0]}-{lies[1]}")
    for (i, name), (j, lies) in itertools.product(enumerate(CASES), enumerate(LIES))
]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case, its tensors, and what the reference says of them."""

    case: Case
    lies: tuple = ("sample", "sample")
    extras: str = "residual statistics"
    dtype: str = "float32"

    def has(self, extra):
        return extra in self.extras.split()

    @property
    def arithmetic(self):
        return "float64" if self.dtype == "float64" else "float32"

    @functools.cached_property
    def keep(self):
        keep = np.arange(np.prod(self.case.shape)).reshape(self.case.shape) % 4 != 1
        return keep if self.has("mask") else None

    @functools.cached_property
    def arrays(self):
        """x, gamma, beta and the residual that there are, in values of the dtype."""
        rng = np.random.default_rng(0)
        x, residual = rng.normal(2.0, 1.5, (2, *self.case.shape))
        found = {"x": self.rounded(x)}
        for name, lies in zip(("gamma", "beta"), self.lies, strict=True):
            if lies is not None:
                values = rng.uniform(0.5, 1.5, self.case.shape_of(lies))
                found[name] = values.astype(self.arithmetic)
        if self.has("residual"):
            found["residual"] = self.rounded(residual)
        return found

    def rounded(self, values):
        """Values of the dtype, as an array of the arithmetic's."""
        values = keras.ops.cast(np.asarray(values, self.arithmetic), self.dtype)
        return to_numpy(values).astype(self.arithmetic)

    @functools.cached_property
    def total(self):
        x = self.arrays["x"]
        return self.rounded(x + self.arrays["residual"]) if self.has("residual") else x

    def call(self, **tensors):
        """What the op returns, as a list."""
        tensors = {name: keras.ops.convert_to_tensor(each) for name, each in tensors.items()}
        for name in {"x", "residual"} & tensors.keys():
            tensors[name] = keras.ops.cast(tensors[name], self.dtype)
        found = self.case.op(
            **tensors,
            **self.case.options,
            gamma_offset=OFFSET if self.has("offset") else 0.0,
            activation="sigmoid" if self.has("sigmoid") else None,
            mask=self.keep,
            return_statistics=self.has("statistics"),
        )
        return list(found) if isinstance(found, tuple) else [found]

    def flat(self, *arrays):
        """All that the op returns in one vector of the arithmetic's dtype."""
        found = self.call(**dict(zip(self.arrays, arrays, strict=True)))
        parts = [keras.ops.reshape(keras.ops.cast(f, self.arithmetic), (-1,)) for f in found]
        return keras.ops.concatenate(parts)

    @functools.cached_property
    def sets(self):
        """The shape of the statistics."""
        if self.case.op in (ops.layer_norm, ops.rms_norm):
            inside = self.case.axes
        else:
            inside = [a for a in range(1, len(self.case.shape)) if a not in self.case.axes]
        return tuple(1 if a in inside else n for a, n in enumerate(self.case.shape))

    @functools.cached_property
    def shapes(self):
        """Of each result."""
        shapes = [self.case.shape] * (1 + self.has("residual"))
        return shapes + [self.sets] * (2 * self.has("statistics"))

    @functools.cached_property
    def cotangents(self):
        """Of each result that there is, by its name."""
        rng = np.random.default_rng(1)
        names = ["y"] + ["sum"] * self.has("residual")
        names += ["mean", "deviation"] * self.has("statistics")
        values = (self.rounded(rng.normal(size=shape)) for shape in self.shapes)
        return dict(zip(names, values, strict=True))

    @property
    def cotangent(self):
        """Of `flat`."""
        return np.concatenate([np.ravel(each) for each in self.cotangents.values()])

    def right(self, total=None, gamma=None, beta=None):
        offset = OFFSET if self.has("offset") and gamma is not None else None
        gamma = gamma if offset is None else np.float64(gamma) + offset
        axes, centred = self.case.axes, self.case.centred
        return Norm(total, gamma, beta, self.case.labels, axes, EPSILON, centred, self.keep)

    def reference(self):
        given = {name: self.arrays.get(name) for name in ("gamma", "beta")}
        return self.right(self.total, **given)

    def statistics(self, right):
        """The reference's mean and deviation, and their tolerances, in the shape of the sets."""
        cut = tuple(slice(0, n) for n in self.sets)
        tolerances = right.statistics_tolerances(EPS[self.arithmetic])
        return [each[cut] for each in (right.mean, right.deviation)], [t[cut] for t in tolerances]

    def results(self):
        """Each result's right values and their tolerances."""
        right, eps = self.reference(), EPS[self.arithmetic]
        tolerance = right.y_tolerance(eps)
        y = sigmoid(right.y) if self.has("sigmoid") else right.y
        # No slope of a sigmoid is more than 1. Its own roundings are a few.
        tolerance = tolerance + 8 * eps + self.lost * np.abs(y) + self.smallest
        found, tolerances = [y], [tolerance]
        if self.has("residual"):
            found, tolerances = [*found, self.total], [*tolerances, 0.0]
        if self.has("statistics"):
            of_sets, allowed = self.statistics(right)
            found, tolerances = [*found, *of_sets], [*tolerances, *allowed]
        return found, tolerances

    @property
    def lost(self):
        """A rounding of the dtype, where the arithmetic has another."""
        return 0.0 if self.dtype == self.arithmetic else 2 * EPS[self.dtype]

    @property
    def smallest(self):
        return 2 * SMALLEST[self.dtype]

    def slopes(self, right):
        """The right gradients by each array."""
        dy = self.cotangents["y"].astype("float64")
        y = sigmoid(right.y)
        dz = dy * y * (1 - y) if self.has("sigmoid") else dy
        of_sets = (self.cotangents.get(name, 0.0) for name in ("mean", "deviation"))
        dx, dgamma, dbeta = right.gradients(dz, *of_sets)
        dx = dx + self.cotangents.get("sum", 0.0)
        found = {"x": dx, "gamma": dgamma, "beta": dbeta, "residual": dx}
        return {name: found[name] for name in self.arrays}

    def allowed(self, right):
        dy, eps = self.cotangents["y"], EPS[self.arithmetic]
        of_sets = {f"d{n}": self.cotangents.get(n, 0.0) for n in ("mean", "deviation")}
        dx, dgamma, dbeta = right.gradient_tolerances(dy, eps, **of_sets)
        # The parts of dx are rounded each, and so are their sums.
        parts = dx / (32 * eps) + np.abs(self.cotangents.get("sum", 0.0))
        dx = dx + 4 * self.lost * parts + 2 * eps * parts + self.smallest
        found = {"x": dx, "gamma": dgamma, "beta": dbeta, "residual": dx}
        return {name: found[name] for name in self.arrays}

    def check(self):
        """Compare all results and all gradients with the reference."""
        flat, found = gradients(self.flat, list(self.arrays.values()), self.cotangent)
        ends = np.cumsum([np.prod(shape, dtype=int) for shape in self.shapes])[:-1]
        found_results = np.split(flat, ends)
        names = self.cotangents
        for name, f, shape, want, tolerance in zip(
            names, found_results, self.shapes, *self.results(), strict=True
        ):
            assert_within(f.reshape(shape), want, tolerance, name)
        right = self.reference()
        wanted, allowed = self.slopes(right), self.allowed(right)
        for name, f in zip(self.arrays, found, strict=True):
            assert_within(f, wanted[name], allowed[name], f"d{name}")


@pytest.mark.parametrize(("name", "lies", "extras"), COMBINATIONS)
def test_results_and_gradients(name, lies, extras):
    Problem(CASES[name], lies, extras).check()


@pytest.mark.parametrize("lies", LIES[:6], ids=map(str, LIES[:6]))
@pytest.mark.parametrize("name", ["rows", "kept", "columns", "runs"])
def test_results_and_gradients_of_the_composite(name, lies):
    extras = EXTRAS[(list(CASES).index(name) + LIES.index(lies)) % len(EXTRAS)]
    with normwise.use_kernels("composite"):
        Problem(CASES[name], lies, extras).check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", ["rows", "kept", "columns", "runs"])
def test_dtypes(name, dtype):
    with float64_enabled(dtype):
        Problem(CASES[name], dtype=dtype).check()


LONG = {
    "rows as runs": Case(ops.layer_norm, (2, 3, 5000)),
    "pieces with a gamma for each element": Case(ops.layer_norm, (2, 70_001)),
    "pieces of runs": Case(ops.group_norm, (2, 4, 70_001), 1, groups=2),
    "pieces of columns": Case(ops.group_norm, (2, 40_001, 4), groups=2),
    "tiles": Case(ops.layer_norm, (2, 6, 20_001), 1),
}


@needs_library
@pytest.mark.parametrize("name", LONG)
def test_long_sets(name):
    Problem(LONG[name], extras="residual offset").check()


def numbers(shape, seed=0, dtype="float32"):
    values = np.random.default_rng(seed).normal(2.0, 1.5, shape)
    return keras.ops.cast(values.astype("float32"), dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["rows", "kept", "columns", "runs"])
@pytest.mark.parametrize("make", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_a_residual_is_added_before_all_else(name, dtype, mode, make):
    """The result is that of the op on the sum that it returns, to the bit."""
    case = CASES[name]
    x, residual = (numbers(case.shape, seed, dtype) for seed in range(2))
    gamma = numbers(case.shape_of("sample"), 2)
    with normwise.use_kernels(mode):
        both = make(lambda x, r, gamma: case.op(x, gamma, residual=r, **case.options))
        y, total = both(x, residual, gamma)
        want = make(lambda x, gamma: case.op(x, gamma, **case.options))(total, gamma)
    rounded = keras.ops.cast(to_numpy(x) + to_numpy(residual), dtype)
    np.testing.assert_array_equal(to_numpy(total), to_numpy(rounded))
    np.testing.assert_array_equal(to_numpy(y), to_numpy(want))


@pytest.mark.parametrize("samples", [1, 3], ids=["one for all", "one for each"])
def test_what_broadcasts_as_a_parameter_is_one(samples):
    """Bit for bit, as only the same kernel gives it; else y is multiplied after it was rounded."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5, 7, 6)).astype("float32")
    gamma, beta = rng.normal(size=(2, samples, 6)).astype("float32")
    expected = ops.group_norm(x, *(p[0] if samples == 1 else p for p in (gamma, beta)), groups=3)
    spread = (p.reshape(samples, 1, 1, 6) for p in (gamma, beta))
    found = ops.group_norm(x, *spread, groups=3)
    np.testing.assert_array_equal(to_numpy(found), to_numpy(expected))


def test_an_offset_keeps_the_digits_of_a_small_gamma():
    """Added to gamma in bfloat16, as 1 + gamma, it would leave none of them."""
    case = CASES["rows"]
    x = to_numpy(numbers(case.shape, dtype="bfloat16"))
    gamma = keras.ops.cast(np.linspace(-1e-3, 1e-3, 6, dtype="float32"), "bfloat16")
    options = {"gamma_offset": 1, "dtype": "float32", **case.options}
    y = case.op(keras.ops.cast(x, "bfloat16"), gamma, **options)
    offset = 1 + to_numpy(gamma).astype("float64")
    right = Norm(x, offset, None, case.labels, case.axes, EPSILON)
    tolerance = right.y_tolerance(EPS["float32"])
    assert tolerance.max() < 1e-4 / 4
    assert_within(to_numpy(y), right.y, tolerance)


def results_and_slopes(problem, arrays):
    """All results and gradients of some samples."""
    rng = np.random.default_rng(3)
    shape = arrays[0].shape
    dy = rng.normal(size=problem.case.shape)[: shape[0]]

    def function(*arrays):
        tensors = dict(zip(problem.arrays, arrays, strict=True))
        return problem.case.op(**tensors, **problem.case.options)[0]

    y, found = gradients(function, arrays, dy.astype("float32"))
    return [y, *found]


ALONE = {
    **{name: CASES[name] for name in ("rows", "kept", "columns", "runs")},
    # So much that, of all samples together, rows are read from memory in other portions.
    "rows from memory": Case(ops.layer_norm, (2, 12_000, 256)),
    "pieces of columns": LONG["pieces of columns"],
}


@needs_library
@pytest.mark.parametrize("name", ALONE)
def test_a_sample_does_not_depend_on_its_batch(name):
    """Neither its results nor the gradients of its own gamma and beta, to the bit."""
    problem = Problem(ALONE[name], extras="residual")
    arrays = list(problem.arrays.values())
    together = results_and_slopes(problem, arrays)
    alone = results_and_slopes(problem, [a[:1] for a in arrays])
    for whole, one in zip(together, alone, strict=True):
        np.testing.assert_array_equal(whole[:1], one)


# Which of y and the sum has a cotangent, and which tensors ask for a gradient.
@pytest.mark.parametrize("used", ["y", "sum"])
@pytest.mark.parametrize("asked", [("x", "residual"), ("residual",), ("gamma", "residual")])
@pytest.mark.parametrize("mode", MODES)
def test_parts_of_the_results_and_of_the_gradients(used, asked, mode):
    problem = Problem(CASES["columns"], extras="residual")
    rest = {n: each for n, each in problem.arrays.items() if n not in asked}

    def function(*arrays):
        return problem.call(**rest, **dict(zip(asked, arrays, strict=True)))[used == "sum"]

    dy = problem.cotangents[used]
    with normwise.use_kernels(mode):
        _, found = gradients(function, [problem.arrays[name] for name in asked], dy)
    right = problem.reference()
    for name, f in zip(asked, found, strict=True):
        if used == "sum":
            want, allowed = (0.0 if name == "gamma" else dy), 0.0
        else:
            index = name == "gamma"
            want = right.gradients(dy)[index]
            allowed = right.gradient_tolerances(dy, EPS["float32"])[index]
        assert_within(f, np.broadcast_to(want, f.shape), allowed, f"d{name}")


def slopes_of_reference(problem, direction):
    """The gradients of sum(dx * direction), by finite differences of the reference's dx."""

    def slope(x, gamma, beta, residual):
        right = problem.right(x + residual, gamma, beta)
        return np.sum(problem.slopes(right)["x"] * direction)

    arrays, step, found = list(problem.arrays.values()), 1e-5, []
    for i, array in enumerate(arrays):
        differences = []
        for index in np.ndindex(array.shape):
            ends = []
            for move in (step, -step):
                moved = [a.copy() for a in arrays]
                moved[i][index] += move
                ends.append(slope(*moved))
            differences.append((ends[0] - ends[1]) / (2 * step))
        found.append(np.reshape(differences, array.shape))
    return found


@pytest.mark.parametrize(
    ("name", "lies", "extras"),
    [
        ("rows", ("sample", "sample"), "residual"),
        ("columns", ("sample", "shared"), "residual sigmoid offset statistics"),
        ("kept", ("element", "sample"), "residual statistics"),
        ("runs", ("sample", "sample"), "residual mask sigmoid"),
        ("rms", ("sample", "sample"), "residual statistics"),
    ],
)
def test_second_gradients(name, lies, extras):
    """In float64, against finite differences; those of a sum of 1e-5 steps keep 9 digits."""
    with float64_enabled():
        problem = Problem(CASES[name], lies, extras, "float64")
        direction = np.random.default_rng(4).normal(size=problem.case.shape)
        arrays = list(problem.arrays.values())
        found = second_gradients(problem.flat, arrays, problem.cotangent, direction)
        for f, want in zip(found, slopes_of_reference(problem, direction), strict=True):
            assert_within(f, want, 1e-6 * np.abs(want).max() + 1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("given", "other", "dtype", "summed", "result"),
    [
        ("int32", "float32", None, "float32", "float32"),
        ("bool", "bool", None, "float32", "float32"),
        ("uint8", "int32", "bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float32", None, "float16", "float16"),
        ("float32", "bfloat16", None, "float32", "float32"),
        ("bfloat16", "bfloat16", "float32", "bfloat16", "float32"),
        ("float32", "int32", "float16", "float32", "float16"),
    ],
)
def test_a_residual_of_another_dtype(given, other, dtype, summed, result, mode):
    """The sum is made in the wider dtype and rounded once to that of x, or of the result."""
    case = CASES["rows"]
    x, residual = (
        keras.ops.cast(to_numpy(numbers(case.shape, seed)).clip(0), kind)
        for seed, kind in enumerate((given, other))
    )
    options = {"dtype": dtype, **case.options}
    with normwise.use_kernels(mode):
        y, total = case.op(x, residual=residual, **options)
    found = [keras.backend.standardize_dtype(each.dtype) for each in (y, total)]
    assert found == [result, summed]
    want = sum(to_numpy(each).astype("float32") for each in (x, residual))
    want = to_numpy(keras.ops.cast(want, summed))
    np.testing.assert_array_equal(to_numpy(total), want)
    right = Norm(want, None, None, case.labels, case.axes, EPSILON)
    rounding = 0 if result == "float32" else EPS[result] * np.abs(right.y)
    assert_within(to_numpy(y), right.y, right.y_tolerance(EPS["float32"]) + rounding)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6)])
@pytest.mark.parametrize("op", [ops.instance_norm, ops.layer_norm])
def test_empty_inputs(op, shape, mode):
    """Nothing comes of them, and gradients of 0."""
    per_sample = (shape[0], 6)
    arrays = [np.zeros(shape, "float32"), *np.ones((2, *per_sample), "float32")]
    arrays.append(arrays[0])
    with normwise.use_kernels(mode):
        results = op(*arrays[:3], residual=arrays[3], return_statistics=True)
        _, found = gradients(
            lambda x, gamma, beta, r: op(x, gamma, beta, residual=r)[0], arrays, arrays[0]
        )
    y, total, *statistics = map(to_numpy, results)
    assert y.shape == total.shape == shape
    sets = (shape[0], 1, 6) if op is ops.instance_norm else (*shape[:2], 1)
    assert [each.shape for each in statistics] == [sets, sets]
    assert all(np.isfinite(each).all() for each in statistics)
    for f, array in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(f, np.zeros(array.shape))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "where"),
    [("rows", "x"), ("kept", "residual"), ("columns", "gamma"), ("runs", "beta"), ("runs", "x")],
)
def test_a_nan_stays_in_its_sample(name, where, mode):
    problem = Problem(CASES[name], extras="residual")
    arrays = {n: a.copy() for n, a in problem.arrays.items()}
    arrays[where][(0,) * arrays[where].ndim] = np.nan
    with normwise.use_kernels(mode):
        y, found = gradients(problem.flat, list(arrays.values()), problem.cotangent)
        want, wanted = gradients(problem.flat, list(problem.arrays.values()), problem.cotangent)
    y, want = (each.reshape(2, *problem.case.shape) for each in (y, want))
    assert np.isnan(y[:, 0]).any()
    for f, w in zip([*y, *found], [*want, *wanted], strict=True):
        assert_within(f[1], w[1], 1e-5 * (1 + np.abs(w[1])))


def test_statistics_alone():
    """Of an x that nobody wants normalized, with a mask or without, and of one set."""
    x, keep = to_numpy(numbers((2, 5, 6))), np.arange(10).reshape(2, 5) % 3 > 0
    found = ops.GroupNorm.statistics(x, keep, groups=3, axis=-1, epsilon=EPSILON)
    labels = group_labels(x.shape, 2, 3)
    right = Norm(x, None, None, labels, (2,), EPSILON, keep=keep[..., None])
    tolerances = right.statistics_tolerances(EPS["float32"])
    for f, want, allowed in zip(found, (right.mean, right.deviation), tolerances, strict=True):
        assert_within(to_numpy(f), want[:, :1], allowed[:, :1])
    mean, deviation = ops.RMSNorm.statistics(x, axis=-1, epsilon=0.0)
    assert_within(to_numpy(mean), np.zeros((2, 5, 1)), 0)
    root = np.sqrt(np.mean(np.float64(x) ** 2, -1, keepdims=True))
    assert_within(to_numpy(deviation), root, 16 * EPS["float32"] * root)


@pytest.mark.parametrize("name", ["rows", "columns", "rms"])
def test_statistics_normalize_what_they_are_of(name):
    """y is (x - mean) / deviation, and equal elements at epsilon 0 have a deviation of 0."""
    case = CASES[name]
    x = to_numpy(numbers(case.shape))
    y, mean, deviation = map(to_numpy, case.op(x, return_statistics=True, **case.options))
    assert_within((x - mean) / deviation, y.astype("float64"), 1e-5)
    options = {**case.options, "epsilon": 0.0}

    def summed(x):
        y, mean, deviation = case.op(x, return_statistics=True, **options)
        return keras.ops.sum(y) + keras.ops.sum(mean) + keras.ops.sum(deviation)

    equal = np.zeros(case.shape, "float32")
    total, (dx,) = gradients(summed, [equal], np.float32(1))
    assert_within(total, 0.0, 0)
    assert np.isfinite(dx).all()


def symbolic_model():
    """An op with all that may come with x, every tensor an input of the model."""
    x, residual = keras.Input((None, 6), name="x"), keras.Input((None, 6), name="residual")
    gamma, beta = keras.Input((6,), name="gamma"), keras.Input((1, 6), name="beta")
    mask = keras.Input((None,), dtype="bool", name="mask")
    options = {"groups": 3, "gamma_offset": 1.0, "activation": "silu", "return_statistics": True}
    results = ops.group_norm(x, gamma, beta, residual=residual, mask=mask, **options)
    sets = [(None, 1, 6)] * 2
    assert [r.shape for r in results] == [(None, None, 6), (None, None, 6), *sets]
    return keras.Model([x, residual, gamma, beta, mask], results)


def test_a_functional_model_saves_and_loads(tmp_path):
    model = symbolic_model()
    keep = np.arange(10).reshape(2, 5) % 3 > 0
    given = [numbers((2, 5, 6)), numbers((2, 5, 6), 1), numbers((2, 6), 2), numbers((2, 1, 6), 3)]
    given.append(keras.ops.convert_to_tensor(keep))
    found = list(map(to_numpy, model(given)))
    total = to_numpy(given[0]) + to_numpy(given[1])
    gamma, beta = 1 + to_numpy(given[2]), to_numpy(given[3])
    labels = group_labels((2, 5, 6), 2, 3)
    right = Norm(total, gamma, beta, labels, (2,), EPSILON, keep=keep[..., None])
    want = right.y * sigmoid(right.y)
    assert_within(found[0], want, 1.2 * right.y_tolerance(EPS["float32"]) + 1e-6)
    np.testing.assert_array_equal(found[1], total)
    assert_within(found[2], right.mean[:, :1], 1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for again, before in zip(loaded(given), found, strict=True):
        np.testing.assert_array_equal(to_numpy(again), before)


@pytest.mark.parametrize(
    ("given", "dtype", "summed"),
    [("int32", "float16", "float16"), ("float16", "float32", "float16"), ("bool", None, "float32")],
)
def test_symbols_have_the_dtypes_of_the_results(given, dtype, summed):
    x = keras.Input((5, 6), dtype=given)
    options = {"residual": x, "return_statistics": True, "dtype": dtype}
    results = ops.layer_norm(x, **options)
    assert [r.dtype for r in results] == [dtype or "float32", summed, "float32", "float32"]
    values = keras.ops.cast(to_numpy(numbers((2, 5, 6))).clip(0), given)
    eager = ops.layer_norm(values, **{**options, "residual": values})
    assert [keras.backend.standardize_dtype(e.dtype) for e in eager] == [r.dtype for r in results]


@needs_library
@pytest.mark.parametrize("op", [ops.group_norm, ops.layer_norm, ops.rms_norm])
def test_what_comes_with_x_is_explained(op):
    options = {"residual": True, "return_statistics": True, "gamma_offset": 1.0}
    with normwise.use_kernels("auto"):
        assert normwise.explain(op, (8, 16, 32), **options).kernel == "native"
        masked = normwise.explain(op, (8, 16, 32), mask=True, **options)
    assert ("native", "the native kernels take no mask") in masked.against


def raises(error, text):
    """The whole message; Keras wraps those of a symbolic call in its own lines."""
    return pytest.raises(error, match=rf"(^|\x1b\[1m){re.escape(text)}($|\x1b\[0m)")


X = np.ones((8, 4, 32), "float32")


@pytest.mark.parametrize("symbolic", [False, True], ids=["array", "symbolic"])
@pytest.mark.parametrize("shape", [(8, 4, 31), (4, 32), (1, 4, 32), (8, 4, 1), ()])
def test_a_residual_of_another_shape(shape, symbolic):
    residual = np.ones(shape, "float32")
    if symbolic:
        residual = keras.Input(batch_shape=shape)
    text = f"residual has shape {shape}, but it is added to x of shape (8, 4, 32); pass a tensor "
    text += "of that shape"
    for op in (ops.group_norm, ops.layer_norm):
        with raises(ValueError, text):
            op(X, residual=residual)


@pytest.mark.parametrize("name", ["gamma", "beta"])
@pytest.mark.parametrize("shape", [(7, 32), (8, 31), (8, 4), (8, 2, 32), (1, 8, 4, 32)])
def test_a_parameter_of_no_samples_or_elements(name, shape):
    text = f"{name} has shape {shape}, but axis [2] of shape (8, 4, 32) needs (32,), or (8, 32) for"
    text += " values of each sample's own"
    for op in (ops.group_norm, ops.layer_norm):
        with raises(ValueError, text):
            op(X, **{name: np.ones(shape, "float32")})


WITH_GAMMA = [{}, {"gamma": np.ones(32, "float32")}]


@pytest.mark.parametrize("given", WITH_GAMMA, ids=["", "gamma"])
@pytest.mark.parametrize("offset", ["1", None, True, False, [1.0], ""])
def test_an_offset_that_is_no_number(offset, given):
    text = f"gamma_offset={offset!r} is no number; expected a number, as in gamma_offset=1.0"
    for x in (X, keras.Input((4, 32))):
        with raises(TypeError, text):
            ops.layer_norm(x, gamma_offset=offset, **given)


@pytest.mark.parametrize("given", WITH_GAMMA, ids=["", "gamma"])
@pytest.mark.parametrize("offset", [np.nan, np.inf, -np.inf])
def test_an_offset_that_is_not_finite(offset, given):
    text = f"gamma_offset={offset} cannot be added to gamma; expected a number, as in "
    for x in (X, keras.Input((4, 32))):
        with raises(ValueError, text + "gamma_offset=1.0"):
            ops.layer_norm(x, gamma_offset=offset, **given)


def test_a_complex_residual():
    text = "residual has dtype complex64, and no norm is defined on complex numbers; normalize its "
    for x in (X, keras.Input(batch_shape=X.shape)):
        with raises(TypeError, text + "real and imaginary parts, or its modulus"):
            ops.layer_norm(x, residual=keras.ops.convert_to_tensor(X.astype("complex64")))


def half_of_it(norm, x, gamma, beta, y, statistics):
    """A forward pass that adds nothing: what is normalized is x."""
    assert norm.operands.residual is None
    y[...] = x / 2


def test_an_engine_that_does_not_add_gets_the_sum():
    engine = kernels.Engine("half", lambda norm: None, half_of_it, None)
    x, residual = (numbers((2, 5, 6), seed) for seed in range(2))
    with normwise.use_kernels("auto"):
        kernels.add(engine)
        try:
            y, total, mean, _ = ops.layer_norm(x, residual=residual, return_statistics=True)
        finally:
            kernels.remove("half")
    want = to_numpy(x) + to_numpy(residual)
    np.testing.assert_array_equal(to_numpy(total), want)
    np.testing.assert_array_equal(to_numpy(y), want / 2)
    assert_within(to_numpy(mean), want.mean(-1, keepdims=True), 1e-6)


# Compiled with jit_compile, which has Keras's own operations alone, or not.
@pytest.mark.skipif(BACKEND != "tensorflow", reason="extents unknown to the graph")
@pytest.mark.parametrize("way", ["native", "composite", "xla"])
@pytest.mark.parametrize("per", ["gamma", "element", "residual"])
def test_tensors_of_another_batch_are_an_error_of_the_graph(per, way):
    """Not a wrong read, nor a batch of 1 that is broadcast, nor a larger result than x."""
    import tensorflow as tf

    def function(x, other):
        if per == "residual":
            return ops.instance_norm(x, residual=other)[0]
        return ops.instance_norm(x, other)

    spec = {"gamma": [None, 6], "element": [None, None, 6], "residual": [None, None, 6]}[per]
    with normwise.use_kernels("composite" if way == "composite" else "auto"):
        signature = [tf.TensorSpec([None, None, 6]), tf.TensorSpec(spec)]
        graph = tf.function(
            function, input_signature=signature, jit_compile=way == "xla", autograph=False
        )
        for batch in (1, 3):
            x, other = numbers((batch, 5, 6)), numbers((batch, *[5, 6][len(spec) == 2 :]), 1)
            assert_within(graph(x, other), to_numpy(function(x, other)), 1e-5)
        for batch, others in [(3, 2), (1, 3), (3, 0), *([(3, 1)] if per != "element" else [])]:
            x, other = numbers((batch, 5, 6)), numbers((others, *[5, 6][len(spec) == 2 :]), 1)
            with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
                graph(x, other)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA on TensorFlow")
@pytest.mark.parametrize("name", ["rows", "columns"])
def test_xla_rounds_the_sum_that_it_normalizes(name):
    import tensorflow as tf

    case = CASES[name]
    x, residual = (numbers(case.shape, seed, "bfloat16") for seed in range(2))
    options = {**case.options, "dtype": "float32"}

    @tf.function(jit_compile=True, autograph=False)
    def both(x, residual):
        with tf.GradientTape() as tape:
            tape.watch(residual)
            y, total = case.op(x, residual=residual, **options)
            loss = tf.reduce_sum(y * x32)
        return y, total, tape.gradient(loss, residual)

    x32 = tf.cast(x, "float32")
    y, total, slope = both(x, residual)
    right = Norm(to_numpy(total), None, None, case.labels, case.axes, EPSILON)
    assert_within(y, right.y, right.y_tolerance(EPS["float32"]))
    want, allowed = right.gradients(x32)[0], right.gradient_tolerances(x32, EPS["float32"])[0]
    rounding = 2 * EPS["bfloat16"] * np.abs(want)
    assert_within(to_numpy(slope), want, allowed + rounding)

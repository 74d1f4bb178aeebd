"""The numerics contract, on the ops, against the float64 reference."""

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
from hypothesis import given
from hypothesis import strategies as st
from reference import EPS, SMALLEST, Norm, group_labels, layer_labels

from normwise import ops
from normwise.kernels import library

OPS = {
    "group": ops.group_norm,
    "instance": ops.instance_norm,
    "layer": ops.layer_norm,
    "rms": ops.rms_norm,
}


class Problem:
    """One call of an op, and what the reference says of it."""

    def __init__(self, norm, shape, axes=(-1,), groups=1, dtype="float32", epsilon=1e-3):
        self.norm, self.shape, self.dtype, self.epsilon = norm, shape, dtype, epsilon
        self.axes = tuple(a % len(shape) for a in axes)
        self.options = {"axis": list(axes) if len(axes) > 1 else axes[0], "epsilon": epsilon}
        if norm == "group":
            self.options["groups"] = groups
        if norm in ("group", "instance"):
            groups = groups if norm == "group" else shape[self.axes[0]]
            self.labels = group_labels(shape, self.axes[0], groups)
        else:
            self.labels = layer_labels(shape, self.axes)
        self.span = tuple(shape[a] for a in sorted(self.axes))
        self.mask = None

    def __repr__(self):
        masked = "" if self.mask is None else f" mask {self.mask.shape}"
        return f"{self.norm}{self.shape} {self.options} {self.dtype}{masked}"

    def fill(self, seed, mean=0.0, std=1.0, affine=True):
        """Give the problem its data, exactly representable in its dtype."""
        rng = np.random.default_rng(seed)
        self.x = self._round(rng.normal(mean, std, self.shape))
        self.dy = self._round(rng.normal(size=self.shape))
        # In the dtype of the arithmetic, to which their gradients are rounded.
        arithmetic = "float64" if self.dtype == "float64" else "float32"
        self.parameters = [rng.normal(size=self.span).astype(arithmetic) for _ in "gb"]
        if not affine:
            self.parameters = []
        return self

    def _round(self, values):
        if self.dtype == "bfloat16":
            # Of float32 the upper half; the reference needs the values that the op will see.
            bits = np.asarray(values, "float32").view("uint32") & 0xFFFF0000
            return bits.view("float32")
        return np.asarray(values, self.dtype)

    def call(self, x, *parameters):
        return OPS[self.norm](x, *parameters, mask=self.mask, **self.options)

    def expected(self):
        keep = self.mask
        if keep is not None:
            keep = keep.reshape(keep.shape + (1,) * (len(self.shape) - keep.ndim))
        parameters = self.parameters or (None, None)
        centred = self.norm != "rms"
        return Norm(self.x, *parameters, self.labels, self.axes, self.epsilon, centred, keep)

    def check(self):
        """Output and every gradient within the derived tolerance."""
        expected = self.expected()
        arrays = [keras.ops.cast(self.x, self.dtype), *self.parameters]
        y, found = gradients(self.call, arrays, self.dy)
        # The arithmetic is in float32 or better; a half result is rounded once at the end.
        eps, rounding = EPS["float64" if self.dtype == "float64" else "float32"], EPS[self.dtype]
        self.within(y, expected.y, expected.y_tolerance(eps), rounding, "y")
        wanted = expected.gradients(self.dy)
        tolerances = expected.gradient_tolerances(self.dy, eps)
        for name, g, w, t in zip(
            ("dx", "dgamma", "dbeta"), found, wanted, tolerances, strict=False
        ):
            self.within(g, w, t, rounding if name == "dx" else 0, name)
        return y

    def within(self, found, expected, tolerance, rounding, name):
        tolerance = tolerance + 2 * rounding * np.abs(expected) + SMALLEST[self.dtype]
        assert_within(found, expected, tolerance, f"{self!r} {name}")


@st.composite
def problems(draw, dtypes=tuple(EPS)):
    """Any norm on any small shape, axis, dtype, mask, mean and deviation."""
    norm = draw(st.sampled_from(sorted(OPS)))
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=2, max_size=5)))
    rank = len(shape)
    if norm in ("group", "instance"):
        axes = (draw(st.integers(1, rank - 1)),)
    else:
        axes = tuple(draw(st.lists(st.integers(0, rank - 1), min_size=1, unique=True)))
    channels = shape[axes[0]]
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    axes = tuple(a - rank if draw(st.booleans()) else a for a in axes)
    problem = Problem(norm, shape, axes, groups, draw(st.sampled_from(dtypes)))
    seed = draw(st.integers(0, 2**16))
    mean, std = draw(st.sampled_from([0.0, 3.0, 100.0])), draw(st.sampled_from([0.1, 1.0, 10.0]))
    problem.fill(seed, mean, std, affine=draw(st.booleans()))
    if draw(st.booleans()):
        covered = shape[: draw(st.integers(1, rank))]
        problem.mask = np.random.default_rng(seed + 1).random(covered) > 0.4
    return problem


@given(problems())
def test_any_norm_on_any_input(problem):
    with float64_enabled(problem.dtype):
        problem.check()


@given(problems(dtypes=("float64",)))
def test_second_gradients_of_any_norm(problem):
    with float64_enabled("float64"):
        direction = np.random.default_rng(2).normal(size=problem.shape)
        arrays = [problem.x, *(p.astype("float64") for p in problem.parameters)]
        found = second_gradients(problem.call, arrays, problem.dy, direction)
        # dx as a function of x has a slope, and the reference knows dx. Of the two slopes, whose
        # errors are as the squares of their steps, the fourfold and the single one cancel them.
        x, step = problem.x, 1e-5
        ends = []
        for h in (step / 2, -step / 2, step, -step):
            problem.x = x + h * direction
            ends.append(problem.expected().gradients(problem.dy)[0])
        # sum(dx * v) has by x the gradient H v, and H is symmetric.
        wanted = (4 * (ends[0] - ends[1]) / step - (ends[2] - ends[3]) / (2 * step)) / 3
        scale = 1 + np.abs(ends).max() / min(1.0, np.abs(x).std() + 1e-2)
        assert_within(found[0], wanted, 1e-4 * scale, f"{problem!r} second gradient")


# Where the vectors of a CPU end: 8, 16 and 32 elements, and one more or less.
EDGES = [1, 15, 16, 17, 31, 33]


@pytest.mark.parametrize("norm", OPS)
@pytest.mark.parametrize("extent", EDGES)
def test_vector_edges(norm, extent):
    Problem(norm, (2, 5, extent), groups=1).fill(0, mean=2.0).check()
    Problem(norm, (2, extent, 5), axes=(1,), groups=extent).fill(1, mean=2.0).check()
    Problem(norm, (2, extent, 3, 32), groups=8).fill(2, mean=2.0).check()


@pytest.mark.parametrize("mean", [1e2, 3e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("norm", OPS)
def test_offset(norm, mean):
    for shape, axes in (((4, 13, 11, 64), (-1,)), ((4, 6, 13, 11), (1,)), ((4, 300, 6), (-1,))):
        y = Problem(norm, shape, axes, groups=2).fill(3, mean).check()
        if mean == 1e4 and norm != "rms":
            expected = Problem(norm, shape, axes, groups=2).fill(3, mean).expected()
            assert_within(y, expected.y, 1e-2, f"{norm} at mean 1e4")


@pytest.mark.parametrize("outlier", [30.0, 1e3, -1e5])
@pytest.mark.parametrize("extent", [10, 60, 250])
@pytest.mark.parametrize("norm", OPS)
def test_a_first_element_far_from_the_others(norm, extent, outlier):
    """The sums are shifted by what the first elements say, and here that is little."""
    if library.path() is None:
        pytest.skip("the composite's bound is larger, see docs/numerics.md")
    problem = Problem(norm, (2, extent, extent), groups=extent // 5).fill(seed=9)
    problem.x[:, :1] = problem.x[..., :1] = outlier
    problem.check()


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567, -1e4, 1e6, 1e12])
@pytest.mark.parametrize("norm", ["group", "instance", "layer"])
@pytest.mark.parametrize("epsilon", [1e-3, 0.0])
def test_equal_elements_give_beta(norm, value, epsilon):
    for shape in ((2, 37, 53, 6), (2, 37, 5, 64)):
        problem = Problem(norm, shape, groups=2, epsilon=epsilon).fill(4)
        problem.x = np.full(shape, value, "float32")
        gamma, beta = problem.parameters
        y = to_numpy(problem.call(problem.x, gamma, beta))
        # The rounding of the last addition; torch's group norm is given x - mean, and leaves what
        # the rounding of the mean leaves of x, times eps.
        tolerance = 2 * EPS["float32"] * np.abs(beta) + 1e-9 * abs(value) * (BACKEND == "torch")
        assert_within(y, np.broadcast_to(beta, shape), tolerance, repr(problem))


def test_equal_elements_have_finite_gradients():
    for norm in OPS:
        for epsilon in (1e-3, 0.0):
            problem = Problem(norm, (2, 5, 6), groups=2, epsilon=epsilon).fill(5)
            problem.x = np.full(problem.shape, 0.0 if norm == "rms" else 7.0, "float32")
            problem.check()


@pytest.mark.parametrize("shape", [(0, 4, 4, 6), (2, 0, 4, 6), (2, 0, 0, 6), (0, 0, 6)])
@pytest.mark.parametrize("norm", OPS)
@pytest.mark.parametrize("masked", [False, True])
def test_empty_inputs(norm, shape, masked):
    problem = Problem(norm, shape, groups=3).fill(6)
    if masked:
        problem.mask = np.zeros(shape[:2], bool)
    y, (dx, dgamma, dbeta) = gradients(problem.call, [problem.x, *problem.parameters], problem.dy)
    assert y.shape == dx.shape == shape
    assert_within(dgamma, np.zeros(6), 0, "dgamma")
    assert_within(dbeta, np.zeros(6), 0, "dbeta")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("norm", OPS)
def test_bad_values_stay_in_their_set(norm, bad):
    for shape in ((3, 7, 5, 6), (3, 7, 5, 64)):
        problem = Problem(norm, shape, groups=2).fill(7)
        clean, _ = gradients(problem.call, [problem.x, *problem.parameters], problem.dy)
        problem.x[1, 2, 3, 0] = bad
        y, (dx, *_) = gradients(problem.call, [problem.x, *problem.parameters], problem.dy)
        hit = problem.labels == problem.labels[1, 2, 3, 0]
        assert np.isnan(y[1, 2, 3, 0])
        assert np.isfinite(dx[~hit]).all()
        np.testing.assert_array_equal(y[~hit], clean[~hit])


@pytest.mark.parametrize("norm", OPS)
def test_masked_values_reach_nothing(norm):
    problem = Problem(norm, (3, 7, 6), groups=2).fill(8)
    problem.mask = np.random.default_rng(9).random((3, 7)) > 0.4
    problem.mask[2] = False
    clean, (clean_dx, *_) = gradients(
        problem.call, [problem.x, *problem.parameters], problem.dy * problem.mask[..., None]
    )
    problem.x[~problem.mask] = np.nan
    y, (dx, *_) = gradients(
        problem.call, [problem.x, *problem.parameters], problem.dy * problem.mask[..., None]
    )
    np.testing.assert_array_equal(y[problem.mask], clean[problem.mask])
    np.testing.assert_array_equal(dx[problem.mask], clean_dx[problem.mask])


@pytest.mark.parametrize("norm", OPS)
def test_a_full_mask_changes_nothing(norm):
    problem = Problem(norm, (3, 7, 6), groups=2).fill(10, mean=5.0)
    without = to_numpy(problem.call(problem.x, *problem.parameters))
    problem.mask = np.ones((3, 7), bool)
    expected = problem.expected()
    assert_within(
        to_numpy(problem.call(problem.x, *problem.parameters)),
        without,
        expected.y_tolerance(EPS["float32"]),
        norm,
    )


@pytest.mark.parametrize("norm", OPS)
@pytest.mark.parametrize("shape", [(6, 9, 7, 6), (6, 33, 31, 64)])
def test_a_sample_does_not_depend_on_its_batch(norm, shape):
    problem = Problem(norm, shape, groups=2).fill(11, mean=50.0)
    run = compiled(problem.call)
    whole = to_numpy(run(keras.ops.convert_to_tensor(problem.x), *problem.parameters))
    tolerance = problem.expected().y_tolerance(EPS["float32"], units=4)
    for sample in (0, 3):
        part = keras.ops.convert_to_tensor(problem.x[sample : sample + 1])
        alone = to_numpy(run(part, *problem.parameters))
        assert_within(alone, whole[sample : sample + 1], tolerance[sample : sample + 1], norm)


@pytest.mark.skipif(BACKEND != "torch", reason="only torch lets a program set its threads")
@pytest.mark.parametrize("norm", OPS)
def test_threads_do_not_matter(norm):
    import torch

    problem = Problem(norm, (2, 65, 63, 64), groups=8).fill(12, mean=50.0)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(to_numpy(problem.call(problem.x, *problem.parameters)))
    finally:
        torch.set_num_threads(threads)
    tolerance = problem.expected().y_tolerance(EPS["float32"], units=4)
    for other in results[1:]:
        assert_within(other, results[0], tolerance, norm)


@pytest.mark.parametrize("norm", OPS)
@pytest.mark.parametrize("given_dtype", ["int8", "uint8", "int32", "int64", "bool"])
def test_integers_are_never_truncated(norm, given_dtype):
    problem = Problem(norm, (3, 5, 6), groups=2).fill(13, mean=50.0, std=20.0)
    integers = problem.x.astype(given_dtype)
    y = problem.call(integers, *problem.parameters)
    assert keras.backend.standardize_dtype(y.dtype) == "float32"
    problem.x = integers.astype("float32")
    expected = problem.expected()
    assert_within(to_numpy(y), expected.y, expected.y_tolerance(EPS["float32"]), norm)


@pytest.mark.parametrize("norm", OPS)
@pytest.mark.parametrize("magnitude", [1e-20, 1e-6, 1e6, 1e12])
def test_magnitudes(norm, magnitude):
    problem = Problem(norm, (3, 40, 6), groups=2).fill(14, mean=0.0, std=magnitude)
    problem.check()


def test_float16_statistics_do_not_overflow():
    problem = Problem("group", (2, 40, 6), groups=2, dtype="float16").fill(15, 0.0, 20000.0)
    problem.check()

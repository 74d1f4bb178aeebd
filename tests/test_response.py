"""Filter response norm as a function, against float64, and which kernel runs it."""

import dataclasses

import keras
import numpy as np
import pytest
from frameworks import (
    assert_within,
    float64_enabled,
    gradients,
    second_gradients,
    to_numpy,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from norms import samples
from reference import EPS, SMALLEST, Norm, group_labels

import normwise
from normwise import geometry, ops
from normwise.dispatch import Choice
from normwise.kernels import library
from normwise.layers import FilterResponseNormalization

# Of the profile in force; on JAX each costs a compilation.
EXAMPLES = settings.default.max_examples
NATIVE = Choice("native", "the native kernels can take it")

with_library = pytest.mark.skipif(library.path() is None, reason="the native library was not built")


@dataclasses.dataclass
class Problem:
    """One call of the op, and what the reference says of it."""

    shape: tuple[int, ...]
    channel: int
    axis: list[int] | None = None
    dtype: str = "float32"
    epsilon: float = 1e-6
    learned: float | None = None
    affine: bool = True
    mask: np.ndarray | None = None
    mean: float = 1.0
    std: float = 2.0
    seed: int = 0

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        if self.axis is None:
            self.axis = [a for a in range(1, len(self.shape)) if a != self.channel]
        x, dy = rng.normal(self.mean, self.std, self.shape), rng.normal(size=self.shape)
        # Rounded to the dtype, so that the op and the reference see the same.
        self.x, self.dy = (to_numpy(keras.ops.cast(a, self.dtype)) for a in (x, dy))
        self.arithmetic = "float64" if self.dtype == "float64" else "float32"
        channels = self.shape[self.channel]
        parameters = [rng.normal(size=channels) for _ in "gb"] if self.affine else []
        if self.learned is not None:
            parameters.append(np.full(1, self.learned))
        self.parameters = [p.astype(self.arithmetic) for p in parameters]

    def named(self, parameters):
        """Gamma, beta and the learned epsilon, None where the problem has none."""
        *affine, learned = (*parameters, None) if self.learned is None else parameters
        return *(affine or (None, None)), learned

    def call(self, x, *parameters):
        gamma, beta, learned = self.named(parameters)
        options = {"axis": self.axis, "epsilon": self.epsilon, "mask": self.mask}
        return ops.filter_response_norm(x, gamma, beta, learned_epsilon=learned, **options)

    def right(self, x, *parameters):
        gamma, beta, learned = self.named(parameters)
        epsilon = self.epsilon + (0 if learned is None else abs(float(learned[0])))
        labels = group_labels(self.shape, self.channel, self.shape[self.channel])
        keep = self.mask
        if keep is not None:
            keep = keep.reshape(keep.shape + (1,) * (len(self.shape) - keep.ndim))
        return Norm(x, gamma, beta, labels, (self.channel,), epsilon, False, keep)

    def slopes(self, right):
        """The gradients by x and every parameter, and their tolerances."""
        eps = EPS[self.arithmetic]
        dx, dgamma, dbeta = right.gradients(self.dy)
        allowed = right.gradient_tolerances(self.dy, eps)
        wanted, allowed = [dx, dgamma, dbeta], [*allowed]
        if not self.affine:
            wanted, allowed = wanted[:1], allowed[:1]
        if self.learned is not None:
            # y = scale * x * (v + e)^(-1/2) + beta has dy/de = -1/2 * scale * x * (v + e)^(-3/2).
            terms = -0.5 * self.dy * right.scale * right.normalized * right.inv_std**2
            wanted.append([np.sign(self.learned) * terms.sum()])
            roundings = 32 + np.sqrt(terms.size)
            allowed.append([eps * roundings * np.abs(terms).sum()])
        return wanted, allowed

    def check(self):
        """Output and every gradient within the derived tolerance."""
        right = self.right(self.x, *self.parameters)
        arrays = [keras.ops.cast(self.x, self.dtype), *self.parameters]
        y, (dx, *rest) = gradients(self.call, arrays, self.dy)
        # A half result is rounded once at the end.
        rounding = EPS[self.dtype]
        allowed = right.y_tolerance(EPS[self.arithmetic]) + SMALLEST[self.dtype]
        assert_within(y, right.y, allowed + 2 * rounding * np.abs(right.y), f"{self} y")
        (wanted, *others), (allowed, *tolerances) = self.slopes(right)
        allowed = allowed + 2 * rounding * np.abs(wanted) + SMALLEST[self.dtype]
        assert_within(dx, wanted, allowed, f"{self} dx")
        for found, want, allow in zip(rest, others, tolerances, strict=True):
            assert_within(found, want, allow, f"{self} parameter")
        return y


@st.composite
def problems(draw, dtypes=tuple(EPS)):
    """Arguments of any problem: rank, axes in any order and sign, dtype, mask, epsilons."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=2, max_size=5)))
    rank = len(shape)
    channel = draw(st.integers(1, rank - 1))
    axis = draw(st.permutations([a for a in range(1, rank) if a != channel]))
    axis = [a - rank if draw(st.booleans()) else a for a in axis]
    seed, mask = draw(st.integers(0, 2**16)), None
    if draw(st.booleans()):
        mask = np.random.default_rng(seed).random(shape[: draw(st.integers(1, rank))]) > 0.4
    return {
        "shape": shape,
        "channel": channel,
        "axis": axis,
        "dtype": draw(st.sampled_from(dtypes)),
        "epsilon": draw(st.sampled_from([1e-6, 1e-2])),
        "learned": draw(st.sampled_from([None, 0.3, -0.3])),
        "affine": draw(st.booleans()),
        "mask": mask,
        "mean": draw(st.sampled_from([0.0, 100.0])),
        "seed": seed,
    }


@settings(max_examples=EXAMPLES // 3)
@given(problems())
def test_any_call(arguments):
    with float64_enabled(arguments["dtype"]):
        Problem(**arguments).check()


@settings(max_examples=EXAMPLES // 10)
@given(problems(dtypes=("float64",)))
def test_second_gradients_of_any_call(arguments):
    """By x and every parameter, against finite differences of the reference's dx."""
    with float64_enabled("float64"):
        problem = Problem(**arguments)
        arrays = [problem.x, *problem.parameters]
        direction = np.random.default_rng(1).normal(size=problem.shape)
        found = second_gradients(problem.call, arrays, problem.dy, direction)

        def slope(moved, array, step):
            arrays[moved] = array + step
            dx = problem.right(*arrays).gradients(problem.dy)[0]
            arrays[moved] = array
            return np.sum(dx * direction)

        for i, array in enumerate(list(arrays)):
            # Along one direction: the reference is slow, and any error would show in it.
            way = np.random.default_rng(i).normal(size=array.shape)
            want = (slope(i, array, 1e-5 * way) - slope(i, array, -1e-5 * way)) / 2e-5
            scale = 1 + np.sum(np.abs(found[i] * way))
            assert_within(np.sum(found[i] * way), want, 1e-4 * scale, f"{problem} argument {i}")


@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6), (2, 6, None, 5), (None, 3, 6, 4)])
def test_the_geometry_is_that_of_instance_norm(shape):
    rank, channel = len(shape), shape.index(6)
    axes = [a - rank for a in range(1, rank) if a != channel]
    assert geometry.response(shape, axes) == geometry.group(shape, channel, geometry.INSTANCE)


# Where the vectors of a CPU end.
@pytest.mark.parametrize("extent", [1, 15, 16, 17, 33])
def test_vector_edges(extent):
    for shape, channel in [((2, 5, extent), 2), ((2, extent, 5), 1), ((2, 3, extent, 33), 1)]:
        Problem(shape, channel).check()


@with_library
@pytest.mark.parametrize(
    ("shape", "channel"), [((2, 70, 60, 6), 3), ((2, 6, 70, 60), 1), ((2, 9, 6, 33), 2)]
)
@pytest.mark.parametrize("dtype", EPS)
def test_the_native_kernels_are_right(shape, channel, dtype):
    with float64_enabled(dtype), normwise.use_kernels("native"):
        Problem(shape, channel, dtype=dtype).check()


@pytest.mark.parametrize("epsilon", [1e-6, 0.0])
@pytest.mark.parametrize("learned", [None, 0.0])
def test_zeros_give_beta_and_finite_gradients(epsilon, learned):
    problem = Problem((2, 5, 6), 2, epsilon=epsilon, learned=learned)
    problem.x[0] = 0
    y, slopes = gradients(problem.call, [problem.x, *problem.parameters], problem.dy)
    np.testing.assert_array_equal(y[0], np.broadcast_to(problem.parameters[1], (5, 6)))
    assert all(np.isfinite(slope).all() for slope in slopes)


@pytest.mark.parametrize("shape", [(0, 4, 4, 6), (2, 0, 4, 6), (0, 6)])
@pytest.mark.parametrize("learned", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_empty_inputs(shape, learned, masked):
    mask = np.zeros(shape[:2], bool) if masked else None
    problem = Problem(shape, len(shape) - 1, learned=learned, mask=mask)
    y, (dx, *rest) = gradients(problem.call, [problem.x, *problem.parameters], problem.dy)
    assert y.shape == dx.shape == shape
    for slope in rest:
        assert_within(slope, np.zeros(slope.shape), 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("learned", [None, 0.3])
@pytest.mark.parametrize(("shape", "channel"), [((3, 7, 5, 6), 3), ((3, 6, 7, 5), 1)])
def test_bad_values_stay_in_their_set(bad, learned, shape, channel):
    problem = Problem(shape, channel, learned=learned)
    clean, _ = gradients(problem.call, [problem.x, *problem.parameters], problem.dy)
    problem.x[1, 2, 3, 4] = bad
    y, (dx, *_) = gradients(problem.call, [problem.x, *problem.parameters], problem.dy)
    labels = group_labels(shape, channel, 6)
    hit = labels == labels[1, 2, 3, 4]
    assert np.isnan(y[1, 2, 3, 4])
    assert np.isfinite(dx[~hit]).all()
    np.testing.assert_array_equal(y[~hit], clean[~hit])


def test_masked_values_reach_nothing_that_is_kept():
    keep = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 1, 0]], bool)
    problem = Problem((2, 5, 6), 2, learned=0.3, mask=keep)
    problem.dy[~keep] = 0
    clean_y, clean = gradients(problem.call, [problem.x, *problem.parameters], problem.dy)
    problem.x[~keep] = np.nan
    y, found = gradients(problem.call, [problem.x, *problem.parameters], problem.dy)
    np.testing.assert_array_equal(y[keep], clean_y[keep])
    np.testing.assert_array_equal(found[0][keep], clean[0][keep])
    for slope, want in zip(found[1:], clean[1:], strict=True):
        assert_within(slope, want, 1e-5)


def test_an_unlearned_call_is_instance_norm_of_what_has_no_mean():
    x = samples()
    x = np.concatenate([x, -x], axis=1)
    found = ops.filter_response_norm(x, axis=1)
    assert_within(to_numpy(found), to_numpy(ops.instance_norm(x, epsilon=1e-6)), 1e-5)


def test_without_positions_it_is_the_sign_softened():
    x = samples((2, 6))
    found = ops.filter_response_norm(x, axis=[], learned_epsilon=4.0)
    assert_within(to_numpy(found), x / np.sqrt(x**2 + 4), 1e-5)


@pytest.mark.parametrize("learned", [np.float32(0.3), np.float32([0.3]), 0.3, [0.3]])
def test_a_learned_epsilon_of_either_shape(learned):
    fixed = ops.filter_response_norm(samples(), axis=1, epsilon=0.31)
    found = ops.filter_response_norm(samples(), axis=1, epsilon=0.01, learned_epsilon=learned)
    assert_within(to_numpy(found), to_numpy(fixed), 1e-6)


@pytest.mark.parametrize("symbolic", [False, True], ids=["constant", "symbolic"])
def test_symbolic_tensors_save_and_load(tmp_path, symbolic):
    problem = Problem((2, 5, 6), 2, learned=0.3)
    x = keras.Input((None, 6))
    inputs, parameters = [x], problem.parameters
    if symbolic:
        parameters = [keras.Input(batch_shape=p.shape) for p in parameters]
        inputs += parameters
    y = problem.call(x, *parameters)
    assert y.shape == (None, None, 6)
    model = keras.Model(inputs, y)
    arrays = [problem.x, *problem.parameters][: len(inputs)]
    arrays = [keras.ops.convert_to_tensor(a) for a in arrays]
    found = to_numpy(model(arrays))
    right = problem.right(problem.x, *problem.parameters)
    assert_within(found, right.y, right.y_tolerance(EPS["float32"]))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(arrays)), found)


@with_library
def test_explain():
    shape, reason = (2, 5, 4, 6), "the native kernels take no learned epsilon"
    for dtype in ("float32", "bfloat16", "float64", "int32"):
        assert normwise.explain(FilterResponseNormalization(), shape, dtype) == NATIVE
    assert normwise.explain(FilterResponseNormalization(axis=[2, 3]), (None, 6, None, 4)) == NATIVE
    assert normwise.explain(ops.filter_response_norm, shape) == NATIVE
    assert normwise.explain(ops.filter_response_norm, (2, 5, 6), axis=1) == NATIVE
    learned = FilterResponseNormalization(learned_epsilon=True)
    for choice in (
        normwise.explain(learned, shape),
        normwise.explain(ops.filter_response_norm, shape, learned_epsilon=np.float32(1)),
    ):
        assert choice == Choice("composite", reason)
    with normwise.use_kernels("native"), pytest.raises(RuntimeError, match=reason):
        learned(samples(shape))


@pytest.mark.parametrize(("shape", "channel"), [((2, 5, 4, 6), 3), ((2, 6, 5, 4), 1)])
def test_no_fused_norm_that_subtracts_the_mean_takes_over(shape, channel, monkeypatch):
    monkeypatch.setattr(library, "path", lambda: None)
    problem = Problem(shape, channel)
    choice = normwise.explain(ops.filter_response_norm, shape, axis=problem.axis)
    assert choice.kernel == "composite"
    problem.check()

"""Filter response norm and TLU: op and layers against float64, masks, dtypes, files and errors."""

import contextlib
import copy
import dataclasses
import inspect
import json
import re
from pathlib import Path

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
from hypothesis import given, settings
from hypothesis import strategies as st
from norms import expected, randomize, samples
from reference import Norm, group_labels

import normwise
from normwise import geometry, ops
from normwise.dispatch import Choice
from normwise.kernels import library
from normwise.layers import TLU, FilterResponseNormalization

# Half an ulp of 1: the rounding of a dtype.
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 0.0}
OLD_MODEL = Path(__file__).parents[2] / "shared" / "tfa_models" / "functional.h5"
# Of the profile in force; on JAX each costs a compilation.
EXAMPLES = settings.default.max_examples
NATIVE = Choice("native", "the native kernels can take it")

with_library = pytest.mark.skipif(library.path() is None, reason="the native library was not built")
both_epsilons = pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])


def enabled(dtype):
    return float64_enabled() if dtype == "float64" else contextlib.nullcontext()


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
    with enabled(arguments["dtype"]):
        Problem(**arguments).check()


@settings(max_examples=EXAMPLES // 10)
@given(problems(dtypes=("float64",)))
def test_second_gradients_of_any_call(arguments):
    """By x and every parameter, against finite differences of the reference's dx."""
    with enabled("float64"):
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
    with enabled(dtype), normwise.use_kernels("native"):
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


# What runs, and why.


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


# The layer.


def layer(**options):
    """A layer for an input (batch, positions, 6)."""
    return FilterResponseNormalization(**{"axis": [1], **options})


def signature(made):
    parameters = list(inspect.signature(made.__init__).parameters.values())[1:]
    assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    return [(p.name, p.default) for p in parameters[:-1]]


def test_signature_is_that_of_tensorflow_addons_and_an_activation():
    assert signature(FilterResponseNormalization) == [
        ("epsilon", 1e-6),
        ("axis", (1, 2)),
        ("beta_initializer", "zeros"),
        ("gamma_initializer", "ones"),
        ("beta_regularizer", None),
        ("gamma_regularizer", None),
        ("beta_constraint", None),
        ("gamma_constraint", None),
        ("learned_epsilon", False),
        ("learned_epsilon_constraint", None),
        ("name", None),
        ("activation", None),
    ]


@pytest.mark.parametrize(
    ("shape", "axis", "wanted"),
    [
        ((4, 6), [], (1, 6)),
        ((2, 5, 6), 1, (1, 1, 6)),
        ((2, 6, 5), [-1], (1, 6, 1)),
        ((2, 3, 4, 6), (1, 2), (1, 1, 1, 6)),
        ((2, 6, 3, 4), [3, 2], (1, 6, 1, 1)),
        ((2, 3, 6, 4), [1, -1], (1, 1, 6, 1)),
        ((2, 3, 1, 4, 6), [1, 2, 3], (1, 1, 1, 1, 6)),
        ((2, 6, 3, 1, 4), [2, 3, 4], (1, 6, 1, 1, 1)),
    ],
)
@both_epsilons
def test_every_rank_and_axes(shape, axis, wanted, learned):
    made, x = FilterResponseNormalization(axis=axis, learned_epsilon=learned), samples(shape)
    made.build((None, *shape[1:]))
    names = [("learned_epsilon", (1,))] * learned + [("gamma", wanted), ("beta", wanted)]
    assert [(w.name, tuple(w.shape)) for w in made.trainable_weights] == names
    assert {w.dtype for w in made.weights} == {"float32"}
    if learned:
        assert to_numpy(made.eps_learned) == np.float32(1e-4)
    randomize(made)
    right = expected(made, x)
    assert_within(to_numpy(made(x)), right.y, right.y_tolerance(EPS["float32"]))
    assert made.compute_output_shape((None, *shape[1:])) == (None, *shape[1:])
    assert made.get_config()["axis"] == ([axis] if isinstance(axis, int) else list(axis))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "bool"])
@both_epsilons
def test_dtypes(policy, dtype, learned):
    with float64_enabled():
        made = layer(dtype=policy, learned_epsilon=learned)
        # What float16 cannot hold is no trouble: the statistics are of the input as it comes.
        x = samples() > 3 if dtype == "bool" else samples().astype(dtype)
        x = x * np.float32(1e5) if dtype == "float32" else x
        made.build(x.shape)
        randomize(made)
        y, result = made(x), keras.DTypePolicy(policy).compute_dtype
        assert keras.backend.standardize_dtype(y.dtype) == result
        assert {w.dtype for w in made.weights} == {keras.DTypePolicy(policy).variable_dtype}
        right = expected(made, x.astype("float64"))
        tolerance = right.y_tolerance(EPS["float64" if policy == "float64" else "float32"])
        assert_within(to_numpy(y), right.y, tolerance + 2 * EPS[result] * np.abs(right.y))


@both_epsilons
def test_dynamic_extents(learned):
    inputs = keras.Input((6, None, None))
    made = FilterResponseNormalization(axis=[2, 3], learned_epsilon=learned)
    model = keras.Model(inputs, made(inputs))
    assert model.output_shape == (None, 6, None, None)
    randomize(made)
    for shape in [(2, 6, 3, 4), (1, 6, 5, 1)]:
        right = expected(made, samples(shape))
        found = to_numpy(model(samples(shape)))
        assert_within(found, right.y, right.y_tolerance(EPS["float32"]))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="extents unknown to the graph")
@pytest.mark.parametrize("jit_compile", [True, False])
@both_epsilons
def test_tensorflow_graph_of_unknown_extents(jit_compile, learned):
    import tensorflow as tf

    made = FilterResponseNormalization(learned_epsilon=learned)
    made.build((None, 3, 4, 6))
    randomize(made)
    spec = [tf.TensorSpec([None, None, None, 6])]
    function = tf.function(made, jit_compile=jit_compile, input_signature=spec)
    right = expected(made, samples((2, 3, 4, 6)))
    found = function(samples((2, 3, 4, 6))).numpy()
    assert_within(found, right.y, right.y_tolerance(EPS["float32"]))


@both_epsilons
def test_stateless_call_compiled(learned):
    made = layer(learned_epsilon=learned, activation="tanh")
    made.build((None, 5, 6))
    randomize(made)
    weights = [to_numpy(w) for w in made.weights]
    y, state = compiled(lambda w, x: made.stateless_call(w, [], x))(weights, samples())
    assert state == []
    assert_within(to_numpy(y), np.tanh(expected(made, samples()).y), 1e-5)


@pytest.mark.parametrize("jit_compile", [True, False])
def test_fit_moves_every_weight(jit_compile):
    if BACKEND == "torch" and jit_compile:
        pytest.skip("torch.compile needs a C++ compiler")
    made = [layer(learned_epsilon=True), TLU(affine=True)]
    model = keras.Sequential([keras.Input((5, 6)), *made, keras.layers.Dense(1)])
    model.compile("adam", "mse", jit_compile=jit_compile)
    before = model.get_weights()
    model.fit(samples((4, 5, 6)) - 3, np.ones((4, 5, 1)), batch_size=2, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.isfinite(new).all()
        assert not np.allclose(old, new, atol=1e-5)


@both_epsilons
def test_masking_layer_in_a_model(learned):
    keep = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]], bool)
    x = samples()
    x[~keep] = 0
    norm, unit = layer(learned_epsilon=learned), TLU()
    model = keras.Sequential([keras.Input((5, 6)), keras.layers.Masking(), norm, unit])
    randomize(norm)
    right = expected(norm, x, keep[..., None])
    y = model(x)
    assert_within(to_numpy(y), np.maximum(right.y, 0), right.y_tolerance(EPS["float32"]))
    np.testing.assert_array_equal(to_numpy(y._keras_mask), keep)


def test_constraints_and_regularizers_reach_the_weights():
    limit, square = keras.constraints.MinMaxNorm(0.1, 0.2, axis=-1), keras.regularizers.L2(0.5)
    made = layer(
        learned_epsilon=True,
        learned_epsilon_constraint=keras.constraints.NonNeg(),
        gamma_constraint=limit,
        gamma_regularizer=square,
        beta_regularizer=square,
        beta_initializer="ones",
    )
    made.build((None, 5, 6))
    assert made.gamma.constraint is limit
    assert isinstance(made.eps_learned.constraint, keras.constraints.NonNeg)
    np.testing.assert_allclose([to_numpy(loss) for loss in made.losses], [3.0, 3.0])


FULL = {
    FilterResponseNormalization: {
        "epsilon": 1e-2,
        "axis": [1],
        "learned_epsilon": True,
        "learned_epsilon_constraint": keras.constraints.NonNeg(),
        "gamma_initializer": keras.initializers.RandomNormal(seed=1),
        "beta_regularizer": keras.regularizers.L2(0.1),
        "activation": "relu",
        "name": "n",
        "dtype": "mixed_bfloat16",
    },
    TLU: {
        "affine": True,
        "tau_initializer": keras.initializers.RandomNormal(seed=1),
        "alpha_regularizer": keras.regularizers.L2(0.1),
        "alpha_constraint": keras.constraints.NonNeg(),
        "name": "n",
        "dtype": "mixed_bfloat16",
    },
}
every_layer = pytest.mark.parametrize("kind", FULL)


@every_layer
@pytest.mark.parametrize("full", [False, True], ids=["default", "full"])
def test_config_round_trip(kind, full):
    made = kind(**(FULL[kind] if full else {}))
    config = made.get_config()
    json.dumps(config)
    assert kind.from_config(copy.deepcopy(config)).get_config() == config
    arguments = [name for name, _ in signature(kind)]
    assert {*config} == {*arguments, "name", "trainable", "dtype"}
    if full:
        made(samples())
        assert made.get_config() == config


@every_layer
def test_names_of_registration(kind):
    name = kind.__name__
    assert keras.saving.get_registered_name(kind) == f"normwise>{name}"
    for registered in (f"normwise>{name}", f"Addons>{name}"):
        assert keras.saving.get_registered_object(registered) is kind
    legacy = {"class_name": f"Addons>{name}", "config": {"name": "old"}}
    current = {**legacy, "class_name": name, "registered_name": f"Addons>{name}"}
    current["module"] = "tensorflow_addons.layers"
    for saved in (legacy, current):
        made = keras.layers.deserialize(saved)
        assert type(made) is kind
        assert made.name == "old"


def model_of_both():
    inputs = keras.Input((5, 6))
    y = layer(learned_epsilon=True, name="n", activation="tanh")(inputs)
    return keras.Model(inputs, TLU(affine=True, name="t")(y))


@pytest.mark.parametrize("reload", ["keras", "weights", "clone", "copy"])
def test_files_and_copies(reload, tmp_path):
    model = model_of_both()
    for made in model.layers[1:]:
        randomize(made)
    y = to_numpy(model(samples()))
    if reload == "keras":
        model.save(tmp_path / "model.keras")
        other = keras.models.load_model(tmp_path / "model.keras")
    elif reload == "weights":
        model.save_weights(tmp_path / "model.weights.h5")
        other = model_of_both()
        assert not np.array_equal(to_numpy(other(samples())), y)
        other.load_weights(tmp_path / "model.weights.h5")
    elif reload == "clone":
        other = keras.models.clone_model(model)
        other.set_weights(model.get_weights())
    else:
        other = copy.deepcopy(model)
    assert [type(made) for made in other.layers] == [type(made) for made in model.layers]
    np.testing.assert_array_equal(to_numpy(other(samples())), y)


@pytest.mark.skipif(not OLD_MODEL.exists(), reason="the old models are not beside this checkout")
def test_weights_stored_by_tensorflow_addons_go_in_as_they_are():
    import h5py

    made = {
        "filter_response_normalization": FilterResponseNormalization(learned_epsilon=True),
        "tlu": TLU(),
    }
    with h5py.File(OLD_MODEL) as file:
        for name, ours in made.items():
            stored = file["model_weights"][name]
            order = [*stored.attrs["weight_names"]]
            ours.build((None, 16, 16, 8))
            assert [w.name for w in ours.weights] == [
                key.rpartition("/")[2].removesuffix(":0") for key in order
            ]
            ours.set_weights([stored[key][()] for key in order])


# TLU.


def thresholded(x, tau, alpha=0.0):
    """TLU in float64, and where x is above."""
    threshold = tau + alpha * x
    return np.maximum(x, threshold), x >= threshold


@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6), (2, 3, 4, 6), (2, 3, 2, 4, 6)])
@pytest.mark.parametrize("affine", [False, True])
def test_tlu_and_its_gradients(shape, affine):
    rng = np.random.default_rng(0)
    x, dy, tau, alpha = (
        rng.normal(size=s).astype("float32") for s in (shape, shape, shape[1:], shape[1:])
    )
    # Zeros at a threshold of 0, as behind a relu: there all of the gradient is that of x.
    x[0, 0], tau[0] = 0, 0
    made = TLU(affine=affine)
    made.build((None, *shape[1:]))
    assert [(w.name, tuple(w.shape)) for w in made.trainable_weights] == [
        (name, shape[1:]) for name in ("tau", "alpha")[: 1 + affine]
    ]
    assert made.compute_output_shape((None, *shape[1:])) == (None, *shape[1:])
    weights = [tau, alpha][: 1 + affine]

    def call(x, *weights):
        return made.stateless_call(weights, [], x)[0]

    y, (dx, *dw) = gradients(call, [x, *weights], dy)
    alpha = alpha if affine else 0.0
    wanted, above = thresholded(x.astype("float64"), tau, alpha)
    assert above[0, 0].all()
    below = np.where(above, 0, dy.astype("float64"))
    assert_within(y, wanted, 1e-6)
    assert_within(dx, np.where(above, dy, alpha * below), 1e-6)
    for found, want in zip(dw, (below.sum(axis=0), (below * x).sum(axis=0)), strict=False):
        assert_within(found, want, 1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "bool"])
def test_tlu_of_every_dtype(policy, dtype):
    with float64_enabled():
        made = TLU(affine=True, dtype=policy)
        made.build((None, 5, 6))
        randomize(made)
        x = (samples() > 3) if dtype == "bool" else samples().astype(dtype)
        y, result = made(x), keras.DTypePolicy(policy).compute_dtype
        assert keras.backend.standardize_dtype(y.dtype) == result
        assert {w.dtype for w in made.weights} == {keras.DTypePolicy(policy).variable_dtype}
        tau, alpha = (to_numpy(w).astype("float64") for w in made.weights)
        wanted, _ = thresholded(x.astype("float64"), tau, alpha)
        eps = EPS["float64" if "float64" in (policy, dtype) else "float32"]
        assert_within(to_numpy(y), wanted, (4 * eps + EPS[result]) * (1 + np.abs(wanted)))


def test_tlu_keeps_what_is_not_finite_where_it_is():
    x = np.array([[np.nan, np.inf, -np.inf], [1, -1, 0]], "float32")
    y = to_numpy(TLU()(x))
    np.testing.assert_array_equal(y, [[np.nan, np.inf, 0], [1, 0, 0]])


def test_tlu_signature_is_that_of_tensorflow_addons():
    assert signature(TLU) == [
        ("affine", False),
        ("tau_initializer", "zeros"),
        ("tau_regularizer", None),
        ("tau_constraint", None),
        ("alpha_initializer", "zeros"),
        ("alpha_regularizer", None),
        ("alpha_constraint", None),
    ]


def test_tlu_reads_a_config_without_alpha():
    """As TensorFlow Addons writes it where affine is False."""
    config = {k: v for k, v in TLU().get_config().items() if not k.startswith("alpha")}
    assert TLU.from_config(config).get_config() == {**TLU().get_config(), "name": config["name"]}


def test_empty_batch():
    for made in (layer(), TLU(affine=True)):
        assert to_numpy(made(np.zeros((0, 5, 6), "float32"))).shape == (0, 5, 6)


# Errors, word for word.

X = np.ones((8, 5, 4, 6), "float32")


def calls(**options):
    yield lambda: FilterResponseNormalization(**options)(X)
    yield lambda: FilterResponseNormalization(**options)(keras.Input(X.shape[1:]))
    yield lambda: FilterResponseNormalization(**options).compute_output_shape(X.shape)
    yield lambda: ops.filter_response_norm(X, **options)


def raises(error, text):
    return pytest.raises(error, match=re.escape(text))


@pytest.mark.parametrize(
    ("axis", "error", "text"),
    [
        (
            [1],
            ValueError,
            "axis=[1] is to name every axis of shape {} but the batch and the channels, 2 of them; "
            "use axis=[1, 2] for channels last, axis=[2, 3] for channels first",
        ),
        ([1, 2, 3], ValueError, "axis=[1, 2, 3] is to name every axis of shape {} but the batch"),
        ([], ValueError, "axis=[] is to name every axis of shape {} but the batch"),
        (
            [0, 1],
            ValueError,
            "axis=[0, 1] names the batch axis, and filter response norm keeps samples apart; name "
            "the spatial axes only: [1, 2] for images with channels last",
        ),
        ([-4, 1], ValueError, "axis=[-4, 1] names the batch axis of shape {}, and filter response"),
        ([1, 4], ValueError, "axis=4 is out of range for shape {} of rank 4; use an axis from -4"),
        ([1, -3], ValueError, "axis=[1, -3] names axis 1 of shape {} twice; name each axis once"),
        ("1", TypeError, "axis='1' is no axis; expected an int, or a list or tuple of ints"),
    ],
)
def test_axes_that_are_not_the_spatial_ones(axis, error, text):
    for call in calls(axis=axis):
        with pytest.raises(error) as raised:
            call()
        shapes = ("(8, 5, 4, 6)", "(None, 5, 4, 6)")
        assert any(text.format(shape) in str(raised.value) for shape in shapes)


def test_axes_of_an_input_without_positions():
    text = "axis=[1, 2] is to name every axis of shape (8, 6) but the batch and the channels, 0 of "
    with raises(ValueError, text + "them; use axis=[]"):
        FilterResponseNormalization()(X[:, 0, 0])


def test_rank_one():
    for call in (ops.filter_response_norm, FilterResponseNormalization(), TLU()):
        with pytest.raises(ValueError, match=r"shape \(8,\) has rank 1, but .* add an axis, as in"):
            call(X[:, 0, 0, 0])


def test_unknown_extents():
    text = "the number of channels on axis 3 of shape (None, 5, 4, None) is unknown; give that axis"
    for call in (ops.filter_response_norm, FilterResponseNormalization()):
        with raises(ValueError, text):
            call(keras.Input((5, 4, None)))
    text = (
        "shape (None, None, 6) has an unknown extent, but tau has a value for every element of a "
        "sample; give all but the batch a fixed extent, as in keras.Input((32, 32, 16))"
    )
    with raises(ValueError, text):
        TLU()(keras.Input((None, 6)))


@pytest.mark.parametrize("epsilon", [-1e-6, float("nan"), "1e-6", None])
def test_epsilon_that_no_mean_square_can_take(epsilon):
    for call in calls(epsilon=epsilon):
        with pytest.raises((ValueError, TypeError), match=r"epsilon=.*; expected a number >= 0"):
            call()


@pytest.mark.parametrize("shape", [(6,), (1, 1), (0,)])
def test_learned_epsilon_of_a_wrong_shape(shape):
    text = (
        f"learned_epsilon has shape {shape}, but it is one number for all channels; pass a tensor "
        "of shape () or (1,)"
    )
    for x in (X, keras.Input(X.shape[1:])):
        with raises(ValueError, text):
            ops.filter_response_norm(x, learned_epsilon=np.ones(shape, "float32"))


def test_parameters_and_masks_that_do_not_fit():
    with raises(ValueError, "gamma has shape (1, 6), but axis [3] of shape (8, 5, 4, 6) needs (6,"):
        ops.filter_response_norm(X, np.ones((1, 6), "float32"))
    with raises(ValueError, "mask has shape (8, 4), which does not fit x of shape (8, 5, 4, 6); "):
        FilterResponseNormalization()(X, mask=np.ones((8, 4), bool))


def test_complex_inputs():
    for call in (ops.filter_response_norm, FilterResponseNormalization(), TLU()):
        with raises(TypeError, "x has dtype complex64, and no norm is defined on complex numbers"):
            call(X.astype("complex64"))


def test_a_built_layer_keeps_to_its_rank_and_channels():
    made = FilterResponseNormalization()
    made(X)
    made(samples((2, 3, 7, 6)))
    with pytest.raises(ValueError, match="expected ndim=4, found ndim=3"):
        made(X[0])
    with pytest.raises(ValueError, match="expected axis 3 of input shape to have value 6"):
        made(X[..., :4])
